"""What bf16 and fp16 give against fp32, without and with TF32: step time, memory, and the loss curve, in one run.

    python -m tools.bench.precision                       GPT-2 (124M) on a GPU, on made-up tokens (about 3 minutes)
    python -m tools.bench.precision --data PREFIX         ... on a corpus
    python -m tools.bench.precision --device cpu --tiny   anywhere, to see that it runs

One process, one micro-batch a step, no recompute. Every precision trains from the same weights on the same batches;
`curve` is the largest difference of its loss from that of fp32 without TF32, as a share, over the steps behind the
first tenth. `peak` is of a whole step; `activations` is what it holds above weights, gradients and optimizer state.
Only activations shrink (low precision keeps float32 masters beside its weights), so the memory bar holds where they are
80% of the fp32 peak or more: the table says whether they are.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.config.model import ModelConfig
from megads.config.root import Config
from megads.data.corpus import Corpus
from megads.data.loader import ValidLoader
from megads.data.sequence import Batch, Packing
from megads.parallel.mesh import build_mesh
from megads.verify.batch import synthetic_batch
from tools.bench.measure import print_table, seconds_of, synchronize
from tools.bench.step import TINY, Shape, config_of, release

GPT2 = Shape(
    "gpt2", ModelConfig(family="gpt", layers=12, hidden=768, heads=12, vocab=50304), 1024, (("all", 32),)
)
# name -> precision, what float32 products are made of
MODES = (
    ("fp32", "fp32", "highest"),
    ("fp32, TF32", "fp32", "high"),
    ("bf16", "bf16", "highest"),
    ("fp16", "fp16", "highest"),
)
SPEED_BAR, MEMORY_BAR, SHARE = 2.3, 0.40, 0.80
LR = 3e-4
HEADER = ("precision", "ms", "speed-up", "peak MiB", "less", "activations MiB", "share", "last loss", "curve")


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of a step, bytes at its peak and before it (None: not known), and the loss of every step."""

    seconds: float
    peak: int | None
    state: int | None
    losses: tuple[float, ...]

    @property
    def activations(self) -> int | None:
        """Bytes that a step holds above what stays."""
        return None if self.peak is None or self.state is None else self.peak - self.state


def measure(
    config: Config, batch_of: Callable[[int], Batch], *, steps: int, repeats: int, device: torch.device
) -> Result:
    """Train `steps` steps for the curve, then time steps and take the memory of one."""
    release(device)
    mesh = build_mesh(layout_of(config, 1), 0, device=device)
    model = build_model(config, mesh, vocab=config.model.vocab or 1)
    engine = build_engine(config, model, mesh=mesh)
    executor = build_executors(config, model, mesh=mesh).train
    model.train()

    def step(batch: Batch) -> torch.Tensor:
        return train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=LR).loss

    losses = [step(batch_of(number).to(device)) for number in range(1, steps + 1)]
    last = batch_of(steps + 1).to(device)
    synchronize(device)
    peak = state = None
    if device.type == "cuda":
        release(device)
        state = torch.cuda.memory_allocated(device)
        step(last)
        peak = torch.cuda.max_memory_allocated(device)
    seconds = statistics.median(seconds_of(lambda: step(last), device, repeats=repeats))
    return Result(seconds, peak, state, tuple(loss.item() for loss in losses))


def curve(result: Result, base: Result) -> float:
    """Largest difference of two loss curves, as a share, behind the first tenth of the steps."""
    first = len(base.losses) // 10
    pairs = zip(result.losses[first:], base.losses[first:], strict=True)
    return max(abs(loss / wanted - 1.0) for loss, wanted in pairs)


def row_of(name: str, *, result: Result, base: Result) -> list[str]:
    """The table's line."""
    share = less = None
    if result.peak is not None and result.activations is not None and base.peak is not None:
        share, less = result.activations / result.peak, 1.0 - result.peak / base.peak

    def mib(size: int | None) -> str:
        return "-" if size is None else f"{size / 2**20:.0f}"

    return [
        name,
        f"{result.seconds * 1e3:.1f}",
        f"{base.seconds / result.seconds:.2f}x",
        mib(result.peak),
        "-" if less is None else f"{100 * less:.0f}%",
        mib(result.activations),
        "-" if share is None else f"{100 * share:.0f}%",
        f"{result.losses[-1]:.4f}",
        f"{100 * curve(result, base):.2f}%",
    ]


def verdicts(results: dict[str, Result]) -> list[str]:
    """What the bars say of each low precision."""
    base = results["fp32"]
    notes = []
    if base.peak is not None and base.activations is not None:
        share = base.activations / base.peak
        fits = "so the memory bar holds" if share >= SHARE else "too few for the memory bar: give more --rows"
        notes.append(f"activations are {100 * share:.0f}% of the peak of fp32, {fits}")
    for name in ("bf16", "fp16"):
        if name in results:
            speed = base.seconds / results[name].seconds
            words = f"{name}: {speed:.2f}x the speed of fp32 without TF32 (bar {SPEED_BAR}x)"
            peak = results[name].peak
            if peak is not None and base.peak is not None:
                words += f", {100 * (1 - peak / base.peak):.0f}% less memory (bar {100 * MEMORY_BAR:.0f}%)"
            notes.append(words)
    return notes


def batches(config: Config, prefix: str | None) -> Callable[[int], Batch]:
    """Step -> its batch: of a corpus in order, or made up."""
    if prefix is None:
        return lambda step: synthetic_batch(config, step, masks="whole")
    corpus = Corpus(prefix)
    loader = ValidLoader(
        corpus,
        packing=Packing(vocab_size=config.model.vocab or 1),
        sequence_length=config.data.sequence_length,
        batch_size=config.batch.global_size,
        dp_rank=0,
        dp_size=1,
    )
    return lambda step: replace(loader.batch((step - 1) % len(loader)), step=step)


def main() -> None:
    """Measure every precision and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, few steps")
    parser.add_argument("--data", metavar="PREFIX", help="a corpus; none: made-up tokens")
    parser.add_argument("--rows", type=int, help="samples of the micro-batch")
    parser.add_argument("--steps", type=int, help="of the loss curve")
    options = parser.parse_args()
    device = torch.device(options.device)
    shape = TINY[0] if options.tiny else GPT2
    num_rows = options.rows or dict(shape.rows).get("all", 4)
    steps = options.steps or (10 if options.tiny else 100)
    batch_of = batches(config_of(shape, "fp32", rows=num_rows), options.data)
    results: dict[str, Result] = {}
    rows: list[list[str]] = []
    for name, precision, products in MODES:
        if device.type == "cpu" and name in ("fp32, TF32", "fp16"):
            continue  # no TF32, and no gain
        torch.set_float32_matmul_precision(products)
        results[name] = measure(
            config_of(shape, precision, rows=num_rows),
            batch_of,
            steps=steps,
            repeats=3 if options.tiny else 10,
            device=device,
        )
        rows.append(row_of(name, result=results[name], base=results["fp32"]))
        print("  ".join(rows[-1]), flush=True)
    source = options.data or "made-up tokens"
    notes = [
        f"{shape.name}: {num_rows} rows of {shape.seq} tokens, {steps} steps of {source}",
        *verdicts(results),
    ]
    print_table(HEADER, rows, device=device, notes=notes)


if __name__ == "__main__":
    main()
