"""How a logical tensor is cut: one declaration a parameter, and the arithmetic that everything reads from it.

Initialisation, gradient norms, ZeRO, checkpoints and planning all ask here; nobody keeps a second table. No torch.

A fused weight is cut part by part, so that every rank holds its share of each part. qkv with blocks (q=4, k=2, v=2)
over two ranks:

    global rows   q0 q1 q2 q3 | k0 k1 | v0 v1
    rank 0        q0 q1       | k0    | v0        local rows 0..3
    rank 1              q2 q3 |    k1 |    v1     local rows 0..3

so one local tensor is a list of `Region`s, each a global box and the local box that holds it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from megads.errors import LayoutError

Shape = tuple[int, ...]

EXPERT_AXES = ("ep", "etp")

Role = Literal["hidden", "embedding", "router"]


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open box of indices: `start[d] <= i[d] < stop[d]`."""

    start: Shape
    stop: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Box:
        """The box of a whole tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def shape(self) -> Shape:
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None if there is no common element."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(a < b for a, b in zip(start, stop, strict=True)) else None

    def shift(self, offset: Shape) -> Box:
        """The box moved by `offset`."""
        return Box(
            tuple(a + o for a, o in zip(self.start, offset, strict=True)),
            tuple(b + o for b, o in zip(self.stop, offset, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a local tensor and where it lies in the global one; both boxes have the same shape."""

    source: Box  # global
    local: Box
    block: int  # number of the fused part it belongs to


@dataclass(frozen=True, slots=True)
class Cut:
    """One dim cut over one mesh axis.

    Args:
        dim: dimension of the global tensor.
        axis: mesh axis that cuts it ("tp", ...).
        blocks: sizes of the fused parts along `dim`, cut one by one; empty: one part.
        pad: whether the last ranks may hold fewer real rows than the others (vocabulary); the local tensor is
            then filled up with zeros, which are in no norm and in no checkpoint.
    """

    dim: int
    axis: str
    blocks: tuple[int, ...] = ()
    pad: bool = False


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: normal with mean 0 and deviation `std`, or constant."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@dataclass(frozen=True, slots=True)
class ShardSpec:
    """The one declaration of a parameter.

    Args:
        shape: global, unpadded shape.
        cuts: how mesh axes cut it; at most one cut a dim.
        init: how it starts.
        partial: axes, beside the data-parallel ones, over which each rank's gradient is only a part of the sum.
        decay: whether weight decay applies: biases, norms and other vectors have none.
        role: what a matrix does, for optimizers that ask: "hidden" turns activations into activations, "embedding" is
            one of tokens or positions, or an output head, "router" scores experts.
        tie: logical name of the parameter that this one is a copy of; None: it stands for itself.
    """

    shape: Shape
    cuts: tuple[Cut, ...] = ()
    init: Init = Init("zeros")
    partial: tuple[str, ...] = ()
    decay: bool = True
    role: Role = "hidden"
    tie: str | None = None

    @property
    def size(self) -> int:
        """Number of elements of the global tensor."""
        return math.prod(self.shape)

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes that cut it."""
        return frozenset(cut.axis for cut in self.cuts)

    @property
    def is_expert(self) -> bool:
        """Whether it lies in the experts' grid (ep x etp x edp) and not in the grid of all else (tp x dp_cp)."""
        return not self.axes.isdisjoint(EXPERT_AXES)

    @property
    def reduction(self) -> str:
        """The axis whose ranks hold the same part of it: gradients are summed over it and ZeRO cuts along it."""
        return "edp" if self.is_expert else "dp_cp"

    @property
    def replicas(self) -> tuple[str, ...]:
        """Axes, beside `reduction`, whose ranks hold the same values because no cut is along them."""
        grid = EXPERT_AXES if self.is_expert else ("tp",)
        return tuple(axis for axis in grid if axis not in self.axes)


@dataclass(frozen=True, slots=True)
class _Interval:
    """One part of one dim: global start, local start, length, block number."""

    source: int
    local: int
    length: int
    block: int


def local_shape(spec: ShardSpec, sizes: Mapping[str, int], *, name: str) -> Shape:
    """Shape of one rank's (padded) tensor under group sizes `sizes` (axis -> number of ranks).

    Raises:
        LayoutError: a cut that does not come out even, with parameter, dim, axis and the legal sizes.
    """
    shape = list(spec.shape)
    for cut in spec.cuts:
        shape[cut.dim] = sum(
            _block_share(spec, cut, size, sizes[cut.axis], name) for size in _blocks(spec, cut)
        )
    return tuple(shape)


def regions(
    spec: ShardSpec, sizes: Mapping[str, int], *, ranks: Mapping[str, int], name: str
) -> tuple[Region, ...]:
    """What the rank at `ranks` (axis -> rank in that axis) holds: regions in local order, padding left out."""
    per_dim: list[list[_Interval]] = [[_Interval(0, 0, n, 0)] for n in spec.shape]
    for cut in spec.cuts:
        per_dim[cut.dim] = _cut_intervals(spec, cut, sizes[cut.axis], ranks[cut.axis], name)
    found = []
    for parts in itertools.product(*per_dim):
        source = tuple(p.source for p in parts)
        local = tuple(p.local for p in parts)
        shape = tuple(p.length for p in parts)
        if math.prod(shape):
            found.append(
                Region(
                    Box(source, tuple(map(sum, zip(source, shape, strict=True)))),
                    Box(local, tuple(map(sum, zip(local, shape, strict=True)))),
                    max((p.block for p in parts), default=0),
                )
            )
    return tuple(found)


def _blocks(spec: ShardSpec, cut: Cut) -> tuple[int, ...]:
    return cut.blocks or (spec.shape[cut.dim],)


def _block_share(spec: ShardSpec, cut: Cut, block: int, size: int, name: str) -> int:
    """Local length of one fused part."""
    if block % size and not cut.pad:
        legal = [n for n in range(1, min(block, 4096) + 1) if all(b % n == 0 for b in _blocks(spec, cut))]
        raise LayoutError(
            f"parameter {name} of shape {spec.shape} cannot be cut evenly: "
            f"dim {cut.dim} in parts {_blocks(spec, cut)} over axis {cut.axis}",
            found=f"{size} ranks",
            allowed=f"{cut.axis} of size {', '.join(map(str, legal))}",
        )
    return -(-block // size)


def _cut_intervals(spec: ShardSpec, cut: Cut, size: int, rank: int, name: str) -> list[_Interval]:
    intervals, source, local = [], 0, 0
    for number, block in enumerate(_blocks(spec, cut)):
        share = _block_share(spec, cut, block, size, name)
        start = min(rank * share, block)
        intervals.append(_Interval(source + start, local, min(share, block - start), number))
        source += block
        local += share
    return intervals


def block_box(spec: ShardSpec, block: int) -> Box:
    """The global box of fused part number `block` (the whole tensor if there is only one)."""
    whole = Box.whole(spec.shape)
    for cut in spec.cuts:
        if len(cut.blocks) > 1:
            start = sum(cut.blocks[:block])
            lower, upper = list(whole.start), list(whole.stop)
            lower[cut.dim], upper[cut.dim] = start, start + cut.blocks[block]
            return Box(tuple(lower), tuple(upper))
    return whole


def boxes_of_range(shape: Shape, *, start: int, stop: int) -> Iterator[Box]:
    """Cut the flat, row-major range [start, stop) of a tensor into boxes, in order.

    A range of a matrix is at most a part of a row, whole rows, and a part of a row:

        . . # #      [2, 11) of a 3 x 4 tensor
        # # # #
        # # # .
    """
    if start >= stop:
        return
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = start // row, (stop - 1) // row
    head = start - first * row
    tail = stop - last * row
    if first == last and (head or tail < row):
        yield from (_prefix(first, box) for box in boxes_of_range(shape[1:], start=head, stop=tail))
        return
    if head:
        yield from (_prefix(first, box) for box in boxes_of_range(shape[1:], start=head, stop=row))
        first += 1
    whole = last if tail < row else last + 1
    if first < whole:
        yield Box((first, *(0 for _ in shape[1:])), (whole, *shape[1:]))
    if tail < row and first <= last:
        yield from (_prefix(last, box) for box in boxes_of_range(shape[1:], start=0, stop=tail))


def _prefix(index: int, box: Box) -> Box:
    return Box((index, *box.start), (index + 1, *box.stop))
