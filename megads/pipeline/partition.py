"""Deals blocks (embedding, layers, head) to stages: contiguous runs, the most expensive as cheap as possible.

    blocks     embedding  7 layers                 head           4 stages, largest cost 10
    costs      1          4   4   4   4   4   4   4   6
    stages    [1          4   4] [4   4] [4   4] [4   6]          9, 8, 8, 10

Exact: costs are compared as the rational numbers that the floats are, so no rounding decides a tie. Among all
best partitions the one with the smallest sum of squared stage costs is taken, then the one whose early stages
have fewer blocks (they hold the most activations): the answer hangs on nothing but the costs.

Where stages are placed as a V, what counts first is the most expensive *rank*, with its two stages: the one that holds
the embedding holds the head too, and layers make up for it.

    blocks     embedding  6 layers                 head           4 stages on 2 ranks, each rank 16
    costs      1          4   4   4   4   4   4     7
    stages    [1          4   4] [4   4] [4   4]  [7]             rank 0 holds the outer two, rank 1 the inner two
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from megads.errors import LayoutError

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) of each stage's blocks, in order."""


def partition(costs: Sequence[float], num_stages: int, *, is_vee: bool = False) -> Ranges:
    """Cut blocks into stages so that the most expensive stage is as cheap as possible.

    Args:
        costs: the cost of each block in order, in any one unit, finite and >= 0.
        num_stages: stages, 1 <= num_stages <= number of blocks; an even number for a V.
        is_vee: stages s and num_stages - 1 - s are on one rank: make the most expensive rank as cheap as possible, and
            of such partitions the most expensive stage.

    Returns:
        (start, stop) of each stage's blocks, in order; no stage is empty.

    Raises:
        LayoutError: more stages than blocks, or a cost that cannot be.
    """
    if not 1 <= num_stages <= len(costs):
        raise LayoutError(
            "the blocks of the model cannot fill the pipeline's stages",
            found=f"{len(costs)} blocks (embedding, layers, head), {num_stages} stages",
            allowed=f"1 to {len(costs)} stages",
            do="use fewer stages or more layers",
        )
    bad = [(index, cost) for index, cost in enumerate(costs) if not 0 <= cost < math.inf]
    if bad:
        raise LayoutError(
            f"block {bad[0][0]} has a cost that cannot be", found=bad[0][1], allowed="finite, >= 0"
        )
    sums = _prefix_sums(costs)
    if is_vee:
        return _Vee(sums, num_stages // 2).best()
    return _most_even(sums, num_stages, _least_bound(sums, num_stages))


def partition_by_layers(layers: Sequence[int]) -> Ranges:
    """Stages of the layers that a user lists: the embedding goes with the first, the head with the last.

    Args:
        layers: transformer layers of each stage, in order.

    Raises:
        LayoutError: a stage without a block.
    """
    last = len(layers) - 1
    sizes = [num + (stage == 0) + (stage == last) for stage, num in enumerate(layers)]
    if not sizes or min(sizes) < 1 or min(layers) < 0:
        raise LayoutError(
            "a stage has no block",
            found=list(layers),
            allowed="layers of each stage, >= 1; 0 beside the embedding (first stage) and the head (last)",
        )
    stops = tuple(accumulate(sizes))
    return tuple(zip((0, *stops[:-1]), stops, strict=True))


def _prefix_sums(costs: Sequence[float]) -> list[int]:
    """Cost of the first n blocks for every n, exactly, in a unit that makes all of them whole."""
    exact = [Fraction(cost) for cost in costs]
    unit = math.lcm(*(cost.denominator for cost in exact))
    return [0, *accumulate(int(cost * unit) for cost in exact)]


def _least_bound(sums: list[int], num_stages: int) -> int:
    """The least largest stage cost, by bisection: `num_stages` stages suffice under a bound or they don't."""
    low, high = max(b - a for a, b in pairwise(sums)), sums[-1]
    while low < high:
        middle = (low + high) // 2
        if _stages_needed(sums, middle) <= num_stages:
            high = middle
        else:
            low = middle + 1
    return low


def _stages_needed(sums: list[int], bound: int) -> int:
    """Stages that filling each to the bound takes (no block is above it)."""
    num_stages, start = 1, 0
    for stop in range(1, len(sums)):
        if sums[stop] - sums[start] > bound:
            num_stages, start = num_stages + 1, stop - 1
    return num_stages


def _most_even(sums: list[int], num_stages: int, bound: int) -> tuple[tuple[int, int], ...]:
    """Of all partitions within the bound that of least squares, early stages short; by dynamic programming.

    From the last stage to the first: best[start] is (sum of squares, stops of the stages) of the blocks from
    `start` on. Tuples compare in the order of what matters.
    """
    num_blocks = len(sums) - 1
    best: dict[int, tuple[int, tuple[int, ...]]] = {num_blocks: (0, ())}
    for _ in range(num_stages):
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for start in range(num_blocks):
            for stop in range(start + 1, num_blocks + 1):
                cost = sums[stop] - sums[start]
                if cost > bound:
                    break
                if stop in best:
                    candidate = (best[stop][0] + cost * cost, (stop, *best[stop][1]))
                    longer[start] = min(longer.get(start, candidate), candidate)
        best = longer
    stops = best[0][1]
    return tuple(zip((0, *stops[:-1]), stops, strict=True))


Segment = tuple[int, int]
"""Blocks [start, stop) that are not dealt yet."""


class _Vee:
    """The best partition of a V, from the outer ranks inwards: a rank takes blocks from both ends of what is left.

        blocks   0 [ start ......... stop ] n       rank r takes [start, inner start) and [inner stop, stop)

    Three passes over the same segments: the least bound of ranks; under it the least bound of stages; under both the
    least squares. (One pass for all three would be wrong: of two ways to deal the inside, the one with the cheaper rank
    may have the dearer stage, and which of both matters hangs on the outside.)
    """

    def __init__(self, sums: list[int], num_ranks: int) -> None:
        self._sums = sums
        self._num_ranks = num_ranks
        ranges = _most_even(sums, 2 * num_ranks, _least_bound(sums, 2 * num_ranks))
        stages = [sums[stop] - sums[start] for start, stop in ranges]
        bound = max(
            a + b for a, b in zip(stages, reversed(stages), strict=True)
        )  # some partition's, so enough
        self._levels: list[
            dict[Segment, list[Segment]]
        ] = []  # for each rank but the last: its segments, what it leaves
        reached = {(0, len(sums) - 1)}
        for rank in range(num_ranks - 1):
            left = num_ranks - 1 - rank
            level = {segment: self._moves(segment, left, bound) for segment in reached}
            self._levels.append(level)
            reached = {inner for moves in level.values() for inner in moves}
        self._innermost = reached

    def _cost(self, start: int, stop: int) -> int:
        return self._sums[stop] - self._sums[start]

    def _moves(self, segment: Segment, left: int, bound: int) -> list[Segment]:
        """What a rank within the bound can leave to `left` ranks within it."""
        start, stop = segment
        found = []
        for inner_start in range(start + 1, stop - 2 * left):
            if self._cost(start, inner_start) > bound:
                break
            for inner_stop in range(stop - 1, inner_start + 2 * left - 1, -1):
                if self._cost(start, inner_start) + self._cost(inner_stop, stop) > bound:
                    break
                if self._cost(inner_start, inner_stop) <= left * bound:
                    found.append((inner_start, inner_stop))
        return found

    def best(self) -> Ranges:
        rank_bound = self._least(by_rank=True, rank_bound=self._sums[-1])
        stage_bound = self._least(by_rank=False, rank_bound=rank_bound)
        values: dict[Segment, tuple[int, tuple[int, ...]]] = {}  # sum of squares, cuts
        for segment in self._innermost:
            cuts = self._cuts(segment, rank_bound, stage_bound)
            if cuts:
                values[segment] = min((self._squares(segment, (cut, cut)), (cut,)) for cut in cuts)
        for level in reversed(self._levels):
            outer: dict[Segment, tuple[int, tuple[int, ...]]] = {}
            for segment, moves in level.items():
                candidates = [
                    (
                        self._squares(segment, inner) + values[inner][0],
                        (inner[0], *values[inner][1], inner[1]),
                    )
                    for inner in moves
                    if inner in values and self._is_within(segment, inner, rank_bound, stage_bound)
                ]
                if candidates:
                    outer[segment] = min(candidates)
            values = outer
        stop = len(self._sums) - 1
        best = values[0, stop][1]
        return tuple(zip((0, *best), (*best, stop), strict=True))

    def _least(self, *, by_rank: bool, rank_bound: int) -> int:
        """The least bound of ranks, or of stages where ranks are within theirs."""
        values = {}
        for segment in self._innermost:
            whole, cuts = self._cost(*segment), range(segment[0] + 1, segment[1])
            if whole <= rank_bound:
                values[segment] = whole if by_rank else min(max(self._pair(segment, (c, c))) for c in cuts)
        for level in reversed(self._levels):
            outer = {}
            for segment, moves in level.items():
                candidates = [
                    max(values[inner], sum(pair) if by_rank else max(pair))
                    for inner in moves
                    if inner in values and sum(pair := self._pair(segment, inner)) <= rank_bound
                ]
                if candidates:
                    outer[segment] = min(candidates)
            values = outer
        return values[0, len(self._sums) - 1]

    def _pair(self, segment: Segment, inner: Segment) -> tuple[int, int]:
        """Costs of the two stages that are left when `inner` is taken out of `segment`."""
        return self._cost(segment[0], inner[0]), self._cost(inner[1], segment[1])

    def _squares(self, segment: Segment, inner: Segment) -> int:
        return sum(cost * cost for cost in self._pair(segment, inner))

    def _is_within(self, segment: Segment, inner: Segment, rank_bound: int, stage_bound: int) -> bool:
        pair = self._pair(segment, inner)
        return sum(pair) <= rank_bound and max(pair) <= stage_bound

    def _cuts(self, segment: Segment, rank_bound: int, stage_bound: int) -> list[int]:
        """Where the two stages of the innermost rank can meet."""
        inside = range(segment[0] + 1, segment[1])
        return [cut for cut in inside if self._is_within(segment, (cut, cut), rank_bound, stage_bound)]
