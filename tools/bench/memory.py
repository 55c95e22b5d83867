"""What recompute, offload and the chunked loss save of a step's memory, and the time they cost, in one run.

    python -m tools.bench.memory                       a llama of 1.36e9 parameters on a GPU (about 2 minutes)
    python -m tools.bench.memory --device cpu --tiny   anywhere, to see that it runs

One process, one micro-batch a step. `kept` is what the forward leaves for the backward, `peak` the most that forward
and backward hold above weights, gradients and optimizer state (on a CPU: not known, and nothing is offloaded there).
Times are medians of whole steps; each is compared with the first row of its precision, which keeps everything. A common
claim is that recompute saves about 65% of activation memory; the row `full` is the answer for this shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.config.parallel import ParallelConfig
from megads.parallel.mesh import build_mesh
from megads.pipeline.stage import Stage
from tools.bench.measure import print_table, seconds_of, synchronize
from tools.bench.step import LLAMA1B, TINY, Shape, batches, config_of, release

CHEAP = ("norm", "activation")
# name -> keys of `parallel`; the first is what the others are compared with
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("none", {}),
    ("loss_chunk", {"loss_chunk": 2048}),
    ("norm, activation", {"recompute": CHEAP}),
    ("attention", {"recompute": ("attention",)}),
    ("mlp", {"recompute": ("mlp",)}),
    ("full", {"recompute": "full"}),
    ("full in half of the layers", {"recompute": "full", "recompute_layers": 12}),
    ("norm, activation, loss_chunk", {"recompute": CHEAP, "loss_chunk": 2048}),
    ("full, loss_chunk", {"recompute": "full", "loss_chunk": 2048}),
    ("offload, full", {"offload": True, "recompute": "full"}),
    ("offload", {"offload": True}),
)
ALWAYS = ("none", "full")  # what the others and the claim are compared with
IN_FP32 = ("none", "norm, activation", "full")
HEADER = (
    "precision",
    "recompute, offload, loss",
    "kept MiB",
    "saved",
    "peak MiB",
    "saved",
    "ms",
    "time",
    "loss",
)


@dataclass(frozen=True, slots=True)
class Result:
    """Bytes kept after the forward and at the peak above what always stays (None: not known), seconds, last loss."""

    kept: int
    peak: int | None
    seconds: float
    loss: float


def kept_on_cpu(forward: Callable[[], object], weights: set[int]) -> int:
    """Bytes that autograd keeps of a forward, parameters aside: there is no allocator to ask."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        forward()
    return sum(kept.values())


def measure(
    shape: Shape, precision: str, *, keys: dict[str, Any], rows: int, device: torch.device, repeats: int
) -> Result:
    """Build, warm up, take the memory of one forward and backward, then time whole steps."""
    release(device)
    config = dataclasses.replace(
        config_of(shape, precision, rows=rows), parallel=ParallelConfig(**fitted(shape, rows=rows, keys=keys))
    )
    mesh = build_mesh(layout_of(config, 1), 0, device=device)
    model = build_model(config, mesh, vocab=shape.vocab)
    engine = build_engine(config, model, mesh=mesh)
    executor = build_executors(config, model, mesh=mesh).train
    source = batches(shape, rows=rows, device=device)
    model.train()

    def step() -> Tensor:
        return train_step(next(source), executor=executor, engine=engine, mesh=mesh, lr=1e-4).loss

    for _ in range(2):
        loss = step()
    stage = Stage(0, list(model.stages[0]), queue=model.queue)
    batch = next(source)
    seeds = {term.name: torch.ones((), device=device) for term in model.spec.terms}

    def forward() -> None:
        stage.forward((), batch, micro_batch=0)

    peak = None
    if device.type == "cuda":
        release(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        kept = torch.cuda.memory_allocated(device) - before
        stage.backward((), seeds, micro_batch=0)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        kept = kept_on_cpu(forward, {p.untyped_storage().data_ptr() for p in model.parameters})
        stage.backward((), seeds, micro_batch=0)
    step()
    synchronize(device)
    return Result(kept, peak, statistics.median(seconds_of(step, device, repeats=repeats)), loss.item())


def fitted(shape: Shape, *, rows: int, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys in the measure of a shape: half of its layers, an eighth of its tokens."""
    sizes = {"recompute_layers": shape.model.layers // 2, "loss_chunk": max(1, rows * shape.seq // 8)}
    return {key: sizes.get(key, value) for key, value in keys.items()}


def row_of(name: str, precision: str, *, result: Result, first: Result) -> list[str]:
    """The table's line."""

    def share(value: int | None, base: int | None) -> str:
        return "-" if value is None or not base else f"{100 * (1 - value / base):.0f}%"

    return [
        precision,
        name,
        f"{result.kept / 2**20:.1f}",
        share(result.kept, first.kept),
        "-" if result.peak is None else f"{result.peak / 2**20:.1f}",
        share(result.peak, first.peak),
        f"{result.seconds * 1e3:.1f}",
        f"{100 * (result.seconds / first.seconds - 1):+.1f}%",
        f"{result.loss:.4f}",
    ]


def main() -> None:
    """Measure every variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model, few repeats")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument(
        "--variants", nargs="+", default=[name for name, _ in VARIANTS], help="beside none and full"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    shape = TINY[1] if options.tiny else LLAMA1B
    rows: list[list[str]] = []
    notes = [f"{shape.name}: sequence length {shape.seq}; `kept` and `peak` of one micro-batch"]
    for precision in options.precisions:
        num_rows = dict(shape.rows)[precision]
        chosen = [
            (name, keys)
            for name, keys in VARIANTS
            if name in (*ALWAYS, *options.variants)
            and (precision == "bf16" or name in IN_FP32)
            and (device.type == "cuda" or "offload" not in keys)
        ]
        results: dict[str, Result] = {}
        for name, keys in chosen:
            repeats = 2 if options.tiny or precision == "fp32" else 4
            results[name] = measure(
                shape, precision, keys=keys, rows=num_rows, device=device, repeats=repeats
            )
            rows.append(row_of(name, precision, result=results[name], first=results["none"]))
            print("  ".join(rows[-1]), flush=True)
        full, none = results["full"], results["none"]
        notes.append(
            f"{precision}, {num_rows} rows: full recompute saves {100 * (1 - full.kept / none.kept):.0f}% of what is "
            f"kept and takes {100 * (full.seconds / none.seconds - 1):.0f}% longer (the claim: about 65%)"
        )
    print_table(HEADER, rows, device=device, notes=notes)


if __name__ == "__main__":
    main()
