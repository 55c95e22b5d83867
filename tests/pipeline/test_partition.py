"""The partition against every possible one."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest

from megads.errors import LayoutError
from megads.pipeline.partition import partition, partition_by_layers


def brute_force(costs: list[float], num_stages: int) -> tuple[tuple[int, int], ...]:
    """Least largest stage, then least squares, then the shortest early stages, over all partitions."""
    candidates = []
    for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1):
        ranges = tuple(itertools.pairwise((0, *cuts, len(costs))))
        stages = [sum(map(Fraction, costs[a:b]), Fraction(0)) for a, b in ranges]
        candidates.append((max(stages), sum(s * s for s in stages), ranges))
    return min(candidates)[2]


@pytest.mark.parametrize("kind", ["tied", "floats", "zeros", "awkward"])
def test_equals_brute_force(kind: str) -> None:
    random_ = random.Random(kind)
    draws: dict[str, Callable[[], float]] = {
        "tied": lambda: float(random_.randint(1, 3)),
        "floats": lambda: random_.random() * 10 ** random_.randint(-3, 3),
        "zeros": lambda: float(random_.randint(0, 1)),
        "awkward": lambda: random_.choice([0.1, 0.2, 0.3, 1e-300, 1e15]),
    }
    for _ in range(150):
        costs = [draws[kind]() for _ in range(random_.randint(1, 10))]
        num_stages = random_.randint(1, len(costs))
        assert partition(costs, num_stages) == brute_force(costs, num_stages), (costs, num_stages)


def brute_force_of_vee(costs: list[float], num_stages: int) -> tuple[tuple[int, int], ...]:
    """Least largest rank (stages s and num_stages - 1 - s), then as `brute_force`."""
    candidates = []
    for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1):
        ranges = tuple(itertools.pairwise((0, *cuts, len(costs))))
        stages = [sum(map(Fraction, costs[a:b]), Fraction(0)) for a, b in ranges]
        ranks = [a + b for a, b in zip(stages, reversed(stages), strict=True)]
        candidates.append((max(ranks), max(stages), sum(s * s for s in stages), ranges))
    return min(candidates)[3]


@pytest.mark.parametrize("kind", ["tied", "floats", "zeros"])
def test_a_vee_equals_brute_force(kind: str) -> None:
    random_ = random.Random(kind)
    draws: dict[str, Callable[[], float]] = {
        "tied": lambda: float(random_.randint(1, 3)),
        "floats": lambda: random_.random() * 10 ** random_.randint(-3, 3),
        "zeros": lambda: float(random_.randint(0, 1)),
    }
    for _ in range(100):
        costs = [draws[kind]() for _ in range(random_.randint(2, 10))]
        num_stages = 2 * random_.randint(1, len(costs) // 2)
        got = partition(costs, num_stages, is_vee=True)
        assert got == brute_force_of_vee(costs, num_stages), (costs, num_stages)


def test_layers_make_up_for_the_head_that_shares_a_rank_with_the_embedding() -> None:
    costs = [1.0, *[4.0] * 6, 7.0]
    assert partition(costs, 4, is_vee=True) == ((0, 3), (3, 5), (5, 7), (7, 8))
    deep = partition([2.7, *[11.1] * 126, 13.9], 32, is_vee=True)
    stages = [stop - start for start, stop in deep]
    assert sum(stages) == 128 and {a + b for a, b in zip(stages[1:16], stages[30:15:-1], strict=True)} == {8}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([3], ((0, 5),)),
        ([2, 1], ((0, 3), (3, 5))),
        ([0, 3, 0], ((0, 1), (1, 4), (4, 5))),
        ([1, 2, 3, 1], ((0, 2), (2, 4), (4, 7), (7, 9))),
    ],
)
def test_the_users_list(layers: list[int], expected: tuple[tuple[int, int], ...]) -> None:
    assert partition_by_layers(layers) == expected


@pytest.mark.parametrize("layers", [[], [1, 0, 2], [2, -1, 2]])
def test_a_list_with_an_empty_stage_is_refused(layers: list[int]) -> None:
    with pytest.raises(LayoutError, match="a stage has no block"):
        partition_by_layers(layers)


@pytest.mark.parametrize(
    ("costs", "num_stages", "expected"),
    [
        ([0.0, 1, 1, 1, 1, 0.0], 4, ((0, 2), (2, 3), (3, 4), (4, 6))),
        ([0.0, 1, 1, 1, 1, 1, 0.0], 2, ((0, 3), (3, 7))),  # uneven: the early stage gets fewer
        ([1.0, 4, 4, 4, 4, 4, 4, 4, 6], 4, ((0, 3), (3, 5), (5, 7), (7, 9))),
        ([1.0] * 9, 4, ((0, 2), (2, 4), (4, 6), (6, 9))),
        ([5.0], 1, ((0, 1),)),
    ],
)
def test_examples(costs: list[float], num_stages: int, expected: tuple[tuple[int, int], ...]) -> None:
    assert partition(costs, num_stages) == expected


def test_a_deep_model_is_covered_without_gaps() -> None:
    costs = [2.7, *[11.1] * 126, 13.9]
    ranges = partition(costs, 16)
    assert ranges[0][0] == 0 and ranges[-1][1] == len(costs) and len(ranges) == 16
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    # 113 layers beside 7 in the first stage and 6 in the last are too many for 14 stages of 8: the cheapest
    # way out is an eighth beside the embedding
    assert max(sum(costs[a:b]) for a, b in ranges) == pytest.approx(2.7 + 8 * 11.1)


@pytest.mark.parametrize(
    ("costs", "num_stages", "message"),
    [
        ([1.0, 1.0], 3, "2 blocks(.|\n)*3 stages(.|\n)*1 to 2 stages"),
        ([1.0, 1.0], 0, "1 to 2 stages"),
        ([1.0, -1.0], 1, "block 1 has a cost(.|\n)*-1.0"),
        ([math.nan, 1.0], 1, "block 0 has a cost"),
        ([1.0, math.inf], 1, "block 1 has a cost"),
    ],
)
def test_wrong_input_is_refused(costs: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        partition(costs, num_stages)
