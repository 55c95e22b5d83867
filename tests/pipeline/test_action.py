"""Text forms round-trip, and what is not one is refused with its place; the arithmetic of `Schedule`."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Overlap, Schedule, inputs_of, live_counts
from megads.pipeline.lower import lower
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.text import format_schedule, parse_cell, parse_schedule

TEXTS = ("2F0", "1B3", "1I3", "10W12", "0SEND_F2", "1RECV_F2", "1SEND_B2", "0RECV_B2", "2REDUCE", "(0F4+1B2)")

BIDIRECTIONAL = """
# two stages, each on both ranks; micro-batch 1 runs the other way
schedule tiny_dualpipe
micro_batches 2
placement 0 1 | 1 0
max_live 2 2

rank 0: 0F0 1F1 1B1 0B0
rank 1: 0F1 1F0 1B0 0B1
"""


def _row(text: str) -> tuple[Action | Overlap, ...]:
    return tuple(map(parse_cell, text.split()))


@pytest.mark.parametrize("text", TEXTS)
def test_cell_text_round_trips(text: str) -> None:
    assert str(parse_cell(text)) == text


@given(st.sampled_from(Kind), st.integers(0, 200), st.integers(0, 2000))
def test_every_action_round_trips(kind: Kind, stage: int, micro_batch: int) -> None:
    action = Action(kind, stage, 0 if kind is Kind.REDUCE else micro_batch)
    assert parse_cell(str(action)) == action


@pytest.mark.parametrize(
    "text",
    ["", "F0", "2F", "2f0", "2X0", "-1F0", "2F-1", "02F0", "2F00", "2F0 ", "2F0\n", "2REDUCE0", "2SEND0",
     "٢F0", "(0F4+1B2", "0F4+1B2", "(0F4)", "(0F4+1B2+2F1)",
     "(0F4;1B2)", "(0B4+1F2)", "(0F4+1W2)", "(0F4+1F2)"],
)  # fmt: skip
def test_bad_cell_text_is_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match="allowed"):
        parse_cell(text)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("lowered", [False, True])
def test_schedule_text_round_trips(name: str, lowered: bool) -> None:
    schedule = build(name, num_stages=4, num_micro_batches=7)
    schedule = lower(schedule) if lowered else schedule
    text = format_schedule(schedule)
    assert parse_schedule(text) == schedule
    assert format_schedule(parse_schedule(text)) == text
    assert text.count("\nrank ") == 4


def test_two_directions_round_trip_and_place_by_micro_batch() -> None:
    schedule = parse_schedule(BIDIRECTIONAL)
    assert parse_schedule(format_schedule(schedule)) == schedule
    assert [[schedule.rank_of(stage, m) for stage in (0, 1)] for m in (0, 1)] == [[0, 1], [1, 0]]
    assert schedule.stages_of(0) == schedule.stages_of(1) == (0, 1)


GOOD = {
    "schedule": "schedule mine",
    "micro_batches": "micro_batches 1",
    "placement": "placement 0 1",
    "max_live": "max_live 1 1",
    "rows": "rank 0: 0F0 0B0\nrank 1: 1F0 1B0",
}


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        ("schedule", "", "not a whole schedule(.|\n)*no line `schedule`"),
        ("schedule", "schedule two words", "one word"),
        ("schedule", "shedule mine", "mine.txt:1: unknown line"),
        ("schedule", "schedule mine\nschedule again", "mine.txt:2: line said twice"),
        ("micro_batches", "", "no line `micro_batches`"),
        ("micro_batches", "micro_batches one", "mine.txt:2: not a whole number"),
        ("micro_batches", "micro_batches 1 2", "micro_batches needs one number"),
        ("micro_batches", "micro_batches 0", "micro_batches is too small"),
        ("placement", "", "no line `placement`"),
        ("placement", "placement", "placement needs"),
        ("placement", "placement 0 2", "not the ranks that have a row"),
        ("placement", "placement 0 0", "not the ranks that have a row"),
        ("placement", "placement 0 1 | 1", "differ in stages"),
        ("placement", "placement 0 1 | 1 0", "even number of micro-batches"),
        ("placement", "placement 0 1 | 1 0 | 0 1", "one direction or two"),
        ("placement", "placement 0 -1", "mine.txt:3: not a whole number"),
        ("max_live", "max_live 1", "max_live needs one number"),
        ("max_live", "max_live 1 0", "max_live needs one number"),
        ("rows", "", "no line `rank 0: ...`"),
        ("rows", "rank 0: 0F0 0B0\nrank 2: 1F0 1B0", "mine.txt:6: rows are numbered(.|\n)*rank 1"),
        ("rows", "rank 0: 0F0 0B0\nrank 1: 1F0 1X0", "mine.txt:6: not an action(.|\n)*'1X0'"),
    ],
)
def test_bad_file_is_refused_with_its_place(line: str, text: str, message: str) -> None:
    assert parse_schedule("\n".join(GOOD.values())).num_stages == 2
    with pytest.raises(ScheduleError, match=message):
        parse_schedule("\n".join((GOOD | {line: text}).values()), source="mine.txt")


def test_partners_and_peers() -> None:
    schedule = build("gpipe", num_stages=3, num_micro_batches=2)
    for send, receive, source, target in (("0SEND_F1", "1RECV_F1", 0, 1), ("2SEND_B0", "1RECV_B0", 2, 1)):
        one, other = parse_cell(send), parse_cell(receive)
        assert isinstance(one, Action) and isinstance(other, Action)
        assert one.partner == other and other.partner == one
        assert (schedule.peer(one), schedule.peer(other)) == (target, source)


def test_inputs_of_every_kind() -> None:
    def names(kind: Kind, stage: int) -> list[str]:
        return [str(need) for need in inputs_of(Action(kind, stage, 5), 3)]

    assert names(Kind.F, 0) == []
    assert names(Kind.F, 2) == ["1F5"]
    assert names(Kind.B, 1) == names(Kind.I, 1) == ["1F5", "2B5"]
    assert names(Kind.B, 2) == ["2F5"]
    assert names(Kind.W, 1) == ["1B5"]
    assert Action(Kind.I, 1, 5).result == Action(Kind.B, 1, 5)


def test_live_counts_last_to_the_weight_gradient() -> None:
    assert live_counts(_row("0F0 0F1 0B0 0F2 0B1 0B2")) == (1, 2, 2, 2, 2, 1)
    assert live_counts(_row("0F0 0F1 0I0 0I1 0W0 0W1")) == (1, 2, 2, 2, 2, 1)
    assert live_counts(_row("0F0 (0F1+0B0) 0B1")) == (1, 2, 1)


def test_grid_marks_and_cuts() -> None:
    schedule = build("gpipe", num_stages=2, num_micro_batches=40)
    grid = schedule.grid({1: 41})
    assert "[1B1]" in grid and "..." in grid
    assert max(map(len, grid.splitlines())) <= 100
    assert schedule.grid({0: 80}).splitlines()[0].endswith("[end]")


def test_values_are_frozen() -> None:
    schedule: Schedule = build("gpipe", num_stages=2, num_micro_batches=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.name = "other"  # type: ignore[misc]
    assert hash(schedule) == hash(build("gpipe", num_stages=2, num_micro_batches=2))
