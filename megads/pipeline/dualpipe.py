"""Builders of DeepSeek's schedules, in which a forward and a backward overlap: DualPipe and DualPipeV.

    DualPipeV: two stages a rank, placed as a V. DualPipe: every rank holds one stage of each of two directions, so
    that the parameters are held twice, and half of the micro-batches enters at either end:

    rank 0 | 0     5        rank 0 | 0  5     Cut a DualPipe through its middle and the upper half is a DualPipeV:
    rank 1 |  1   4         rank 1 | 1  4     what the other half hands over, the lower tip of the V does itself.
    rank 2 |   2 3          rank 2 | 2  3     So both are built from the same rows.
                            rank 3 | 3  2
                            rank 4 | 4  1     In a row, `out` is the side on which a rank begins (the stage nearer to
                            rank 5 | 5  0     the start of its direction), `back` the other one.

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), section 3.2.1 and table 2, and the README
of their DualPipe repository. The table of all builders is in `schedules.py`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Overlap, Row, Schedule, check_counts, make_schedule
from megads.pipeline.zero_bubble import ranks_of_vee, vee


class Side(Enum):
    """Which of its two stages a rank works on."""

    OUT = "out"
    BACK = "back"


Places = Mapping[Side, tuple[int, int]]
"""For each side of a rank its stage, and its first micro-batch there."""


def dualpipe_v(num_stages: int, num_micro_batches: int) -> Schedule:
    """DualPipeV: two stages a rank, placed as a V; forwards of one overlap with backwards of the other.

    Where F = I = W the bubble is (p - 1)(F&B + B - 3W), all of one stage, F&B an overlapped pair; 2p + 1 live
    activations of one stage. Fewer than 2p micro-batches are built for 2p and the missing actions left out.

    Args:
        num_stages: stages of all ranks together, 2p.

    Raises:
        ScheduleError: a count below 1, or an odd number of stages.
    """
    check_counts(num_stages, num_micro_batches)
    num_ranks = ranks_of_vee("dualpipe_v", num_stages)
    rows = [
        _row(
            _steps(rank, num_ranks, num_micro_batches),
            num_micro_batches,
            places={Side.OUT: (rank, 0), Side.BACK: (num_stages - 1 - rank, 0)},
        )
        for rank in range(num_ranks)
    ]
    return make_schedule("dualpipe_v", num_micro_batches, placement=(vee(num_ranks),), rows=rows)


def dualpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """DualPipe: rank r holds stage r of one direction and stage p - 1 - r of the other; micro-batches are halved.

    Where F = I = W the bubble is (p / 2 - 1)(F&B + B - 3W); p + 1 live activations at most on a rank; parameters are
    held twice. Fewer than 2p micro-batches are built for 2p and the missing actions left out.

    Raises:
        ScheduleError: a count below 1, an odd number of stages or of micro-batches.
    """
    check_counts(num_stages, num_micro_batches)
    for what, count in (("ranks", num_stages), ("micro-batches", num_micro_batches)):
        if count % 2:
            raise ScheduleError(
                f"schedule dualpipe gives one half of its {what} to each direction",
                found=f"{count} {what}",
                allowed=f"an even number: {count + 1}" + (f" or {count - 1}" if count > 1 else ""),
            )
    half = num_micro_batches // 2
    rows = []
    for rank in range(num_stages):
        near, far = sorted((rank, num_stages - 1 - rank))
        own, other = (0, half) if rank == near else (half, 0)  # first micro-batches of the two directions
        places = {Side.OUT: (near, own), Side.BACK: (far, other)}
        rows.append(_row(_steps(near, num_stages // 2, half), half, places=places))
    ranks = tuple(range(num_stages))
    return make_schedule("dualpipe", num_micro_batches, placement=(ranks, ranks[::-1]), rows=rows)


@dataclass(frozen=True, slots=True)
class _Step:
    """An action before it is known what stage and micro-batch it means: the n-th of its kind on its side."""

    kind: Kind
    side: Side
    number: int


def _row(steps: Sequence[tuple[_Step, ...]], num_micro_batches: int, *, places: Places) -> Row:
    """Cells of steps; those of micro-batches that do not exist are left out, and what is left of a pair stays."""
    row: list[Cell] = []
    for pair in steps:
        actions = [
            Action(step.kind, places[step.side][0], places[step.side][1] + step.number)
            for step in pair
            if step.number < num_micro_batches
        ]
        if actions:
            row.append(Overlap(*actions) if len(actions) == 2 else actions[0])
    return tuple(row)


class _Steps:
    """Steps of one rank, numbered as they are written. W are written first in, first out."""

    def __init__(self) -> None:
        self.steps: list[tuple[_Step, ...]] = []
        self._counts: Counter[tuple[bool, Side]] = Counter()
        self._weights: deque[_Step] = deque()

    def _next(self, kind: Kind, side: Side) -> _Step:
        key = (kind is Kind.F, side)
        self._counts[key] += 1
        return _Step(kind, side, self._counts[key] - 1)

    def forward(self, side: Side) -> None:
        self.steps.append((self._next(Kind.F, side),))

    def backward(self, side: Side, *, is_split: bool = False) -> None:
        """B, or I with its W to come."""
        step = self._next(Kind.I if is_split else Kind.B, side)
        self.steps.append((step,))
        if is_split:
            self._weights.append(_Step(Kind.W, side, step.number))

    def weight(self) -> None:
        """The W that waits longest."""
        self.steps.append((self._weights.popleft(),))

    def overlapped(self, forward: Side) -> None:
        """F of one side and B of the other at once."""
        backward = Side.BACK if forward is Side.OUT else Side.OUT
        self.steps.append((self._next(Kind.F, forward), self._next(Kind.B, backward)))


def _steps(rank: int, num_ranks: int, num_micro_batches: int) -> list[tuple[_Step, ...]]:
    """One rank of p, counted from the end where micro-batches enter, for at least 2p micro-batches of a side.

    The eight phases of DeepSeek's schedule.
    """
    row, below = _Steps(), num_ranks - 1 - rank  # ranks further inside
    for _ in range(2 * below):
        row.forward(Side.OUT)
    for _ in range(rank + 1):
        row.forward(Side.OUT)
        row.forward(Side.BACK)
    for _ in range(below):
        row.backward(Side.BACK, is_split=True)
        row.weight()
        row.forward(Side.BACK)
    for turn in range(max(num_micro_batches, 2 * num_ranks) - 2 * num_ranks + rank + 1):
        if turn == 0 and below == 0:  # the innermost rank: its first backward waits for the forward beside it
            row.forward(Side.OUT)
            row.backward(Side.BACK)
        else:
            row.overlapped(Side.OUT)
        row.overlapped(Side.BACK)
    for _ in range(below):
        row.backward(Side.BACK)
        row.overlapped(Side.BACK)
    for turn in range(2 * (rank + 1)):  # the second half splits: its W fill the time until the last I
        row.backward(Side.OUT if turn % 2 else Side.BACK, is_split=turn > rank)
    for _ in range(below):
        row.weight()
        row.backward(Side.OUT, is_split=True)
    for _ in range(rank + 1):
        row.weight()
    return row.steps
