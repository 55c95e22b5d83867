"""The products of experts against the peak of this run, and a whole layer with experts: every implementation.

    python -m tools.bench.experts                       on a GPU
    python -m tools.bench.experts --device cpu --tiny   anywhere, to see that it runs

Floor: 2 x rows x in x out flops over the best rate of a large dense product in this run. Rows are dealt to experts as a
trained router deals them (a few are busy) and evenly. The layer counts router, dispatch, both products and the sum of
each token's rows, forward and backward, against the flops of the two products alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.moe import MixtureOfExperts, MoEOutput
from megads.layers.router import MoESpec
from megads.ops.grouped import GROUPED
from megads.ops.registry import force
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill, parameter_table
from tools.bench.measure import matmul_tflops, print_table, seconds_of


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: DeepSeek-V2-Lite's, Qwen3-30B-A3B's, Mixtral's."""

    name: str
    tokens: int
    hidden: int
    ffn: int
    experts: int
    per_token: int


SHAPES = (
    Shape("v2-lite", 8192, 2048, 1408, 64, 6),
    Shape("qwen3-30b", 8192, 2048, 768, 128, 8),
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
)
TINY = (Shape("tiny", 64, 32, 16, 4, 2),)


def deal(shape: Shape, *, is_skewed: bool, device: torch.device) -> Tensor:
    """Rows of each expert, [experts] int64."""
    rows = shape.tokens * shape.per_token
    weights = 1.0 / torch.arange(1, shape.experts + 1) if is_skewed else torch.ones(shape.experts)
    counts = (weights / weights.sum() * rows).long()
    counts[0] += rows - counts.sum()
    return counts.to(device)


def product_rows(
    shape: Shape, *, device: torch.device, dtype: torch.dtype, peak: float, repeats: int
) -> list[list[str]]:
    """The first product of a layer, forward and its weight's gradient, by implementation."""
    found = []
    rows, out = shape.tokens * shape.per_token, 2 * shape.ffn
    x, dy = (torch.randn(rows, width, device=device, dtype=dtype) for width in (shape.hidden, out))
    weight = torch.randn(shape.experts, out, shape.hidden, device=device, dtype=dtype)
    total = torch.zeros(weight.shape, device=device)
    for is_skewed in (False, True):
        counts = deal(shape, is_skewed=is_skewed, device=device)
        calls = {}
        for way in (i for i in GROUPED.implementations if i.accepts(x, weight, counts)):
            calls[f"y {way.name}"] = partial(way.run, x, weight, counts)
            if way.backward is not None:
                calls[f"dW {way.name}"] = partial(way.backward, total, dy, x, counts)
        for name, call in calls.items():
            rate = 2 * rows * shape.hidden * out / _median(call, device, repeats) / 1e12
            dealt = "skewed" if is_skewed else "even"
            found.append([shape.name, name, dealt, f"{rate:.4g}", f"{rate / peak:.2f}"])
    return found


def layer_rows(
    shape: Shape, *, device: torch.device, dtype: torch.dtype, peak: float, repeats: int
) -> list[list[str]]:
    """A whole layer, forward and backward, by implementation of its products."""
    spec = MoESpec(
        experts=shape.experts, per_token=shape.per_token, ffn=shape.ffn, shared_ffn=0,
        scores="softmax", renormalises=True, scaling=1.0, groups=1, groups_per_token=1, group_score="max",
        balance="sequence", balance_weight=1e-3, bias_rate=1e-3, z_weight=0.0, capacity=None,
    )  # fmt: skip
    mesh = replace(build_mesh(Layout(), 0), device=device)
    layer = MixtureOfExperts(
        Scope(mesh, dtype, 0, "mlp"), shape.hidden, spec, row=0, init_std=0.02, output_std=0.02
    )
    for parameter in parameter_table([layer]):
        fill(parameter, seed=0)
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros(parameter.shape, device=device)
    x = torch.randn(shape.tokens, 1, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    tokens = torch.zeros(1, shape.tokens, dtype=torch.int64, device=device)
    batch = Batch(
        tokens, tokens, tokens == 0, tokens, None, torch.zeros(1, dtype=torch.int64, device=device), 1
    )
    dy = torch.randn_like(x)

    def both() -> None:
        output: MoEOutput = layer(x, batch)
        assert output.balance_loss is not None
        torch.autograd.backward(
            (output.hidden, output.balance_loss), (dy, torch.ones_like(output.balance_loss))
        )

    found = []
    flops = 3 * 2 * shape.tokens * shape.per_token * shape.hidden * 3 * shape.ffn
    rows = x.detach().flatten(0, 1)
    for implementation in GROUPED.implementations:
        if not implementation.accepts(rows, layer.experts.gate_up, tokens):
            continue
        with force("grouped", implementation.name):
            seconds = _median(both, device, repeats)
        rate = flops / seconds / 1e12
        name = f"layer {implementation.name}"
        found.append(
            [shape.name, name, f"{shape.tokens / seconds:.4g} tok/s", f"{rate:.4g}", f"{rate / peak:.2f}"]
        )
    return found


def _median(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    call()
    return statistics.median(seconds_of(call, device, repeats=repeats))


def main() -> None:
    """Measure all shapes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small shape, few repeats")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    device, repeats = torch.device(options.device), 2 if options.tiny else options.repeats
    dtype = torch.float32 if options.tiny else torch.bfloat16
    size, seconds = (256, 0.05) if options.tiny else (8192, 0.7)
    peak = max(matmul_tflops(device, dtype=dtype, size=size, seconds=seconds))
    rows: list[list[str]] = []
    for shape in TINY if options.tiny else SHAPES:
        torch.manual_seed(0)
        rows += product_rows(shape, device=device, dtype=dtype, peak=peak, repeats=repeats)
        rows += layer_rows(shape, device=device, dtype=dtype, peak=peak, repeats=repeats)
    header = ("shape", "what", "rows", "TFLOP/s", "of peak")
    print_table(header, rows, device=device, notes=[f"{dtype}; dense product {peak:.4g} TFLOP/s in this run"])


if __name__ == "__main__":
    main()
