"""Real gloo ranks on this host: forked, joined through a file, torn down with the reason.

    parent   fork, wait ------ first failure -> half a second for the others' reasons -> stacks of the rest -> error
    rank     join -> function(control) -> value or reason, through a pipe; what it prints goes to a file

A rank that raises, crashes or hangs ends all within seconds, and the error names it and the line where it stood. The
parent must not have run torch's thread pools before (a fork does not copy threads): importing torch is harmless.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from megads.errors import ConfigError, MegadsError, RankError
from megads.parallel.bootstrap import connect_local
from megads.parallel.control import Control

T = TypeVar("T")

STALL = 20.0  # seconds that a collective waits for the others of its group
GRACE = 0.5  # seconds that other ranks get to say why they fail, after the first
LOG_CHARACTERS = 3000  # of each rank's output in a failure's log
FRAME = re.compile(r'File "[^"]*?(megads/[^"]+)", line (\d+),? in (\w+)')


class RanksError(RankError):
    """Ranks that did not come back.

    Attributes:
        log: tracebacks, and what every rank printed last.
    """

    def __init__(self, text: str, log: str) -> None:
        super().__init__(text)
        self.log = log


@dataclass(frozen=True, slots=True)
class _Reason:
    """Why a rank failed.

    Attributes:
        when: seconds since the epoch.
        what: type and message of the exception.
        is_input: whether the user's input is to blame (exit code 2).
        trace: the traceback, innermost call last.
    """

    when: float
    what: str
    is_input: bool = False
    trace: str = ""


@dataclass(frozen=True, slots=True)
class _Answer(Generic[T]):
    value: T


def fork_ranks(
    function: Callable[[Control], T], size: int, *, stall: float = STALL, timeout: float = 300.0
) -> list[T]:
    """Run `function(control)` on `size` connected ranks; returns their values in rank order.

    Args:
        function: returns plain values and NumPy arrays; a tensor cannot leave its process.
        stall: seconds after which a collective that another rank did not join fails.
        timeout: seconds after which everything ends.

    Raises:
        RanksError: a rank failed, died or did not come back.
        ConfigError: a rank refused its input.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="megads-ranks-") as name:
        path = Path(name)
        readers: list[Connection] = []
        processes: list[BaseProcess] = []
        for rank in range(size):
            reader, writer = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_child,
                args=(function, rank, size),
                kwargs={"path": path, "stall": stall, "out": writer},
            )
            process.start()
            writer.close()
            readers.append(reader)
            processes.append(process)
        try:
            answers = _collect(readers, processes, timeout=timeout)
        finally:
            for process in processes:
                process.kill()  # of those that have ended it is nothing
                process.join()
        bad = {rank: answer for rank, answer in answers.items() if isinstance(answer, _Reason)}
        if bad or len(answers) < size:
            logs = [Path(path, f"{rank}.log").read_text(errors="replace") for rank in range(size)]
            raise _failure(bad, logs, missing=sorted(set(range(size)) - set(answers)), timeout=timeout)
        return [answer.value for _, answer in sorted(answers.items()) if isinstance(answer, _Answer)]


def _child(
    function: Callable[[Control], T], rank: int, size: int, *, path: Path, stall: float, out: Connection
) -> None:
    """A rank's whole life; it ends without Python's clean-up, which would wait for peers."""
    log = os.open(path / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)
    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        control = connect_local(rank, size, directory=path, timeout=stall)
        value = function(control)
        control.barrier()
        out.send(_Answer(value))
    except BaseException as error:
        what = str(error) if isinstance(error, MegadsError) else f"{type(error).__name__}: {error}"
        is_input = isinstance(error, MegadsError) and error.exit_code == 2
        out.send(_Reason(time.time(), what, is_input, traceback.format_exc()))
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _collect(
    readers: list[Connection], processes: list[BaseProcess], *, timeout: float
) -> dict[int, _Answer[Any] | _Reason]:
    """Answers by rank, until all are in, one is bad, or the time is over; who is late leaves its stack in its log."""
    answers: dict[int, _Answer[Any] | _Reason] = {}
    pending = {reader: rank for rank, reader in enumerate(readers)}
    deadline = time.monotonic() + timeout
    while pending and (left := deadline - time.monotonic()) > 0:
        for ready in wait(list(pending), timeout=left):
            assert isinstance(ready, Connection)
            rank = pending.pop(ready)
            try:
                answers[rank] = ready.recv()
            except EOFError:  # died without a word
                processes[rank].join(1)
                answers[rank] = _Reason(time.time(), _epitaph(processes[rank].exitcode))
            if isinstance(answers[rank], _Reason):
                deadline = min(deadline, time.monotonic() + GRACE)
    if pending:
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)  # its stack, into its log
        time.sleep(0.3)
    else:
        for process in processes:
            process.join(5)
    return answers


def _epitaph(code: int | None) -> str:
    if code is not None and code < 0:
        return f"died of {signal.Signals(-code).name}"
    return f"died with exit code {code}"


def _failure(
    bad: dict[int, _Reason], logs: list[str], *, missing: list[int], timeout: float
) -> RanksError | ConfigError:
    """The error that says which rank failed first, and where it and the others stood."""
    log = "\n".join(
        [reason.trace for _, reason in sorted(bad.items()) if reason.trace]
        + [f"--- rank {rank}\n{text[-LOG_CHARACTERS:]}" for rank, text in enumerate(logs)]
    )
    others = [f"  rank {rank} stood in {_place(logs[rank], innermost_first=True)}" for rank in missing]
    if not bad:
        return RanksError("\n".join([f"no answer after {timeout:.0f} s:", *others]), log)
    # who died without a word is the cause: the others' reason is that it is gone
    rank, first = min(bad.items(), key=lambda item: (item[1].trace != "", item[1].when))
    if first.is_input:
        return ConfigError(f"rank {rank}: {first.what}" if len(logs) > 1 else first.what)
    where = first.trace or logs[rank]
    lines = [
        f"rank {rank} of {len(logs)} failed in {_place(where, innermost_first=not first.trace)}",
        *(f"  {line}" for line in first.what.splitlines()[:4]),
        *others,
    ]
    return RanksError("\n".join(lines), log)


def _place(text: str, *, innermost_first: bool) -> str:
    """The innermost three calls of the package in a traceback or a dumped stack, outermost first."""
    frames = [frame for frame in _frames(text) if not frame.startswith("megads/verify/ranks.py")]
    if innermost_first:
        frames = frames[::-1]
    return " > ".join(frames[-3:]) or "code outside of megads"


def _frames(text: str) -> Iterable[str]:
    """Calls of the package as `file:line function`, in the order of the text."""
    for match in FRAME.finditer(text):
        yield f"{match[1]}:{match[2]} {match[3]}"
