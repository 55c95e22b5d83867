"""Deals blocks (embedding, layers, head) to stages: contiguous runs, the most expensive as cheap as possible.

    blocks     embedding  7 layers                 head           4 stages, largest cost 10
    costs      1          4   4   4   4   4   4   4   6
    stages    [1          4   4] [4   4] [4   4] [4   6]          9, 8, 8, 10

Exact: costs are compared as the rational numbers that the floats are, so no rounding decides a tie. Among all
best partitions the one with the smallest sum of squared stage costs is taken, then the one whose early stages
have fewer blocks (they hold the most activations): the answer hangs on nothing but the costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from megads.errors import LayoutError


def partition(costs: Sequence[float], num_stages: int) -> tuple[tuple[int, int], ...]:
    """Cut blocks into stages so that the most expensive stage is as cheap as possible.

    Args:
        costs: the cost of each block in order, in any one unit, finite and >= 0.
        num_stages: stages, 1 <= num_stages <= number of blocks.

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
    return _most_even(sums, num_stages, _least_bound(sums, num_stages))


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
