"""Attention of one long row: what cutting it over ranks costs beside the ideal, an equal share of one GPU's time.

    python -m tools.bench.context                           one GPU: the blocks and merges of a rank, without transfers
    torchrun --nproc_per_node N -m tools.bench.context      N GPUs: every kind, transfers and all

Ideal is plain attention of the whole row on one GPU, measured in the same run, over the number of ranks. On one GPU the
keys of other ranks are made up, so that the difference is what many small blocks, merging and adding up cost; on many,
what transfers add and overlap does not hide. Times are forward and backward together, the median of calls in a row, of
the slowest rank.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.layers.context import Local, Row, context_attention, pack
from megads.ops.attention import Merge, attention
from megads.parallel.bootstrap import connect, device_of, disconnect
from megads.parallel.collectives import all_reduce_
from megads.parallel.layout import Layout
from megads.parallel.mesh import Group, build_mesh
from megads.parallel.parameter import ContextKind
from megads.parallel.place import discover
from tools.bench.measure import print_table, seconds_of

KINDS: tuple[ContextKind, ...] = ("ring", "all_gather", "ulysses")
HEADER = ("row", "cut", "whole ms", "ideal ms", "ms", "of ideal")
PARTS = (2, 4, 8)  # ranks that one GPU plays one of


@dataclass(frozen=True, slots=True)
class Shape:
    """One row: tokens, query and key/value heads, head size."""

    length: int
    heads: int
    kv_heads: int
    dim: int

    def __str__(self) -> str:
        return f"{self.length} x {self.heads}/{self.kv_heads} x {self.dim}"

    def draw(self, parts: int, *, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and a gradient of the output of one of `parts` ranks, as the layers lay them in memory."""
        seq = self.length // parts
        return [
            torch.randn(seq, 1, heads, self.dim, device=device, dtype=dtype).permute(1, 2, 0, 3)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.dim**-0.5)


SHAPES = (Shape(32768, 32, 8, 128), Shape(131072, 8, 8, 128))
TINY = (Shape(256, 4, 2, 8),)


def simulated(shape: Shape, parts: int, *, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of the blocks of a rank in the middle of `parts`, with its own keys for everybody's."""
    q, k, v, dout = shape.draw(parts, device=device, dtype=dtype)
    row, rank = Row(parts, shape.length, shape.scale), parts // 2

    def run() -> None:
        merge, pair, steps = Merge(q, v), pack(k, v), []
        for step in range(parts):
            block = row.meeting(rank, source=(rank - step) % parts)
            if (chosen := block.choose(q, pair)) is not None:
                merge.add(block.queries, chosen.forward(q, pair))
                steps.append(chosen)
        result = merge.result()
        local = Local(q, result.out, result.lse, dout)
        dq, dpair = (torch.zeros_like(x, dtype=torch.float32) for x in (q, pair))
        for chosen in steps:
            chosen.add(chosen.backward(local, pair), dq=dq, dpair=dpair)

    return run


def whole(shape: Shape, *, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of plain attention of the row."""
    *inputs, dout = shape.draw(1, device=device, dtype=dtype)
    leaves = [x.requires_grad_() for x in inputs]

    def run() -> None:
        torch.autograd.grad(attention(*leaves, scale=shape.scale).out, leaves, dout)

    return run


def cut(
    shape: Shape, kind: ContextKind, *, group: Group, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward and backward of this rank's part, transfers and all."""
    *inputs, dout = shape.draw(group.size, device=device, dtype=dtype)
    leaves = [x.requires_grad_() for x in inputs]

    def run() -> None:
        result = context_attention(*leaves, group=group, kind=kind, scale=shape.scale)
        torch.autograd.grad(result.out, leaves, dout)

    return run


def milliseconds(run: Callable[[], None], *, group: Group, device: torch.device, repeats: int) -> float:
    """Median of the slowest rank."""
    for _ in range(3):
        run()
    median = statistics.median(seconds_of(run, device, repeats=repeats)) * 1e3
    return all_reduce_(torch.tensor([median], device=device, dtype=torch.float64), group, op="max").item()


def rows_of(
    shapes: Sequence[Shape], *, group: Group, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[tuple[str, ...]]:
    """Measure every shape; all ranks call it together."""
    rows = []
    for shape in shapes:
        alone = milliseconds(
            whole(shape, device=device, dtype=dtype), group=group, device=device, repeats=repeats
        )
        cases: list[tuple[str, int, Callable[[], None]]]
        if group.size == 1:
            cases = [(f"blocks of {p}", p, simulated(shape, p, device=device, dtype=dtype)) for p in PARTS]
        else:
            cases = [
                (
                    f"{kind} of {group.size}",
                    group.size,
                    cut(shape, kind, group=group, device=device, dtype=dtype),
                )
                for kind in KINDS
            ]
        for name, parts, run in cases:
            took = milliseconds(run, group=group, device=device, repeats=repeats)
            ideal = alone / parts
            figures = (f"{alone:.2f}", f"{ideal:.2f}", f"{took:.2f}", f"{100 * ideal / took:.0f}%")
            rows.append((str(shape), name, *figures))
    return rows


def main() -> None:
    """Measure and print the table from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="cpu or cuda; default: what is there")
    parser.add_argument("--tiny", action="store_true", help="small shapes, few repeats")
    options = parser.parse_args()
    place = discover()
    device = torch.device(options.device) if options.device else device_of(place)
    connect(place, timeout=120, device=device)
    group = build_mesh(Layout(context=place.world_size), place.rank, device=device).group("cp")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    rows = rows_of(
        TINY if options.tiny else SHAPES,
        group=group,
        device=device,
        dtype=dtype,
        repeats=3 if options.tiny else 10,
    )
    if place.rank == 0:
        print_table(HEADER, rows, device=device)
    disconnect()


if __name__ == "__main__":
    main()
