"""Builders against torch's independent action lists, and the name table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megads.errors import ScheduleError
from megads.pipeline.action import Schedule, format_schedule, live_counts
from megads.pipeline.schedules import SCHEDULES, build, read_schedule
from megads.pipeline.verify import verify

SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8, 16) for m in (1, 2, 3, 4, 5, 7, 8, 16, 19)]


@pytest.mark.parametrize(("name", "theirs"), [("gpipe", "GPipe"), ("one_f_one_b", "1F1B")])
def test_rows_equal_torch(name: str, theirs: str, torch_schedule: Callable[..., Schedule]) -> None:
    compared = 0
    for p, m in SIZES:
        if theirs == "1F1B" and m < p:  # torch refuses fewer micro-batches than stages
            continue
        assert build(name, num_stages=p, num_micro_batches=m).rows == torch_schedule(theirs, p, m).rows
        compared += 1
    assert compared >= 36


@pytest.mark.parametrize("num_stages", [2, 3, 8])
def test_one_f_one_b_with_fewer_micro_batches_than_stages(num_stages: int) -> None:
    """Below p micro-batches a rank that never gets full runs as far ahead as there are micro-batches."""
    for m in range(1, num_stages):
        short = build("one_f_one_b", num_stages=num_stages, num_micro_batches=m)
        verify(short)
        for stage, row in enumerate(short.rows):
            ahead = min(num_stages - stage, m)
            assert [str(cell) for cell in row[: ahead + 1]] == [f"{stage}F{i}" for i in range(ahead)] + [
                f"{stage}B0"
            ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_declared_bounds_are_tight(name: str) -> None:
    for p, m in SIZES:
        schedule = build(name, num_stages=p, num_micro_batches=m)
        assert schedule.max_live == tuple(max(live_counts(row)) for row in schedule.rows)
        expected = {"gpipe": [m] * p, "one_f_one_b": [min(p - r, m) for r in range(p)]}[name]
        assert list(schedule.max_live) == expected


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = SCHEDULES["gpipe"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "counts", "message"),
    [
        ("gpip", (2, 2, 1), "unknown(.|\n)*allowed: gpipe, one_f_one_b(.|\n)*did you mean gpipe"),
        ("1f1b_flush", (2, 2, 1), "unknown"),
        ("gpipe", (0, 2, 1), "at least one of its stages"),
        ("one_f_one_b", (2, 0, 1), "at least one of its micro-batches"),
        ("one_f_one_b", (2, -3, 1), "at least one of its micro-batches"),
        ("gpipe", (2, 2, 2), "one stage a rank(.|\n)*2 chunks"),
    ],
)
def test_wrong_requests_are_refused(name: str, counts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(name, num_stages=counts[0], num_micro_batches=counts[1], num_chunks=counts[2])


def test_read_schedule(tmp_path: Path) -> None:
    schedule = build("one_f_one_b", num_stages=3, num_micro_batches=5)
    (tmp_path / "mine.txt").write_text(format_schedule(schedule))
    assert read_schedule(tmp_path / "mine.txt") == schedule
    with pytest.raises(ScheduleError, match=r"absent\.txt cannot be read"):
        read_schedule(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match="binary cannot be read"):
        read_schedule(tmp_path / "binary")
