"""Builders against torch's independent action lists and closed forms, and the name table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Schedule, live_counts
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.simulate import equal_costs, simulate
from megads.pipeline.text import format_schedule, read_schedule
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
        ahead = [min(p - r, m) for r in range(p)]
        assert list(schedule.max_live) == {"gpipe": [m] * p}.get(name, ahead)


def interleaved(p: int, m: int, v: int) -> Schedule:
    return build("interleaved", num_stages=p * v, num_micro_batches=m, num_chunks=v)


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
def test_interleaved_rows_equal_torch(
    p: int, num_chunks: int, torch_schedule: Callable[..., Schedule]
) -> None:
    """Whole rounds; every peak is the closed form, also where fewer micro-batches than it fit."""
    for rounds in (1, 2, 3, 5):
        m = p * rounds
        schedule, theirs = interleaved(p, m, num_chunks), torch_schedule("Interleaved1F1B", p, m, num_chunks)
        assert (schedule.rows, schedule.placement) == (theirs.rows, theirs.placement)
        assert schedule.max_live == theirs.max_live == interleaved_peaks(p, m, num_chunks)


def interleaved_peaks(p: int, m: int, v: int) -> tuple[int, ...]:
    return tuple(min(2 * (p - 1 - r) + (v - 1) * p + 1, m * v) for r in range(p))


RAGGED = [(p, m, v) for p in (2, 3, 4, 5) for v in (2, 3) for m in range(1, 3 * p) if m % p]


@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_interleaved_takes_any_number_of_micro_batches(p: int) -> None:
    """The rows of the next multiple without what is missing: proven on every transport, never worse than 1F1B."""
    random_ = random.Random(p)
    for _, m, v in (size for size in RAGGED if size[0] == p):
        schedule, whole = interleaved(p, m, v), interleaved(p, m + -m % p, v)
        verify(schedule)
        assert schedule.rows == tuple(tuple(a for a in row if a.micro_batch < m) for row in whole.rows)  # type: ignore[union-attr]
        assert sum(map(len, schedule.rows)) == 2 * p * v * m
        assert schedule.max_live == tuple(max(live_counts(row)) for row in schedule.rows)
        assert all(a <= b for a, b in zip(schedule.max_live, interleaved_peaks(p, m, v), strict=True))
        forward, backward = random_.uniform(0.1, 5), random_.uniform(0.1, 5)
        idle = simulate(schedule, equal_costs(p * v, forward=forward / v, backward=backward / v)).idle
        fill_and_drain = (p - 1) * (forward + backward)
        assert fill_and_drain / v - 1e-9 <= min(idle) and max(idle) <= fill_and_drain + 1e-9


def test_a_short_last_round_would_deadlock() -> None:
    """Why actions are dropped from whole rounds: the same rule on a last round of one micro-batch hangs."""

    def with_short_round(p: int, m: int, v: int) -> Schedule:
        rounds = [range(first, min(first + p, m)) for first in range(0, m, p)]
        order = [(chunk, i) for ms in rounds for chunk in range(v) for i in ms]
        rows = []
        for rank in range(p):
            forwards = [Action(Kind.F, chunk * p + rank, i) for chunk, i in order]
            backwards = [Action(Kind.B, (v - 1 - chunk) * p + rank, i) for chunk, i in order]
            ahead = min((v - 1) * p + 2 * (p - 1 - rank), m * v)
            pairs = zip(forwards[ahead:], backwards, strict=False)
            middle = [action for pair in pairs for action in pair]
            rows.append((*forwards[:ahead], *middle, *backwards[m * v - ahead :]))
        return replace(interleaved(p, m, v), max_live=(m * v,) * p, rows=tuple(rows))

    assert with_short_round(4, 8, 3).rows == interleaved(4, 8, 3).rows
    with pytest.raises(ScheduleError, match="every rank waits for another"):
        verify(with_short_round(4, 5, 3))
    verify(interleaved(4, 5, 3))


def test_one_chunk_a_rank_is_one_f_one_b() -> None:
    for p, m in SIZES:
        plain = build("one_f_one_b", num_stages=p, num_micro_batches=m)
        assert interleaved(p, m, 1) == replace(plain, name="interleaved")


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
        ("gpipe", (2, 2, 2), "schedule gpipe has one stage a rank(.|\n)*2 chunks"),
        ("one_f_one_b", (2, 2, 0), "schedule one_f_one_b has one stage a rank(.|\n)*0 chunks"),
        ("interleaved", (4, 2, 0), "at least one of its chunks"),
        ("interleaved", (0, 2, 2), "at least one of its stages"),
        ("interleaved", (4, 0, 2), "at least one of its micro-batches"),
        ("interleaved", (5, 2, 2), "same number of stages(.|\n)*5 stages in chunks of 2(.|\n)*multiple of 2"),
        ("interleave", (4, 2, 2), "unknown(.|\n)*did you mean interleaved"),
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
