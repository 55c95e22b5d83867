"""The oracle of the schedule tests: torch's own action lists, read into our vocabulary.

`torch.distributed.pipelining` is written independently of megads. Its private names are used here and nowhere
else (torch 2.13; `shared/facts/pipeline_schedules.md` lists the defects that are coded around).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megads.pipeline.action import Action, Cell, Kind, Overlap, Schedule, live_counts
from megads.pipeline.text import parse_cell


def _cell(action: object) -> Cell:
    """Torch's `(0F3;3B1)OVERLAP_F_B` or `2F0` as a cell."""
    text = str(action)
    if text.endswith("OVERLAP_F_B"):
        text = text.removesuffix("OVERLAP_F_B").replace(";", "+")
    return parse_cell(text)


def _shift_forwards(row: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """Undo torch's defect that the last rank of 1F1B numbers its forwards from 1."""
    return tuple(
        Action(cell.kind, cell.stage, cell.micro_batch - 1)
        if isinstance(cell, Action) and cell.kind is Kind.F
        else cell
        for cell in row
    )


def _torch_schedule(name: str, num_ranks: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

    lists = get_schedule_ops(name, num_ranks, num_micro_batches, num_chunks)
    rows = [
        tuple(_cell(a) for a in row if a is not None and not str(a).endswith("REDUCE_GRAD")) for row in lists
    ]
    if name == "1F1B":
        rows[-1] = _shift_forwards(rows[-1])
    ranks = {a.stage: rank for rank, row in enumerate(rows) for cell in row for a in cell.actions}
    return Schedule(
        name=f"torch_{name}",
        num_micro_batches=num_micro_batches,
        placement=(tuple(ranks[stage] for stage in range(num_ranks * num_chunks)),),
        max_live=tuple(max(live_counts(row)) for row in rows),
        rows=tuple(rows),
    )


def _torch_lowered_rows(schedule: Schedule) -> tuple[tuple[Cell, ...], ...]:
    from torch.distributed.pipelining.schedules import _Action, _add_send_recv

    def theirs(cell: Cell) -> Any:
        if isinstance(cell, Overlap):
            return _Action.from_str(f"({cell.forward};{cell.backward})OVERLAP_F_B")
        return _Action.from_str(str(cell))

    rows = _add_send_recv(
        {rank: [theirs(cell) for cell in row] for rank, row in enumerate(schedule.rows)},
        lambda stage: schedule.rank_of(stage, 0),
        schedule.num_stages,
    )
    return tuple(tuple(_cell(action) for action in rows[rank]) for rank in range(schedule.num_ranks))


@pytest.fixture(scope="session")
def torch_schedule() -> Callable[..., Schedule]:
    """(torch's name, ranks, micro-batches, chunks a rank) -> its compute-only schedule."""
    return _torch_schedule


@pytest.fixture(scope="session")
def torch_lowered_rows() -> Callable[[Schedule], tuple[tuple[Cell, ...], ...]]:
    """What torch makes of a compute-only schedule when it adds sends and receives."""
    return _torch_lowered_rows
