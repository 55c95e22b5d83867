"""Lengths are DeepSpeed's difficulties, and every change is found without walking the steps."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.curriculum import Constant, Curriculum, Discrete, Root, all_lengths

CASES: tuple[tuple[Curriculum, dict[str, Any]], ...] = (
    (Root(64, 1024, 100, 8), {"type": "fixed_linear"}),
    (Root(8, 512, 370, 16), {"type": "fixed_linear"}),  # the start is below the unit
    (Root(50, 333, 19, 7), {"type": "fixed_linear"}),  # the end is no multiple
    (Root(64, 1024, 100, 8, 2), {"type": "fixed_root"}),
    (Root(1, 4096, 1000, 64, 3), {"type": "fixed_root"}),
    (Discrete((64, 128, 128, 256), (5, 10, 11, 40), 512), {"type": "fixed_discrete"}),
)

# (curriculum, step) -> difficulty of deepspeed 0.19.8
GOLDEN = {
    (0, 1): 72, (0, 33): 376, (0, 99): 1008, (0, 100): 1024, (0, 5000): 1024,
    (1, 1): 16, (1, 5): 16, (1, 18): 32, (1, 369): 496, (1, 370): 512,
    (2, 1): 63, (2, 18): 315, (2, 19): 329, (2, 20): 333,
    (3, 1): 160, (3, 50): 736, (3, 100): 1024,
    (4, 1): 384, (4, 500): 3200, (4, 999): 4032,
    (5, 5): 64, (5, 6): 128, (5, 11): 128, (5, 12): 256, (5, 41): 512,
}  # fmt: skip


@pytest.mark.parametrize(("number", "step"), GOLDEN)
def test_golden_difficulties(number: int, step: int) -> None:
    assert CASES[number][0].length(step) == GOLDEN[number, step]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize(("curriculum", "options"), CASES)
def test_every_step_is_that_of_deepspeed(curriculum: Curriculum, options: dict[str, Any]) -> None:
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    if isinstance(curriculum, Discrete):
        config = {"difficulty": [*curriculum.lengths, curriculum.end], "max_step": list(curriculum.until)}
        start = curriculum.lengths[0]
    else:
        assert isinstance(curriculum, Root)
        config = {"total_curriculum_step": curriculum.steps, "difficulty_step": curriculum.unit}
        config |= {"root_degree": curriculum.degree} if options["type"] == "fixed_root" else {}
        start = curriculum.start
    scheduler = CurriculumScheduler(
        {
            "min_difficulty": start,
            "max_difficulty": curriculum.end,
            "schedule_type": options["type"],
            "schedule_config": config,
        }
    )
    for step in range(1, 1100):
        assert curriculum.length(step) == scheduler.get_difficulty(step) == scheduler.update_difficulty(step)


WALKED = 120  # a line whose end is no multiple of the unit arrives there later, as with deepspeed

curricula = st.one_of(
    st.builds(Constant, st.integers(1, 99)),
    st.tuples(
        st.integers(1, 400), st.integers(0, 400), st.integers(1, 60), st.integers(1, 40), st.integers(1, 3)
    )
    .map(lambda draw: Root(draw[0], draw[0] + draw[1], draw[2], draw[3], draw[4]))
    .filter(lambda root: -(-root.start // root.unit) * root.unit <= root.end),
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=1, max_size=5, unique_by=lambda p: p[1]
    )
    .map(lambda points: (sorted(a for a, _ in points), sorted(b for _, b in points)))
    .map(lambda points: Discrete(tuple(points[0]), tuple(points[1]), 9)),
)


@settings(max_examples=150, deadline=None)
@given(curricula)
def test_changes_are_those_of_a_walk_through_all_steps(curriculum: Curriculum) -> None:
    walked = [curriculum.length(step) for step in range(1, WALKED + 1)]
    expected = [1] + [i + 1 for i in range(1, WALKED) if walked[i] != walked[i - 1]]
    found: list[int] = []
    step: int | None = 1
    while step is not None:
        found.append(step)
        step = curriculum.next_change(step)
    assert [step for step in found if step <= WALKED] == expected
    assert all_lengths(curriculum) == tuple(curriculum.length(step) for step in found)
