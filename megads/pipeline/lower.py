"""From compute to what a rank really does: adds SEND, RECV and REDUCE to the rows of a schedule.

The rows are walked in lock step, in an order in which every input is there before it is used. Whoever makes
a value that another rank needs writes the SEND into its own row *and the RECV into the receiver's row, at
once*:

    rank 0 | 0F0 0SEND_F0 0F1 0SEND_F1 ...              a RECV posts the buffer; the action that uses
    rank 1 | 1RECV_F0 1F0 1SEND_F0 1RECV_F1 ...         the value waits for it

So each pair of SEND and RECV took place at one moment of one order that all rows agree with. Running in that
order is possible on any transport, even one where both sides block until they meet, and the queues of both
ends of a pair name the same messages in the same order: there is no deadlock by construction. (The obvious
other place, just before the use, deadlocks under 1F1B: rank 0 sends an activation while rank 1 sends a
gradient.)

REDUCE of a stage follows its last backward work on a rank. Neighbouring stages on one rank exchange nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Schedule, inputs_of


def lower(schedule: Schedule) -> Schedule:
    """Add SEND, RECV and REDUCE to a compute-only schedule.

    Raises:
        ScheduleError: the schedule is lowered already, or its rows wait for each other for ever.
    """
    if schedule.is_lowered:
        raise ScheduleError(f"schedule {schedule.name} has its sends, receives or reductions already")
    rows: list[list[Cell]] = [[] for _ in schedule.rows]
    backward_left = _count_backward(schedule)
    for rank, cell in lock_step(schedule):
        rows[rank].append(cell)
        for action in cell.actions:
            if send := message_of(schedule, action):
                rows[rank].append(send)
                rows[schedule.peer(send)].append(send.partner)
        for action in cell.actions:
            if action.kind is not Kind.F:
                backward_left[rank, action.stage] -= 1
                if backward_left[rank, action.stage] == 0:
                    rows[rank].append(Action(Kind.REDUCE, action.stage))
    return replace(schedule, rows=tuple(map(tuple, rows)))


def message_of(schedule: Schedule, action: Action) -> Action | None:
    """The SEND that a compute action's result needs, or None if it stays on its rank."""
    if action.kind is Kind.W:
        return None
    kind = Kind.SEND_F if action.kind is Kind.F else Kind.SEND_B
    send = Action(kind, action.stage, action.micro_batch)
    if not 0 <= send.partner.stage < schedule.num_stages:
        return None
    return send if schedule.peer(send) != schedule.rank_of(action.stage, action.micro_batch) else None


def lock_step(schedule: Schedule) -> Iterator[tuple[int, Cell]]:
    """The compute cells as (rank, cell), each after all its inputs: in rounds of at most one cell a rank.

    Raises:
        ScheduleError: the rows wait for each other for ever; the message shows where each one stands.
    """
    rows = [[i for i, cell in enumerate(row) if cell.is_compute] for row in schedule.rows]
    cursors = [0] * len(rows)
    done: set[Action] = set()
    left = sum(map(len, rows))
    while left:
        before = left
        for rank, row in enumerate(rows):
            if cursors[rank] == len(row):
                continue
            cell = schedule.rows[rank][row[cursors[rank]]]
            if all(
                need in done for action in cell.actions for need in inputs_of(action, schedule.num_stages)
            ):
                done.update(action.result for action in cell.actions)
                cursors[rank] += 1
                left -= 1
                yield rank, cell
        if left == before:
            marks = {rank: row[cursors[rank]] for rank, row in enumerate(rows) if cursors[rank] < len(row)}
            raise ScheduleError(
                f"schedule {schedule.name}: every rank waits for another (marked)",
                found="\n" + schedule.grid(marks),
                do="move each marked action behind what it needs",
            )


def _count_backward(schedule: Schedule) -> dict[tuple[int, int], int]:
    """How many B, I and W each (rank, stage) has."""
    counts: dict[tuple[int, int], int] = {}
    for rank, _, cell in schedule.cells():
        for action in cell.actions:
            if action.kind is not Kind.F:
                counts[rank, action.stage] = counts.get((rank, action.stage), 0) + 1
    return counts
