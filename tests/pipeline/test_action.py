"""The arithmetic of actions and of `Schedule`."""

from __future__ import annotations

import dataclasses

import pytest

from megads.pipeline.action import Action, Kind, Overlap, Schedule, inputs_of, live_counts
from megads.pipeline.schedules import build
from megads.pipeline.text import parse_cell


def _row(text: str) -> tuple[Action | Overlap, ...]:
    return tuple(map(parse_cell, text.split()))


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
