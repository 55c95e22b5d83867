"""The vocabulary of pipeline schedules: actions, and one row of them a rank.

A schedule is data. Each rank runs its row from left to right; ranks wait for each other only where a value
that crosses a stage boundary has not arrived yet (one_f_one_b, 3 stages, 3 micro-batches):

    rank 0 | 0F0 0F1 0F2             0B0     0B1     0B2        2F0  forward of stage 2 on micro-batch 0
    rank 1 |     1F0 1F1     1B0 1F2     1B1     1B2            1B2  backward of stage 1 on micro-batch 2
    rank 2 |         2F0 2B0 2F1     2B1 2F2 2B2                (blanks are waiting; they are not written)

Schedules are built in `schedules.py`, read and written in `text.py`, get their sends and receives in `lower.py` and
their proof in `verify.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from megads.errors import ScheduleError


class Kind(Enum):
    """What an action does; the value is its text."""

    F = "F"
    """Forward."""
    B = "B"
    """Whole backward: the gradients of the input and of the weights."""
    I = "I"
    """Backward of the input alone."""
    W = "W"
    """Backward of the weights alone, after I."""
    SEND_F = "SEND_F"
    """Start sending this stage's output activation to the next stage."""
    RECV_F = "RECV_F"
    """Post the receive of this stage's input activation; whoever uses it waits for it."""
    SEND_B = "SEND_B"
    """Start sending the gradient of this stage's input to the stage before."""
    RECV_B = "RECV_B"
    """Post the receive of the gradient of this stage's output; whoever uses it waits for it."""
    REDUCE = "REDUCE"
    """Start reducing this stage's weight gradients over its data-parallel copies."""

    @property
    def is_compute(self) -> bool:
        return self in _COMPUTE

    @property
    def is_send(self) -> bool:
        return self is Kind.SEND_F or self is Kind.SEND_B

    @property
    def is_receive(self) -> bool:
        return self is Kind.RECV_F or self is Kind.RECV_B


_COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})


@dataclass(frozen=True, slots=True)
class Action:
    """One action of one stage on one micro-batch. REDUCE belongs to no micro-batch: there it is 0.

    Text: stage, kind, micro-batch: `2F0`, `1I3`, `0SEND_F2`, `3RECV_B1`, and `2REDUCE`.
    """

    kind: Kind
    stage: int
    micro_batch: int = 0

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}" + ("" if self.kind is Kind.REDUCE else str(self.micro_batch))

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions of this cell: itself."""
        return (self,)

    @property
    def is_compute(self) -> bool:
        return self.kind.is_compute

    @property
    def result(self) -> Action:
        """The action under whose name the result is known: an I makes the input gradient just as a B does."""
        return Action(Kind.B, self.stage, self.micro_batch) if self.kind is Kind.I else self

    @property
    def partner(self) -> Action:
        """The other end of a SEND or RECV: `0SEND_F2` and `1RECV_F2` are partners."""
        kind, distance = _PARTNERS[self.kind]
        return Action(kind, self.stage + distance, self.micro_batch)


_PARTNERS: Mapping[Kind, tuple[Kind, int]] = MappingProxyType(
    {
        Kind.SEND_F: (Kind.RECV_F, +1),
        Kind.RECV_F: (Kind.SEND_F, -1),
        Kind.SEND_B: (Kind.RECV_B, -1),
        Kind.RECV_B: (Kind.SEND_B, +1),
    }
)


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a backward that run side by side, one's communication under the other's compute.

    Text: `(0F4+1B2)`.

    Raises:
        ScheduleError: the first is no F or the second is neither B nor I.
    """

    forward: Action
    backward: Action

    def __post_init__(self) -> None:
        if self.forward.kind is not Kind.F or self.backward.kind not in (Kind.B, Kind.I):
            raise ScheduleError(
                "an overlapped pair is not a forward and a backward",
                found=str(self),
                allowed="(F+B) or (F+I), like (0F4+1B2)",
            )

    def __str__(self) -> str:
        return f"({self.forward}+{self.backward})"

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions of this cell: the forward, then the backward."""
        return (self.forward, self.backward)

    @property
    def is_compute(self) -> bool:
        return True


Cell = Action | Overlap
"""What stands in one place of a row."""

Row = tuple[Cell, ...]


def inputs_of(action: Action, num_stages: int) -> tuple[Action, ...]:
    """The results (see `Action.result`) that a compute action needs before it can start."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind is Kind.F:
        return (Action(Kind.F, stage - 1, micro_batch),) if stage > 0 else ()
    if action.kind is Kind.W:
        return (Action(Kind.B, stage, micro_batch),)
    forward = Action(Kind.F, stage, micro_batch)
    return (forward,) if stage == num_stages - 1 else (forward, Action(Kind.B, stage + 1, micro_batch))


def live_counts(row: Row) -> tuple[int, ...]:
    """Live activations while each cell of a row runs, in (stage, micro-batch) pairs.

    A pair is born when its F starts and dies when its B ends, or its W where the backward is split (what W
    needs is most of it).
    """
    counts, live = [], 0
    for cell in row:
        live += sum(action.kind is Kind.F for action in cell.actions)
        counts.append(live)
        live -= sum(action.kind in (Kind.B, Kind.W) for action in cell.actions)
    return tuple(counts)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Who computes what, in which order. Frozen, and equal by content.

    Args:
        name: one word; the builder's name, or the user's.
        num_micro_batches: micro-batches of one optimizer step, >= 1.
        placement: for each direction the rank of each stage. One direction, or two: then the first half of
            the micro-batches runs through `placement[0]` and the second through `placement[1]` (DualPipe).
        max_live: for each rank the most activations alive at a time (`live_counts`), declared so that
            `verify` can prove it.
        rows: for each rank its cells in order: compute alone, or lowered (with SEND, RECV and REDUCE).

    Raises:
        ScheduleError: the fields do not fit each other. (That the rows are right, `verify` says.)
    """

    name: str
    num_micro_batches: int
    placement: tuple[tuple[int, ...], ...]
    max_live: tuple[int, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        _check_shape(self)

    @property
    def num_stages(self) -> int:
        return len(self.placement[0])

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def is_lowered(self) -> bool:
        """Whether the rows say what is sent, received and reduced."""
        return any(not cell.is_compute for row in self.rows for cell in row)

    @property
    def num_chunks(self) -> int:
        """The most stages of one direction that a rank holds."""
        return max(Counter(self.placement[0]).values())

    def rank_of(self, stage: int, micro_batch: int) -> int:
        """The rank that computes `stage` for `micro_batch`."""
        return self.placement[micro_batch * len(self.placement) // self.num_micro_batches][stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose parameters `rank` holds, ascending."""
        return tuple(s for s in range(self.num_stages) if any(ranks[s] == rank for ranks in self.placement))

    def peer(self, action: Action) -> int:
        """The rank at the other end of a SEND or RECV."""
        partner = action.partner
        return self.rank_of(partner.stage, partner.micro_batch)

    def cells(self) -> Iterator[tuple[int, int, Cell]]:
        """Every cell as (rank, index in its row, cell)."""
        for rank, row in enumerate(self.rows):
            for index, cell in enumerate(row):
                yield rank, index, cell

    def grid(self, marks: Mapping[int, int]) -> str:
        """The rows as text, `marks` (rank -> index) in square brackets; long rows are cut around the mark."""
        reach = 4 if self.is_lowered else 7
        position = (
            max(index / max(len(self.rows[rank]), 1) for rank, index in marks.items()) if marks else 0.0
        )
        lines = []
        for rank, row in enumerate(self.rows):
            center = marks.get(rank, int(position * len(row)))
            start, stop = max(0, center - reach), min(len(row), center + reach + 1)
            cells = [f"[{row[i]}]" if marks.get(rank) == i else str(row[i]) for i in range(start, stop)]
            if marks.get(rank) == len(row):
                cells.append("[end]")
            ends = ("... " if start > 0 else "", " ..." if stop < len(row) else "")
            lines.append(f"rank {rank:<2d} | {ends[0]}{' '.join(cells)}{ends[1]}")
        return "\n".join(lines)


def _check_shape(schedule: Schedule) -> None:
    """Refuse fields that do not fit each other, so that every method of `Schedule` is defined."""
    num_ranks = len(schedule.rows)
    if not re.fullmatch(r"\S+", schedule.name):
        raise ScheduleError("the name of a schedule is one word", found=repr(schedule.name))
    what = f"schedule {schedule.name}: "
    if schedule.num_micro_batches < 1:
        raise ScheduleError(
            what + "micro_batches is too small", found=schedule.num_micro_batches, allowed=">= 1"
        )
    if len(schedule.placement) not in (1, 2) or not schedule.placement[0]:
        raise ScheduleError(
            what + "placement needs one direction or two, each with a rank for each stage",
            found=schedule.placement,
        )
    if len({len(ranks) for ranks in schedule.placement}) > 1:
        raise ScheduleError(
            what + "the two directions of placement differ in stages", found=schedule.placement
        )
    if len(schedule.placement) == 2 and schedule.num_micro_batches % 2:
        raise ScheduleError(
            what + "two directions need an even number of micro-batches", found=schedule.num_micro_batches
        )
    held = {rank for ranks in schedule.placement for rank in ranks}
    if held != set(range(num_ranks)):
        raise ScheduleError(
            what + "the ranks in placement are not the ranks that have a row",
            found=f"placement names ranks {sorted(held)}, rows: {num_ranks}",
            allowed=f"each of the ranks 0..{num_ranks - 1} holds a stage",
        )
    if len(schedule.max_live) != num_ranks or min(schedule.max_live) < 1:
        raise ScheduleError(
            what + "max_live needs one number >= 1 a rank",
            found=schedule.max_live,
            allowed=f"{num_ranks} numbers",
        )


def make_schedule(
    name: str, num_micro_batches: int, *, placement: tuple[tuple[int, ...], ...], rows: Sequence[Row]
) -> Schedule:
    """A schedule that declares just the live activations that its rows need."""
    max_live = tuple(max(live_counts(row), default=1) for row in rows)
    return Schedule(name, num_micro_batches, placement, max_live, tuple(rows))


def check_counts(num_stages: int, num_micro_batches: int, *, num_chunks: int = 1) -> None:
    """Refuse counts that no schedule can have.

    Raises:
        ScheduleError: a count below 1.
    """
    counts = (("chunks a rank", num_chunks), ("stages", num_stages), ("micro-batches", num_micro_batches))
    for what, count in counts:
        if count < 1:
            raise ScheduleError(f"a schedule needs at least one of its {what}", found=count, allowed=">= 1")
