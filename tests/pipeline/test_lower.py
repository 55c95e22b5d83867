"""Sends, receives and reductions: against torch's lowering, and on every transport."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Schedule
from megads.pipeline.lower import lower
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.text import parse_schedule
from megads.pipeline.verify import Transport, stuck, verify
from tests.pipeline.cases import on_ranks

SIZES = [(1, 1), (1, 4), (2, 1), (2, 5), (3, 2), (4, 8), (4, 7), (8, 3), (8, 20), (16, 33)]
THEIRS = ("LoopedBFS", "InterleavedZeroBubble")


def receives_before_use(schedule: Schedule) -> Schedule:
    """The obvious wrong lowering: every RECV just before the action that uses it."""
    rows: list[tuple[Cell, ...]] = []
    for row in schedule.rows:
        receives = {str(cell) for cell in row if isinstance(cell, Action) and cell.kind.is_receive}
        late: list[Cell] = []
        for cell in row:
            if str(cell) in receives:
                continue
            for action in cell.actions:
                kind = Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B
                receive = Action(kind, action.stage, action.micro_batch)
                if action.is_compute and action.kind is not Kind.W and str(receive) in receives:
                    late.append(receive)
            late.append(cell)
        rows.append(tuple(late))
    return replace(schedule, rows=tuple(rows))


def without_reductions(rows: tuple[tuple[Cell, ...], ...]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(tuple(cell for cell in row if not str(cell).endswith("REDUCE")) for row in rows)


@pytest.mark.parametrize(
    "name", [name for name in SCHEDULES if name != "dualpipe"]
)  # torch: one rank a stage
@pytest.mark.parametrize(("num_ranks", "num_micro_batches"), SIZES)
def test_lowering_equals_torch_and_is_proven(
    name: str, num_ranks: int, num_micro_batches: int, torch_lowered_rows: Callable[[Schedule], object]
) -> None:
    schedule = on_ranks(name, num_ranks, num_micro_batches)
    lowered = lower(schedule)
    assert without_reductions(lowered.rows) == torch_lowered_rows(schedule)
    verify(lowered)
    assert all(stuck(lowered, transport) == {} for transport in Transport)


@pytest.mark.parametrize("theirs", THEIRS)
def test_a_schedule_that_was_not_built_here_is_lowered_and_proven(
    theirs: str,
    torch_schedule: Callable[..., Schedule],
    torch_lowered_rows: Callable[[Schedule], object],
) -> None:
    schedule = torch_schedule(theirs, 4, 8, 2)
    lowered = lower(schedule)
    assert without_reductions(lowered.rows) == torch_lowered_rows(schedule)
    verify(schedule)
    verify(lowered)


def test_two_directions() -> None:
    """Each rank holds both stages and reduces both; the transports carry both directions."""
    schedule = parse_schedule(
        "schedule tiny_dualpipe\nmicro_batches 2\nplacement 0 1 | 1 0\nmax_live 2 2\n"
        "rank 0: 0F0 1F1 1B1 0B0\nrank 1: 0F1 1F0 1B0 0B1"
    )
    verify(schedule)
    for row in lower(schedule).rows:
        assert [str(cell) for cell in row if str(cell).endswith("REDUCE")] == ["1REDUCE", "0REDUCE"]


@pytest.mark.parametrize(("num_ranks", "num_micro_batches", "num_chunks"), [(2, 3, 2), (4, 8, 2), (4, 6, 3)])
def test_the_forward_half_of_interleaving_runs(
    num_ranks: int, num_micro_batches: int, num_chunks: int
) -> None:
    """As evaluation runs it: also between two ranks, where stages 0 -> 1 and 1 -> 2 go opposite ways."""
    schedule = build(
        "interleaved",
        num_stages=num_ranks * num_chunks,
        num_micro_batches=num_micro_batches,
        num_chunks=num_chunks,
    )
    rows = tuple(tuple(a for cell in row for a in cell.actions if a.kind is Kind.F) for row in schedule.rows)
    lowered = lower(replace(schedule, rows=rows))
    assert [stuck(lowered, transport) for transport in Transport] == [{}, {}, {}]
    late = receives_before_use(lowered)
    assert stuck(late, Transport.RENDEZVOUS)


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 3), (4, 8), (8, 20)])
def test_receives_just_before_use_deadlock(num_stages: int, num_micro_batches: int) -> None:
    """Why the sender writes the RECV: the same 1F1B with late receives hangs on two of three transports."""
    late = receives_before_use(
        lower(build("one_f_one_b", num_stages=num_stages, num_micro_batches=num_micro_batches))
    )
    assert stuck(late, Transport.RENDEZVOUS)
    assert stuck(late, Transport.PAIR)
    assert stuck(late, Transport.DIRECTION) == {}
    with pytest.raises(ScheduleError, match=r"deadlock on a blocking rendezvous(.|\n)*\["):
        verify(late)
    verify(receives_before_use(lower(build("gpipe", num_stages=num_stages, num_micro_batches=3))))


def test_neighbours_on_one_rank_exchange_nothing() -> None:
    schedule = parse_schedule(
        "schedule v\nmicro_batches 1\nplacement 0 1 1 0\nmax_live 2 2\n"
        "rank 0: 0F0 3F0 3B0 0B0\nrank 1: 1F0 2F0 2B0 1B0"
    )
    verify(schedule)
    names = " ".join(map(str, lower(schedule).rows[1]))
    assert names == "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2B0 2REDUCE 1B0 1SEND_B0 1REDUCE"


@pytest.mark.parametrize("name", SCHEDULES)
def test_reduce_follows_the_last_backward_of_its_stage(name: str) -> None:
    """At once after the last B or W (its message aside), once for each stage that the rank holds."""
    schedule = on_ranks(name, 4, 8)
    for rank, row in enumerate(lower(schedule).rows):
        reduced = [index for index, cell in enumerate(row) if str(cell).endswith("REDUCE")]
        assert sorted(row[index].actions[0].stage for index in reduced) == list(schedule.stages_of(rank))
        for index in reduced:
            stage = row[index].actions[0].stage
            work = [i for i, c in enumerate(row) if any(_is_backward_of(stage, a) for a in c.actions)]
            between = row[max(work) + 1 : index]
            assert max(work) < index and not any(cell.is_compute for cell in between)


def _is_backward_of(stage: int, action: Action) -> bool:
    return action.stage == stage and action.kind in (Kind.B, Kind.I, Kind.W)


def test_lowering_twice_is_refused() -> None:
    with pytest.raises(ScheduleError, match="already"):
        lower(lower(build("gpipe", num_stages=2, num_micro_batches=2)))


def test_rows_that_wait_for_each_other_are_shown() -> None:
    schedule = parse_schedule(
        "schedule knot\nmicro_batches 2\nplacement 0 1\nmax_live 2 2\n"
        "rank 0: 0F0 0B0 0F1 0B1\nrank 1: 1F0 1F1 1B0 1B1"
    )
    for prove in (lower, verify):
        with pytest.raises(ScheduleError, match=r"waits for another(.|\n)*0F0 \[0B0\](.|\n)*1F0 \[1F1\]"):
            prove(schedule)
