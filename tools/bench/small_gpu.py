"""1.3e9 parameters on a GPU of 24 GB: what each recipe takes and how fast it is, beside a plain run without a limit.

    python -m tools.bench.small_gpu                       configs/gpt2-1.3b-24gb.yaml on a GPU (about 3 minutes)
    python -m tools.bench.small_gpu --device cpu --tiny   anywhere, to see that it runs

Every row trains the config of the file with the keys that stand in its row, through megads' own engine and executor,
on random tokens. The process may allocate no more than `--cap` GiB, so that with the driver's own share (about 0.6 GiB)
a card of 24 GiB holds it: a recipe that needs more fails with an error. `smi` is nvidia-smi's most for the whole card.
The plain row keeps everything on the card, without a limit and without recompute.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.config.load import load
from megads.config.root import Config
from megads.parallel.mesh import build_mesh
from tools.bench.measure import print_table, seconds_of, synchronize
from tools.bench.step import Shape, batches, release

CONFIG = Path(__file__).parents[2] / "configs/gpt2-1.3b-24gb.yaml"
TINY = ("model.layers=2", "model.hidden=32", "model.heads=2", "model.vocab=64", "model.max_positions=16")
TINY_DATA = ("data.sequence_length=16", "parallel.loss_chunk=16")
PLAIN = ("optim.moment_dtype=fp32", "parallel.recompute=none", "parallel.loss_chunk=null")
# name -> overrides of the file; the first row has no limit
RECIPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("plain, no limit", PLAIN),
    ("bf16 moments", ()),
    ("offload", ("optim.offload=true", "optim.moment_dtype=fp32")),
    ("offload, bf16 moments", ("optim.offload=true",)),
    ("offload, cheap recompute", ("optim.offload=true", "parallel.recompute=[norm, activation]")),
)
HEADER = (
    "recipe",
    "recompute",
    "tokens/s",
    "of plain",
    "ms",
    "allocated GiB",
    "reserved GiB",
    "smi GiB",
    "loss",
)


@dataclass(frozen=True, slots=True)
class Result:
    """Median seconds of a step, its tokens, peaks in bytes (0: not known), loss of the last step."""

    seconds: float
    tokens: int
    allocated: int
    reserved: int
    card: int
    loss: float


class CardWatch:
    """The most memory of the card that nvidia-smi has shown."""

    def __init__(self, index: int) -> None:
        self.peak = 0
        self._index = index
        self._is_over = threading.Event()

    def _look(self) -> None:
        command = [
            "nvidia-smi",
            "--query-gpu=memory.used",
            "--format=csv,noheader,nounits",
            "-i",
            str(self._index),
        ]
        while not self._is_over.is_set():
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.peak = max(self.peak, int(said) << 20)
            self._is_over.wait(0.1)

    @contextmanager
    def watching(self) -> Iterator[CardWatch]:
        """Look several times a second, meanwhile."""
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            thread.join()


def measure(config: Config, *, device: torch.device, repeats: int) -> Result:
    """Build, warm up, time whole steps."""
    release(device)
    assert config.model.vocab is not None  # the file says it
    mesh = build_mesh(layout_of(config, 1), 0, device=device)
    model = build_model(config, mesh, vocab=config.model.vocab)
    engine = build_engine(config, model, mesh=mesh)
    executor = build_executors(config, model, mesh=mesh).train
    shape = Shape("", config.model, config.data.sequence_length, ())
    source = batches(shape, rows=config.batch.global_size, device=device)
    model.train()

    def step() -> torch.Tensor:
        return train_step(next(source), executor=executor, engine=engine, mesh=mesh, lr=1e-4).loss

    for _ in range(2):
        loss = step()
    synchronize(device)
    seconds = statistics.median(seconds_of(step, device, repeats=repeats))
    is_gpu = device.type == "cuda"
    return Result(
        seconds,
        config.batch.global_size * config.data.sequence_length,
        torch.cuda.max_memory_allocated(device) if is_gpu else 0,
        torch.cuda.max_memory_reserved(device) if is_gpu else 0,
        0,
        loss.item(),
    )


def limited(config: Config, *, device: torch.device, repeats: int, limit: float | None) -> Result:
    """`measure` of a process that may allocate so many GiB; None: all there is."""
    if device.type != "cuda":
        return measure(config, device=device, repeats=repeats)
    total = torch.cuda.get_device_properties(device).total_memory
    fraction = 1.0 if limit is None else limit * 2**30 / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))
    release(device)  # of the row before, which would count
    with CardWatch(device.index or 0).watching() as watch:
        result = measure(config, device=device, repeats=repeats)
    return replace(result, card=watch.peak)


def row_of(name: str, config: Config, *, result: Result, plain: Result) -> list[str]:
    """The table's line."""
    gib = [
        f"{size / 2**30:.2f}" if size else "-" for size in (result.allocated, result.reserved, result.card)
    ]
    recompute = config.parallel.recompute
    return [
        name,
        recompute if isinstance(recompute, str) else ", ".join(recompute),
        f"{result.tokens / result.seconds:.0f}",
        f"{plain.seconds / result.seconds:.2f}x",
        f"{result.seconds * 1e3:.0f}",
        *gib,
        f"{result.loss:.4f}",
    ]


def main() -> None:
    """Measure every recipe and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, few repeats")
    parser.add_argument("--cap", type=float, default=23.0, help="GiB that the process may allocate")
    parser.add_argument("--rows", type=int, default=64, help="samples of a step")
    parser.add_argument(
        "--recipes", nargs="+", default=[name for name, _ in RECIPES], help="beside the plain run"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    size = (
        (*TINY, *TINY_DATA, "batch.global=4", "batch.micro=2")
        if options.tiny
        else (f"batch.global={options.rows}",)
    )
    rows: list[list[str]] = []
    plain: Result | None = None
    config = load(CONFIG, [*size])
    for number, (name, keys) in enumerate(RECIPES):
        if number and name not in options.recipes:
            continue
        config = load(CONFIG, [*size, *keys])
        limit = options.cap if number else None
        result = limited(config, device=device, repeats=2 if options.tiny else 5, limit=limit)
        plain = plain or result
        rows.append(row_of(name, config, result=result, plain=plain))
        print("  ".join(rows[-1]), flush=True)
    batch = config.batch
    notes = [
        f"{CONFIG.name}: {batch.global_size} samples of {config.data.sequence_length} tokens a step, micro-batches of "
        f"{batch.micro}; all rows but the first may allocate {options.cap:g} GiB"
    ]
    print_table(HEADER, rows, device=device, notes=notes)


if __name__ == "__main__":
    main()
