"""A whole training step on one device: megads, and a plain compiled torch model of equal shape, in one run.

    python -m tools.bench.step                       both shapes, bf16 and fp32, on a GPU (about 5 minutes)
    python -m tools.bench.step --device cpu --tiny   anywhere, to see that it runs

A step is forward, backward, clipping and AdamW on random tokens, without recompute; its time is the median.
Model flops a token: causal 6 N + 6 L h s, full 6 N + 12 L h s (N weights in products, L layers, h hidden, s sequence).
MFU is of the card's data sheet: bf16 dense, or fp32 without tensor cores; the ceilings measured between the runs stand
above the table.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.root import Config
from megads.config.run import RunConfig
from megads.data.sequence import Batch
from megads.model.catalog import describe
from megads.optim.precision import COMPUTE_DTYPES
from megads.parallel.mesh import build_mesh
from megads.train.metrics import peak_memory, peak_tflops
from tools.bench.measure import Ceilings, ceilings, print_table, seconds_of, synchronize
from tools.bench.plain import PlainShape, PlainTrainer

FP32_TFLOPS = (("H200", 67.0), ("H100", 67.0), ("A100", 19.5))  # data sheets, without tensor cores


@dataclass(frozen=True, slots=True)
class Shape:
    """A model, its sequence length, and rows of a step by precision."""

    name: str
    model: ModelConfig
    seq: int
    rows: tuple[tuple[str, int], ...]

    @property
    def vocab(self) -> int:
        """Token ids."""
        return self.model.vocab or 0


GPT2M = Shape(
    "gpt2m",
    ModelConfig(family="gpt", layers=24, hidden=1024, heads=16, vocab=50304),
    1024,
    (("bf16", 32), ("fp32", 16)),
)
LLAMA1B = Shape(
    "llama1b",
    ModelConfig(family="llama", layers=24, hidden=2048, heads=16, ffn=5632, vocab=32000),
    4096,
    (("bf16", 4), ("fp32", 2)),
)
TINY = tuple(
    Shape(
        f"tiny-{family}",
        ModelConfig(family=family, layers=2, hidden=32, heads=2, ffn=48, vocab=64),
        16,
        (("bf16", 2), ("fp32", 2)),
    )
    for family in ("gpt", "llama")
)


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of each step, peak bytes, rows of a step and the last loss."""

    seconds: tuple[float, ...]
    peak_bytes: int
    rows: int
    loss: float


def config_of(shape: Shape, precision: str, *, rows: int) -> Config:
    """A run of one process and one micro-batch a step."""
    return Config(
        run=RunConfig(steps=1000),
        model=shape.model,
        batch=BatchConfig(global_size=rows, micro=rows),
        data=DataConfig(train="random", tokenizer="none", sequence_length=shape.seq),
        optim=OptimConfig(lr=1e-4, clip=1.0, precision=precision),
    )


def batches(shape: Shape, *, rows: int, device: torch.device) -> Iterator[Batch]:
    """Random tokens, another batch each time."""
    generator = torch.Generator(device).manual_seed(1)
    step = 0
    while True:
        step += 1
        drawn = torch.randint(shape.vocab, (rows, shape.seq + 1), generator=generator, device=device)
        yield Batch(
            tokens=drawn[:, :-1].contiguous(),
            labels=drawn[:, 1:].contiguous(),
            mask=torch.ones(rows, shape.seq, dtype=torch.bool, device=device),
            positions=torch.arange(shape.seq, device=device).expand(rows, -1),
            document_ids=None,
            samples=torch.arange(rows, device=device),
            step=step,
        )


def megads_step(
    shape: Shape, precision: str, *, rows: int, device: torch.device
) -> Callable[[], torch.Tensor]:
    """One step of megads' own parts, as the trainer runs it; returns the loss."""
    config = config_of(shape, precision, rows=rows)
    mesh = build_mesh(layout_of(config, 1), 0, device=device)
    model = build_model(config, mesh, vocab=shape.vocab)
    engine = build_engine(config, model, mesh=mesh)
    executor = build_executors(config, model, mesh=mesh).train
    source = batches(shape, rows=rows, device=device)
    model.train()
    return lambda: train_step(next(source), executor=executor, engine=engine, mesh=mesh, lr=1e-4).loss


def plain_step(
    shape: Shape, precision: str, *, rows: int, device: torch.device, with_compile: bool
) -> Callable[[], torch.Tensor]:
    """One step of the plain torch model; returns the loss."""
    model = shape.model
    sizes = PlainShape(
        is_llama=model.family == "llama",
        layers=model.layers,
        hidden=model.hidden,
        heads=model.heads,
        ffn=model.ffn or 4 * model.hidden,
        vocab=shape.vocab,
        seq=shape.seq,
    )
    trainer = PlainTrainer(sizes, COMPUTE_DTYPES[precision], device=device, with_compile=with_compile)
    source = batches(shape, rows=rows, device=device)

    def step() -> torch.Tensor:
        batch = next(source)
        return trainer.step(batch.tokens, batch.labels)

    return step


def run(
    make: Callable[..., Callable[[], torch.Tensor]], *, rows: int, device: torch.device, repeats: int
) -> Result:
    """Build, warm up and time; with half the rows, said aloud, where memory does not suffice."""
    while True:
        try:
            step = make(rows=rows)
            release(device)  # what only building needed
            for _ in range(3):
                loss = step()
            synchronize(device)
            return Result(seconds_of(step, device, repeats=repeats), peak_memory(device), rows, loss.item())
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        rows //= 2
        step = None
        release(device)
        print(f"out of memory: again with {rows} rows", flush=True)


def release(device: torch.device) -> None:
    """Give cached memory back and start counting its peak anew."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def profile(step: Callable[[], torch.Tensor], *, device: torch.device) -> None:
    """Print where the device time of two steps goes."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(2):
            step()
        synchronize(device)
    print(
        trace.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=70)
    )


def data_sheet(device: torch.device, precision: str) -> float | None:
    """Peak TFLOP/s of the card; None where it is not known."""
    if device.type != "cuda":
        return None
    if precision == "bf16":
        return peak_tflops(device, dtype=torch.bfloat16)
    return next((peak for part, peak in FP32_TFLOPS if part in torch.cuda.get_device_name(device)), None)


def row_of(result: Result, name: str, *, shape: Shape, precision: str, device: torch.device) -> list[str]:
    """The table's line."""
    spec = describe(shape.model, vocab=shape.vocab, sequence_length=shape.seq)
    causal = spec.flops_per_token(shape.seq)
    full = spec.flops(1.0, pairs=shape.seq)
    seconds = statistics.median(result.seconds)
    rate = result.rows * shape.seq / seconds
    peak = data_sheet(device, precision)
    shares = "-" if peak is None else "/".join(f"{100 * rate * f / 1e12 / peak:.1f}" for f in (causal, full))
    spread = (max(result.seconds) - min(result.seconds)) / seconds
    return [
        f"{shape.name} {precision}",
        name,
        str(result.rows),
        f"{seconds * 1e3:.1f}",
        f"{100 * spread:.0f}%",
        f"{rate:.0f}",
        f"{rate * causal / 1e12:.1f}",
        shares,
        f"{result.peak_bytes / 2**30:.1f}",
        f"{result.loss:.3f}",
    ]


HEADER = ("model", "what", "rows", "ms", "spread", "tokens/s", "TFLOP/s", "MFU causal/full %", "GiB", "loss")


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, few repeats")
    parser.add_argument("--shapes", nargs="+", default=["gpt2m", "llama1b"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument(
        "--compiled-in", nargs="*", default=["bf16"], help="precisions of the plain compiled model"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of megads' bf16 steps goes"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    shapes = TINY if options.tiny else tuple(s for s in (GPT2M, LLAMA1B) if s.name in options.shapes)
    found: list[Ceilings] = []
    rows: list[list[str]] = []
    for shape in shapes:
        for precision in options.precisions:
            found.append(ceilings(device, tiny=options.tiny))
            num_rows = dict(shape.rows)[precision]
            repeats = 2 if options.tiny else 12 if precision == "bf16" else 4
            makers = {
                "megads": lambda rows, s=shape, p=precision: megads_step(s, p, rows=rows, device=device)
            }
            if precision in options.compiled_in:
                makers["plain, compiled" if not options.tiny else "plain"] = (
                    lambda rows, s=shape, p=precision: plain_step(
                        s, p, rows=rows, device=device, with_compile=not options.tiny
                    )
                )
            for name, make in makers.items():
                release(device)
                result = run(make, rows=num_rows, device=device, repeats=repeats)
                rows.append(row_of(result, name, shape=shape, precision=precision, device=device))
                print("  ".join(rows[-1]), flush=True)
            if options.profile and precision == "bf16":
                profile(makers["megads"](num_rows), device=device)
    found.append(ceilings(device, tiny=options.tiny))
    merged = Ceilings(tuple(t for c in found for t in c.matmul_tflops), max(c.copy_gbps for c in found))
    print_table(
        HEADER,
        rows,
        device=device,
        notes=[f"{merged} in this run; median step, {len(found)} readings of the ceilings"],
    )


if __name__ == "__main__":
    main()
