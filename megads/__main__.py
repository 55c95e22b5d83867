"""`python -m megads VERB ...`: the table of verbs, and the top frame of every process.

The chosen verb's module is the only late import of the project, so that `--help` needs no torch. Here ends
every exception: a `MegadsError` becomes its message and exit code, anything else a traceback and exit code 1.
A rank that has a launcher leaves the message in the launcher's error file, so that one rank's reason is told,
not all.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from megads.errors import ConfigError, MegadsError
from megads.parallel.place import Launcher, Place, discover

VERBS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "train": ("megads.train.trainer:main", "train a model: train CONFIG [key=value ...]"),
        "launch": (
            "megads.train.launch:main",
            "start ranks: launch --nproc N -- train CONFIG ...",
        ),
        "evaluate": ("megads.evaluate.perplexity:main", "perplexity and bits per byte of a checkpoint"),
        "generate": ("megads.evaluate.generate:main", "sample text from a checkpoint"),
        "verify": (
            "megads.verify.command:main",
            "prove on the CPU that a layout changes nothing: verify CONFIG --layout tensor=2,pipeline=2",
        ),
        "data": (
            "megads.train.ledger:main",
            "documents of a step, steps of a document: data CONFIG --step N | --document ID",
        ),
        "schedule": ("megads.pipeline.report:main", "prove, time, compare and draw pipeline schedules"),
        "explain": ("megads.config.explain:main", "what a config key means: explain [KEY]"),
    }
)

INTERRUPTED = 130  # what a shell reports for a command that ended by Ctrl-C
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCAL_RANK = re.compile(
    "--local[_-]rank=[0-9]+"
)  # deepspeed's launcher adds it; the environment says the same


def main(argv: Sequence[str]) -> int:
    """Run a verb; returns the exit code of the process."""
    _follow_launcher()
    try:
        return _run(argv)
    except MegadsError as error:
        return _report(error, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _report(error, "interrupted", INTERRUPTED)
    except Exception as error:
        return _report(error, "".join(traceback.format_exception(error)).rstrip(), 1)


def _run(argv: Sequence[str]) -> int:
    argv = [word for word in argv if not LOCAL_RANK.fullmatch(word)]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise ConfigError(
            f"{verb}: no such verb{f'; did you mean {near[0]}?' if near else ''}",
            allowed=", ".join(VERBS),
            do="`python -m megads --help` says what they do",
        )
    module, _, function = VERBS[verb][0].partition(":")
    code: int = getattr(importlib.import_module(module), function)(rest)
    return code


def usage() -> str:
    """The help text: one line a verb."""
    lines = ["usage: python -m megads VERB ...", ""]
    lines += [f"  {verb:10} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join([*lines, "", "`python -m megads VERB --help` says more."])


def _report(error: BaseException, text: str, code: int) -> int:
    """Say why the process ends, to the launcher if there is one, else on stderr; returns `code`.

    Args:
        text: all there is to say.
    """
    place = _place()
    reason = (
        text if isinstance(error, MegadsError | KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    )
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        now = time.time()
        # Torch's elastic agent reads message, py_callstack and timestamp; train/launch.py reads the rest.
        message = {
            "message": f"rank {place.rank}: {reason}",
            "extraInfo": {
                "py_callstack": text,
                "timestamp": str(int(now)),
                "time": now,
                "type": type(error).__name__,
                "code": code,
            },
        }
        with open(file, "w", encoding="utf-8") as stream:
            json.dump({"message": message}, stream)
    if file and os.environ.get("MEGADS_LAUNCHER"):
        return code
    if place.world_size == 1:
        print(text, file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        trace = [text] if text != reason else []
        print(*trace, f"rank {place.rank}: {reason}", sep="\n", file=sys.stderr)
    elif place.rank == 0:  # the user knows; once is enough
        print(text, file=sys.stderr)
    return code


def _place() -> Place:
    """This process' place; a world of one if the environment is what is wrong."""
    try:
        return discover()
    except ConfigError:
        return Place(0, 1, 0, 1)


def _follow_launcher() -> None:
    """Ask Linux to send SIGTERM when the launcher is gone, so that no rank outlives it (mpiexec and srun see to it)."""
    if _place().launcher is Launcher.TORCH and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
