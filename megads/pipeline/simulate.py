"""Times a schedule: when each action runs, how long each rank idles, how much it holds.

    rank 0 | F0 F1 F2 F3 .........          idle (.) is the bubble: makespan less the rank's own work
    rank 1 | .. F0 F1 F2 F3 B0----

Compute runs in row order, each action as soon as its rank is free and its inputs are there. Messages cost
pure latency and no rank's time (sent at once, received early); SEND, RECV and REDUCE of a lowered schedule
take no time. So the figures are the floor that a transport which overlaps perfectly would reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Schedule, inputs_of, live_counts
from megads.pipeline.lower import lock_step


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations in any one unit; a number for each stage.

    Args:
        forward: F.
        backward: B, the whole backward.
        input_gradient: I.
        weight_gradient: W.
        latency: from the end of an action to its result being there on another rank.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    latency: float = 0.0

    def of(self, action: Action) -> float:
        """How long a compute action takes."""
        match action.kind:
            case Kind.F:
                return self.forward[action.stage]
            case Kind.B:
                return self.backward[action.stage]
            case Kind.I:
                return self.input_gradient[action.stage]
            case Kind.W:
                return self.weight_gradient[action.stage]
        return 0.0


def split_costs(
    forward: Sequence[float],
    *,
    input_gradient: Sequence[float],
    weight_gradient: Sequence[float],
    latency: float = 0.0,
) -> Costs:
    """Costs from F, I and W of each stage, with B = I + W."""
    backward = [i + w for i, w in zip(input_gradient, weight_gradient, strict=True)]
    return Costs(tuple(forward), tuple(backward), tuple(input_gradient), tuple(weight_gradient), latency)


def equal_costs(
    num_stages: int, *, forward: float = 1.0, backward: float = 2.0, latency: float = 0.0
) -> Costs:
    """The same costs for every stage, I and W half a backward each."""
    half = (backward / 2,) * num_stages
    return Costs((forward,) * num_stages, (backward,) * num_stages, half, half, latency)


@dataclass(frozen=True, slots=True)
class Span:
    """One compute cell in time; an overlapped pair takes the sum of its two."""

    cell: Cell
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule in time.

    Args:
        schedule: what was timed.
        spans: for each rank its compute cells in order.
        makespan: from the first start (0) to the last stop.
        idle: for each rank the bubble, makespan less its own work.
        peak_live: for each rank the most live activations, in (stage, micro-batch) pairs.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    makespan: float
    idle: tuple[float, ...]
    peak_live: tuple[int, ...]

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over their time: 0 is perfect."""
        total = self.makespan * len(self.idle)
        return math.fsum(self.idle) / total if total else 0.0


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Time a schedule, compute-only or lowered.

    Raises:
        ScheduleError: costs that are negative, not finite or not one a stage; rows that wait for each other.
    """
    _check_costs(schedule, costs)
    free = [0.0] * schedule.num_ranks
    stops: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in schedule.rows]
    for rank, cell in lock_step(schedule):
        start = free[rank]
        for action in cell.actions:
            for need in inputs_of(action, schedule.num_stages):
                is_local = schedule.rank_of(need.stage, need.micro_batch) == rank
                start = max(start, stops[need] + (0.0 if is_local else costs.latency))
        free[rank] = start + sum(costs.of(action) for action in cell.actions)
        spans[rank].append(Span(cell, start, free[rank]))
        stops.update({action.result: free[rank] for action in cell.actions})
    makespan = max(free)
    return Timeline(
        schedule=schedule,
        spans=tuple(map(tuple, spans)),
        makespan=makespan,
        idle=tuple(makespan - math.fsum(span.stop - span.start for span in row) for row in spans),
        peak_live=tuple(max(live_counts(row), default=0) for row in schedule.rows),
    )


def _check_costs(schedule: Schedule, costs: Costs) -> None:
    for name in ("forward", "backward", "input_gradient", "weight_gradient"):
        durations: tuple[float, ...] = getattr(costs, name)
        if len(durations) != schedule.num_stages:
            raise ScheduleError(
                f"costs.{name} is not one number a stage", found=len(durations), allowed=schedule.num_stages
            )
        if any(not 0 <= duration < math.inf for duration in durations):
            raise ScheduleError(
                f"costs.{name} has a duration that cannot be", found=durations, allowed=">= 0"
            )
    if not 0 <= costs.latency < math.inf:
        raise ScheduleError("costs.latency cannot be", found=costs.latency, allowed=">= 0")
