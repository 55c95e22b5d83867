"""Builders against torch's independent action lists and closed forms, and the name table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Overlap, Schedule, live_counts
from megads.pipeline.schedules import SCHEDULES, build, placement_of
from megads.pipeline.simulate import equal_costs, simulate
from megads.pipeline.verify import verify
from tests.pipeline.cases import chunks_of, is_legal, on_ranks

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


@pytest.mark.parametrize(("name", "theirs"), [("zbv", "ZBVZeroBubble"), ("dualpipe_v", "DualPipeV")])
def test_rows_of_a_vee_equal_torch(name: str, theirs: str, torch_schedule: Callable[..., Schedule]) -> None:
    compared = 0
    for p, m in [*(size for size in SIZES if size[0] < 16), (16, 35)]:
        if theirs == "DualPipeV" and m < 2 * p:  # torch refuses fewer micro-batches than stages
            continue
        schedule, other = on_ranks(name, p, m), torch_schedule(theirs, p, m, 2)
        assert (schedule.rows, schedule.placement) == (other.rows, other.placement)
        compared += 1
    assert compared >= 25


PEAKS: dict[str, Callable[[int, int, int], int]] = {
    "gpipe": lambda p, r, m: m,
    "one_f_one_b": lambda p, r, m: min(p - r, m),
    "interleaved": lambda p, r, m: interleaved_peaks(p, m, 2)[r],
    "zero_bubble_h1": lambda p, r, m: min(p, m),
    "zero_bubble_h2": lambda p, r, m: min(2 * p - 1, m),
    "zbv": lambda p, r, m: 2 * p,
    "dualpipe_v": lambda p, r, m: 2 * p + 1,
    "dualpipe": lambda p, r, m: p + 1,
}
"""Most live activations of a stage on rank r, as published; for the last three the most of any rank, for m >= 2p."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_declared_bounds_are_tight_and_the_published_peaks(name: str) -> None:
    compared = 0
    for p, m in SIZES:
        if not is_legal(name, p, m):
            continue
        schedule = on_ranks(name, p, m)
        assert schedule.max_live == tuple(max(live_counts(row)) for row in schedule.rows)
        if name == "interleaved" and m % p:
            continue
        if name in ("zbv", "dualpipe_v", "dualpipe"):
            if m >= 2 * p and p > 1:
                assert max(schedule.max_live) == PEAKS[name](p, 0, m)
                compared += 1
        else:
            assert list(schedule.max_live) == [PEAKS[name](p, r, m) for r in range(p)]
            compared += 1
    assert compared >= 6


H1 = (
    "0F0 0F1 0F2 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3",
    "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
    "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
)
H2 = (
    "0F0 0F1 0F2 0F3 0F4 0I0 0W0 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4",
    "1F0 1F1 1F2 1I0 1F3 1I1 1F4 1I2 1W0 1I3 1W1 1I4 1W2 1W3 1W4",
    "2F0 2I0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2W0 2W1 2W2 2W3 2W4",
)


def test_zero_bubble_rows_are_those_of_the_paper() -> None:
    """As in its figures 2 and 3: 1F1B's order with I for B, W late by the rank (H2: by twice the rank)."""
    for name, m, expected in (("zero_bubble_h1", 4, H1), ("zero_bubble_h2", 5, H2)):
        assert tuple(" ".join(map(str, row)) for row in on_ranks(name, 3, m).rows) == expected


def test_dualpipe_is_two_dualpipe_v_that_face_each_other() -> None:
    """Rank r of the upper half does what DualPipeV's rank r does; rank p - 1 - r the same with directions exchanged."""
    for p, m in ((2, 6), (4, 10), (8, 16), (6, 4)):
        schedule, vee = on_ranks("dualpipe", p, m), on_ranks("dualpipe_v", p // 2, m // 2)
        for rank in range(p // 2):
            mirrored = tuple(_exchange(cell, m // 2) for cell in schedule.rows[p - 1 - rank])
            assert mirrored == schedule.rows[rank]
            plain = [_of_one_direction(cell, p, m // 2) for cell in schedule.rows[rank]]
            assert plain == [str(cell) for cell in vee.rows[rank]]
        assert all(schedule.stages_of(rank) == schedule.stages_of(p - 1 - rank) for rank in range(p))


def _exchange(cell: Cell, half: int) -> Cell:
    """The cell with the two halves of the micro-batches exchanged."""

    def exchange(action: Action) -> Action:
        return replace(action, micro_batch=(action.micro_batch + half) % (2 * half))

    if isinstance(cell, Overlap):
        return Overlap(exchange(cell.forward), exchange(cell.backward))
    return exchange(cell)


def _of_one_direction(cell: Cell, p: int, half: int) -> str:
    """The cell's text with micro-batches of either direction counted from 0."""
    texts = [f"{a.stage}{a.kind.value}{a.micro_batch % half}" for a in cell.actions]
    return texts[0] if len(texts) == 1 else f"({texts[0]}+{texts[1]})"


@pytest.mark.parametrize("name", ["zbv", "dualpipe_v", "dualpipe"])
def test_fewer_micro_batches_than_a_full_pipeline_are_what_is_left_of_it(name: str) -> None:
    for p in (2, 4, 6):
        for m in range(2, 2 * p, 2):
            short = on_ranks(name, p, m)
            verify(short)
            assert {a.micro_batch for _, _, cell in short.cells() for a in cell.actions} == set(range(m))


@pytest.mark.parametrize("name", SCHEDULES)
def test_placement_of_the_table_is_that_of_the_builder(name: str) -> None:
    for p in (2, 4):
        chunks = chunks_of(name)
        assert on_ranks(name, p, 8).placement[0] == placement_of(name, num_ranks=p, num_chunks=chunks)


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
        ("zbv", (4, 2, 1), "schedule zbv has two stages a rank(.|\n)*1 chunk(.|\n)*2 chunks"),
        ("dualpipe_v", (5, 2, 2), "dualpipe_v holds two stages on every rank(.|\n)*5 stages(.|\n)*even"),
        ("zbv", (0, 2, 2), "at least one of its stages"),
        ("zero_bubble_h1", (2, 0, 1), "at least one of its micro-batches"),
        ("dualpipe", (3, 2, 1), "one half of its ranks to each(.|\n)*3 ranks(.|\n)*4 or 2"),
        (
            "dualpipe",
            (4, 1, 1),
            "one half of its micro-batches(.|\n)*1 micro-batches(.|\n)*an even number: 2$",
        ),
    ],
)
def test_wrong_requests_are_refused(name: str, counts: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(name, num_stages=counts[0], num_micro_batches=counts[1], num_chunks=counts[2])
