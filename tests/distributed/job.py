"""A whole job as its user sees it: a corpus made by the project's own tools, command lines, what they leave on disk.

    make_home -> tokenizer, corpora, config.yaml      train: real ranks, forked      command: one forked process
    launch: the real launcher, forked; its ranks are fresh processes

Forked, because importing torch costs more than everything else here. Nothing is asserted here.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megads import __main__ as top
from megads import log
from megads.assemble import rules
from megads.checkpoint.load import load as load_pieces
from megads.checkpoint.reader import open_step
from megads.config.load import load
from megads.data import preprocess, vocabulary
from megads.log import read_metrics
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box
from megads.train.trainer import Trainer
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
VOCAB = 401  # prime: no tensor-parallel degree divides it
FILES = ("ast.py", "dis.py", "enum.py", "functools.py", "heapq.py", "random.py", "shutil.py", "textwrap.py")

CONFIG = """\
run:
  seed: 7
  steps: 400
model:
  family: gpt
  layers: 3
  hidden: 32
  heads: 4
  max_positions: 64
  dropout: 0.1
  attention_dropout: 0.1
batch:
  global: 8
  micro: 2
data:
  train: data/train
  valid: data/valid
  tokenizer: data/tokenizer.model
  sequence_length: 16
  page: 16
  eod_mask_loss: true
optim:
  lr: 1e-3
  eps: 1e-6 # gradients that are zero but for rounding (key bias) stay so after Adam
  decay: constant
checkpoint:
  every: 3
log:
  validate_samples: 8
"""


@dataclass(frozen=True, slots=True)
class Home:
    """Where every command runs: `config.yaml`, `data/tokenizer.model`, `data/train.*`, `data/valid.*`, and runs."""

    path: Path


def make_home(path: Path) -> Home:
    """Train a tokenizer on a few files of the standard library and shard them, a paragraph a document."""
    library = Path(sysconfig.get_path("stdlib"))
    paragraphs = [
        text for name in FILES for text in (library / name).read_text().split("\n\n") if text.strip()
    ]
    data = path / "data"
    data.mkdir(parents=True)
    with open(data / "text.jsonl", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in paragraphs)
    make_tokenizer(data / "tokenizer.model", data / "text.jsonl", size=VOCAB)
    make_corpus(data / "train", data / "tokenizer.model", [data / "text.jsonl"])
    (data / "held_out.txt").write_text((library / "bisect.py").read_text(), encoding="utf-8")
    make_corpus(data / "valid", data / "tokenizer.model", [data / "held_out.txt"])
    (path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return Home(path)


def make_tokenizer(output: Path, text: Path, *, size: int) -> None:
    """`tools/train_tokenizer.py`, in this process."""
    arguments = ["--input", str(text), "--vocab-size", str(size), "--output", str(output)]
    if vocabulary.main(arguments):
        raise RuntimeError("tools/train_tokenizer.py failed")


def make_corpus(prefix: Path, tokenizer: Path, inputs: Sequence[Path]) -> None:
    """`tools/preprocess_data.py`, in this process."""
    arguments = ["--tokenizer", str(tokenizer), "--append-eod", "--output-prefix", str(prefix)]
    if preprocess.main([*arguments, "--input", *map(str, inputs)]):
        raise RuntimeError("tools/preprocess_data.py failed")


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees, and what else may not change the losses."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    context_kind: str = "ring"
    zero: int = 0
    schedule: str = "one_f_one_b"
    micro: int = 2

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def overrides(self) -> list[str]:
        return [
            f"parallel.tensor={self.tensor}",
            f"parallel.context={self.context}",
            f"parallel.context_kind={self.context_kind}",
            f"parallel.pipeline={self.pipeline}",
            f"parallel.schedule={self.schedule}",
            f"optim.zero_stage={self.zero}",
            f"batch.micro={self.micro}",
        ]


def train(home: Home, run: str, layout: Layout, *overrides: str) -> None:
    """`train` on real connected ranks; fails with the reason of the first rank that failed."""
    values = [f"run.dir={run}", *layout.overrides, *overrides]

    def work(rank: int, size: int) -> None:
        os.chdir(home.path)
        config = load("config.yaml", values)
        rules.check(config, size)
        log.setup(rank)
        Trainer(config, connected(rank, size), torch.device("cpu")).run()

    run_ranks(work, layout.world_size, timeout=120)


def connected(rank: int, size: int) -> Control:
    """The control channel of ranks that `run_ranks` has connected."""
    return Control(rank, size, dist.new_group(backend="gloo") if size > 1 else None)


def losses(home: Home, run: str) -> dict[int, float]:
    """Step -> loss, from metrics.jsonl; a step that is there twice is an error."""
    records = read_metrics(home.path / run / "metrics.jsonl")
    found = {record["step"]: record["loss"] for record in records}
    if len(found) != len(records):
        raise ValueError(f"a step twice: {[record['step'] for record in records]}")
    return found


def step_directory(home: Home, run: str, step: int) -> Path:
    """Where a run's step is, once it is committed."""
    return home.path / run / "checkpoints" / f"step-{step:08d}"


def tensors(step: Path) -> dict[str, torch.Tensor]:
    """Every logical tensor of a committed step, whole, through the project's own checked reader."""
    whole = {}
    pieces = []
    for name, entry in open_step(step).manifest.tensors.items():
        whole[name] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        box = Box((0,) * len(entry.shape), tuple(entry.shape))
        pieces.append(Piece(name, tuple(entry.shape), box, whole[name]))
    load_pieces(step, pieces)
    return whole


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    code: int
    said: str
    errors: str


class Process:
    """A forked process that runs a function in a directory of its own, which also gets its output."""

    def __init__(self, inside: Path, function: Callable[[], int], environment: Mapping[str, str]) -> None:
        self._path = inside
        self._process = multiprocessing.get_context("fork").Process(
            target=_run, args=(inside, function, dict(environment))
        )
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def end(self, *, timeout: float = 120) -> Ended:
        """Wait; a process that hangs is killed and has exit code -9."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        said, errors = ((self._path / name).read_text() for name in (f"{self.pid}.out", f"{self.pid}.err"))
        return Ended(int(self._process.exitcode or 0), said, errors)


def _run(inside: Path, function: Callable[[], int], environment: dict[str, str]) -> None:
    os.chdir(inside)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{os.getpid()}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        code = function()
    except SystemExit as stop:  # argparse
        code = stop.code if isinstance(stop.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(inside: Path, *argv: str, environment: Mapping[str, str] | None = None) -> Ended:
    """`python -m megads ...` as one forked process in the directory `inside`."""
    return Process(inside, lambda: top.main(argv), environment or {}).end()


def commands(*each: tuple[Path, Sequence[str]]) -> list[Ended]:
    """`python -m megads ...` as connected ranks, each in a directory and with arguments of its own."""
    place = {"WORLD_SIZE": str(len(each)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started = [
        Process(
            inside,
            partial(top.main, argv),
            {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank, (inside, argv) in enumerate(each)
    ]
    return [process.end() for process in started]


def _free_port() -> int:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    return store.port


def launch(home: Home, run: str, layout: Layout, *overrides: str) -> Process:
    """`python -m megads launch ... -- train ...`: the real launcher with fresh processes as ranks."""
    values = [f"run.dir={run}", *layout.overrides, *overrides]
    argv = ["launch", "--nproc", str(layout.world_size), "--", "train", "config.yaml", *values]
    return Process(home.path, partial(top.main, argv), {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"})


def rank_processes(launcher: int) -> dict[int, int]:
    """Global rank -> process id, of the children of a launcher."""
    found = {}
    for pid in children(launcher):
        variables = _environment(pid)
        if "RANK" in variables and "MEGADS_LAUNCHER" in variables:
            found[int(variables["RANK"])] = pid
    return found


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        rows = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(row.split("=", 1) for row in rows if "=" in row)
    return {}


def wait_until(condition: Callable[[], Any], *, seconds: float, what: str) -> None:
    """Poll; fails with `what` when the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds} s: {what}")
        time.sleep(0.005)
