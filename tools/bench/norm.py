"""RMSNorm against its floor: every implementation of the op, and torch.compile of its definition, in one run.

    python -m tools.bench.norm                       on a GPU
    python -m tools.bench.norm --device cpu --tiny   anywhere, to see that it runs

Floor: bytes that must move (forward: x in, y out; with backward: x, y, x, dy, dx) over the rate of a large copy in this
run. A fraction of 1 is as fast as a copy of the same bytes. Each time is the median of CUDA graph replays, the L2 cache
flushed before each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.ops.norm import RMS_NORM
from tools.bench.measure import cold_seconds, copy_gbps, print_table

EPS = 1e-5
# rows, hidden -> fraction of the floor to reach, forward and forward + backward
BARS = (((16384, 1024), (0.80, 0.72)), ((16384, 4096), (0.93, 0.86)), ((8192, 8192), (0.94, 0.82)))
FORWARD_TENSORS, BOTH_TENSORS = 2, 5

Norm = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a forward, and of a forward with its backward."""

    forward: float
    both: float


def contestants(x: Tensor, weight: Tensor, *, with_compile: bool) -> dict[str, Norm]:
    """Every implementation that takes these tensors, and the definition compiled."""
    definition = RMS_NORM.implementations[-1].run
    found: dict[str, Norm] = {
        i.name: lambda x, w, run=i.run: run(x, w, EPS)
        for i in RMS_NORM.implementations
        if i.accepts(x, weight, EPS)
    }
    if with_compile:
        found["compile"] = torch.compile(lambda x, w: definition(x, w, EPS), dynamic=False)
    return found


def measure(norm: Norm, x: Tensor, *, weight: Tensor, dy: Tensor, repeats: int) -> Times:
    """Time one contestant."""

    def forward() -> None:
        with torch.no_grad():
            norm(x, weight)

    def both() -> None:
        torch.autograd.grad(norm(x, weight), (x, weight), dy)

    return Times(*(cold_seconds(f, x.device, repeats=repeats) for f in (forward, both)))


def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, few repeats, no torch.compile")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    repeats = 3 if options.tiny else options.repeats
    rate = copy_gbps(device, num_bytes=1 << 22 if options.tiny else 2 << 30)
    rows = []
    for (num_rows, hidden), bars in BARS:
        if options.tiny:
            num_rows, hidden = num_rows // 256, hidden // 16
        torch.manual_seed(0)
        x, dy = (torch.randn(num_rows, hidden, device=device, dtype=dtype) for _ in range(2))
        weight = torch.randn(hidden, device=device, dtype=dtype, requires_grad=True)
        x.requires_grad_()
        tensor_bytes = x.numel() * x.element_size()
        floors = [n * tensor_bytes / rate / 1e9 for n in (FORWARD_TENSORS, BOTH_TENSORS)]
        y = torch.empty_like(x)
        copied = cold_seconds(lambda y=y, x=x: y.copy_(x.detach()), device, repeats=repeats)
        rows.append(
            [f"{num_rows}x{hidden}", "(copy)", f"{copied * 1e6:.1f}", f"{floors[0] / copied:.2f}", "", "", ""]
        )
        for name, norm in contestants(x, weight, with_compile=not options.tiny).items():
            times = measure(norm, x, weight=weight, dy=dy, repeats=repeats)
            forward, both = (
                (f"{t * 1e6:.1f}", f"{f / t:.2f}")
                for f, t in zip(floors, (times.forward, times.both), strict=True)
            )
            rows.append([f"{num_rows}x{hidden}", name, *forward, *both, "{:.2f}/{:.2f}".format(*bars)])
    header = ("shape", "implementation", "f us", "of floor", "f+b us", "of floor", "bar")
    print_table(
        header, rows, device=device, notes=[f"rms_norm, {options.dtype}; copy {rate:.0f} GB/s in this run"]
    )


if __name__ == "__main__":
    main()
