"""Text forms round-trip, and what is not one is refused with its place; torch reads our CSV and we read torch's."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Schedule
from megads.pipeline.lower import lower
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.text import (
    format_csv,
    format_schedule,
    parse_cell,
    parse_csv,
    parse_schedule,
    read_schedule,
)
from megads.pipeline.verify import verify
from tests.pipeline.cases import on_ranks

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
    schedule = on_ranks(name, 4, 8)
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
        ("rows", "rank 0: 0F0 0B0\nrank 1: 1F0 1X0", "mine.txt:6: cell 2: not an action(.|\n)*'1X0'"),
    ],
)
def test_bad_file_is_refused_with_its_place(line: str, text: str, message: str) -> None:
    assert parse_schedule("\n".join(GOOD.values())).num_stages == 2
    with pytest.raises(ScheduleError, match=message):
        parse_schedule("\n".join((GOOD | {line: text}).values()), source="mine.txt")


def torch_judges(rows: dict[int, list[Any]], num_ranks: int, num_stages: int, num_micro_batches: int) -> None:
    from torch.distributed.pipelining.schedules import _validate_schedule

    _validate_schedule(rows, num_ranks, num_stages, num_micro_batches)


def torch_loads(path: Path) -> dict[int, list[Any]]:
    """What torch's own reader of `compute_only` makes of a file."""
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti

    order: dict[int, list[Any]] = {}
    reader = SimpleNamespace(pipeline_order=order, _validate_and_set_stage_mapping=lambda order: None)
    PipelineScheduleMulti._load_csv(reader, str(path))  # type: ignore[arg-type]
    return order


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "dualpipe"])
def test_torch_accepts_our_schedules(name: str, tmp_path: Path) -> None:
    """Through the file, by torch's reader and judge; with an action or a pair dropped, torch too says no."""
    for p, m in ((2, 5), (4, 8), (8, 20)):
        schedule = on_ranks(name, p, m)
        path = tmp_path / f"{name}.csv"
        path.write_text(format_csv(schedule))
        rows = torch_loads(path)
        torch_judges(rows, p, schedule.num_stages, m)
        assert read_schedule(path) == schedule
        rows[p - 1].pop(m)
        with pytest.raises(AssertionError):
            torch_judges(rows, p, schedule.num_stages, m)


@pytest.mark.parametrize(
    ("theirs", "num_chunks"),
    [
        ("GPipe", 1),
        ("Interleaved1F1B", 2),
        ("InterleavedZeroBubble", 2),
        ("ZBVZeroBubble", 2),
        ("DualPipeV", 2),
    ],
)
def test_torchs_files_are_read(
    theirs: str, num_chunks: int, torch_schedule: Callable[..., Schedule], tmp_path: Path
) -> None:
    """Idle cells and torch's own reductions included."""
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    path = tmp_path / "from torch.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(get_schedule_ops(theirs, 4, 8, num_chunks))
    schedule, expected = read_schedule(path), torch_schedule(theirs, 4, 8, num_chunks)
    assert schedule.name == "from_torch"
    assert (schedule.rows, schedule.placement, schedule.max_live) == (
        expected.rows,
        expected.placement,
        expected.max_live,
    )
    verify(schedule)


def test_two_directions_are_read_off_a_csv() -> None:
    schedule = on_ranks("dualpipe", 4, 8)
    assert parse_csv(format_csv(schedule), source="dualpipe.csv") == schedule
    with pytest.raises(ScheduleError, match="dualpipe is lowered"):
        format_csv(lower(schedule))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mine.csv: not a schedule(.|\n)*no forward(.|\n)*0F0,0F1,0B0"),
        ("0B0\n1B0\n", "no forward"),
        ("0F0,0B0\n\n1F0,,1X0\n", "mine.csv:3: cell 3: not an action(.|\n)*'1X0'(.|\n)*2F0, 1B3"),
        ("0F0;0B0\n", "mine.csv:1: cell 1: not an action"),
        ("0F0,0B0\n1F0,1SEND_B0\n", "mine.csv:2: cell 2: not compute(.|\n)*1SEND_B0(.|\n)*F, B, I, W"),
        ("0F0,0UNSHARD\n", "mine.csv:1: cell 2: not an action"),
        ("(0B0;0F0)OVERLAP_F_B\n", "mine.csv:1: cell 1: an overlapped pair is not"),
        ("0F0,0F2,0B0,0B2\n", "mine.csv: not a whole schedule(.|\n)*no 0F1"),
        ("0F0,0F999999999999\n", "no 0F1"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0\n0F2,1F2,1F1\n", "a stage moves(.|\n)*1F1 on rank 2(.|\n)*rank 1"),
        ("0F0,0B0\n2F0,2B0\n", "no 1F0"),
        ("0F0,1F0,1B0,0B0\n,\n0B1\n", "placement are not the ranks that have a row"),
    ],
)
def test_bad_csv_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_csv(text, source="mine.csv")


def test_read_schedule(tmp_path: Path) -> None:
    schedule = build("one_f_one_b", num_stages=3, num_micro_batches=5)
    (tmp_path / "mine.txt").write_text(format_schedule(schedule))
    assert read_schedule(tmp_path / "mine.txt") == schedule
    with pytest.raises(ScheduleError, match=r"absent\.txt cannot be read"):
        read_schedule(tmp_path / "absent.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScheduleError, match="binary cannot be read"):
        read_schedule(tmp_path / "binary")
