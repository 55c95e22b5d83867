"""Save and load of one step beside what `dd` gets from the same disk, in turns, in one run.

    python -m tools.bench.checkpoint --directory runs --gigabytes 4

    write    dd conv=fsync            |  save: hash, write, fsync, commit         the same bytes
    read     dd, page cache dropped   |  load: read, hash, copy                   page cache dropped
    stall    copy to other memory     |  save in the background, until it returns

The page cache is emptied of these files with posix_fadvise before each read. Rates are of decimal gigabytes, medians of
the rounds; a ratio is ours over dd's of the same round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megads.checkpoint.background import SavePlan, Saver
from megads.checkpoint.load import load
from megads.checkpoint.save import save
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box
from tools.bench.measure import print_table

TENSOR_BYTES = 64 << 20
BLOCK = "16M"


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of each thing in one round."""

    dd_write: float
    save: float
    dd_read: float
    load: float
    copy: float
    stall: float


def state(num_bytes: int) -> list[Piece]:
    """Random float32 tensors of 64 MiB."""
    columns = 4096
    rows = TENSOR_BYTES // 4 // columns
    pieces = []
    for number in range(max(1, num_bytes // TENSOR_BYTES)):
        values = torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32).view(torch.float32)
        pieces.append(Piece(f"model/w{number}", (rows, columns), Box.whole((rows, columns)), values))
    return pieces


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def drop_cache(path: Path) -> None:
    """Let the page cache forget every file below `path`."""
    for file in path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def dd(*words: str) -> None:
    """Run dd; raises CalledProcessError if it fails."""
    subprocess.run(["dd", f"bs={BLOCK}", "status=none", *words], check=True)


def measure(directory: Path, pieces: list[Piece]) -> Round:
    """One round in `directory`, which is left empty."""
    control = Control(0, 1)
    save(directory, 1, pieces=pieces, objects={}, control=control)
    step = directory / "step-00000001"
    (source,) = step.glob("chunks-*.bin")  # its bytes are in the page cache: dd's reading costs it little
    copy = directory / "copy"
    dd_write = seconds(lambda: dd(f"if={source}", f"of={copy}", "conv=fsync"))
    save_seconds = seconds(lambda: save(directory, 2, pieces=pieces, objects={}, control=control))
    drop_cache(directory)
    dd_read = seconds(lambda: dd(f"if={source}", "of=/dev/null"))
    drop_cache(directory)
    targets = [Piece(p.name, p.shape, p.box, torch.zeros_like(p.tensor)) for p in pieces]
    pairs = list(zip(pieces, targets, strict=True))
    load_seconds = seconds(lambda: load(step, targets))
    if not all(torch.equal(a.tensor.view(torch.int32), b.tensor.view(torch.int32)) for a, b in pairs):
        raise RuntimeError("what was loaded is not what was saved")
    copy_seconds = seconds(lambda: [target.tensor.copy_(piece.tensor) for piece, target in pairs])
    saver = Saver(SavePlan(directory, in_background=True), control=control)
    saver.save(3, pieces=pieces, objects={})
    saver.finish()  # the first one also allocates
    stall = seconds(lambda: saver.save(4, pieces=pieces, objects={}))
    saver.finish()
    shutil.rmtree(directory)
    return Round(dd_write, save_seconds, dd_read, load_seconds, copy_seconds, stall)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--directory", type=Path, required=True, help="on the disk in question; a folder is made in it"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    pieces = state(int(options.gigabytes * 1e9))
    size = sum(piece.tensor.numel() * 4 for piece in pieces)
    rounds = [measure(options.directory / "bench-checkpoint", pieces) for _ in range(options.rounds)]
    rows = []
    for name, ours, peer, what in (
        ("save", "save", "dd_write", "dd conv=fsync"),
        ("load", "load", "dd_read", "dd, cold"),
        ("stall", "stall", "copy", "copy in memory"),
    ):
        mine, other = ([getattr(r, key) for r in rounds] for key in (ours, peer))
        ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
        rates = [f"{size / 1e9 / statistics.median(values):.2f}" for values in (mine, other)]
        rows.append([name, what, *rates, f"{ratio:.2f}"])
    print_table(
        ("megads", "beside", "GB/s", "beside GB/s", "ratio"),
        rows,
        device=torch.device("cpu"),
        notes=[f"{size / 1e9:.2f} GB, {options.rounds} rounds, one rank, {os.cpu_count()} cores"],
    )


if __name__ == "__main__":
    main()
