"""Times a schedule: when each action runs, how long each rank idles, how much it holds.

    rank 0 | F0 F1 .. I0 W0 I1 W1 ..        the next step's first forwards of rank 0 would fit into its last ..
    rank 1 | .. F0 I0 F1 I1 W0 W1

    makespan      from the first start to the last stop: a step whose optimizer waits for all ranks. That is the
                  default, since clipping and the check for finite gradients need a norm over all of them.
    longest span  from a rank's first start to its last stop: a step that ends on each rank alone. Papers on
                  zero-bubble schedules count so.

Compute runs in row order, each action as soon as its rank is free and its inputs are there. Messages cost no
rank's time (sent at once, received early): they take their link for `transfer` and arrive `latency` later. SEND, RECV
and REDUCE of a lowered schedule take no time. So the figures are the floor that a transport which overlaps perfectly
would reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Schedule, inputs_of, live_counts
from megads.pipeline.lower import lock_step, message_of


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations in any one unit; a number for each stage.

    Args:
        forward: F.
        backward: B, the whole backward.
        input_gradient: I.
        weight_gradient: W.
        latency: from the end of an action to its result being there on another rank.
        transfer: how long a message holds its link from rank to rank, one way: its bytes over the bandwidth.
        overlap: time of an overlapped pair over the sum of its two; 1: nothing is gained.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    input_gradient: tuple[float, ...]
    weight_gradient: tuple[float, ...]
    latency: float = 0.0
    transfer: float = 0.0
    overlap: float = 1.0

    def of_cell(self, cell: Cell) -> float:
        """How long a cell takes: an action, or an overlapped pair."""
        total = sum(self.of(action) for action in cell.actions)
        return total * self.overlap if len(cell.actions) > 1 else total

    def of(self, action: Action) -> float:
        """How long a compute action takes alone."""
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
    transfer: float = 0.0,
    overlap: float = 1.0,
) -> Costs:
    """Costs from F, I and W of each stage, with B = I + W."""
    backward = [i + w for i, w in zip(input_gradient, weight_gradient, strict=True)]
    return Costs(
        forward=tuple(forward),
        backward=tuple(backward),
        input_gradient=tuple(input_gradient),
        weight_gradient=tuple(weight_gradient),
        latency=latency,
        transfer=transfer,
        overlap=overlap,
    )


def equal_costs(
    num_stages: int, *, forward: float = 1.0, backward: float = 2.0, latency: float = 0.0
) -> Costs:
    """The same costs for every stage, I and W half a backward each."""
    half = (backward / 2,) * num_stages
    return Costs((forward,) * num_stages, (backward,) * num_stages, half, half, latency)


@dataclass(frozen=True, slots=True)
class Span:
    """One compute cell in time."""

    cell: Cell
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A schedule in time.

    Args:
        schedule: what was timed.
        spans: for each rank its compute cells in order.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """From the first start (0) to the last stop of all ranks: a step with the optimizer's barrier."""
        return max((row[-1].stop for row in self.spans if row), default=0.0)

    @property
    def longest_span(self) -> float:
        """The longest time from a rank's first start to its last stop: a step without the barrier."""
        return max((row[-1].stop - row[0].start for row in self.spans if row), default=0.0)

    @property
    def work(self) -> tuple[float, ...]:
        """For each rank the time in which it computes."""
        return tuple(math.fsum(span.stop - span.start for span in row) for row in self.spans)

    @property
    def idle(self) -> tuple[float, ...]:
        """For each rank its bubble with the barrier: makespan less its work."""
        return tuple(self.makespan - work for work in self.work)

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks over their time, with the barrier: 0 is perfect."""
        return self._idle_share(self.makespan)

    @property
    def bubble_fraction_without_barrier(self) -> float:
        """The same where a step takes `longest_span`: the bubble rate of zero-bubble papers."""
        return self._idle_share(self.longest_span)

    def _idle_share(self, step: float) -> float:
        work = self.work
        return 1.0 - math.fsum(work) / (step * len(work)) if step else 0.0

    @property
    def peak_live(self) -> tuple[int, ...]:
        """For each rank the most live activations, in (stage, micro-batch) pairs."""
        return tuple(max(live_counts(row), default=0) for row in self.schedule.rows)


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Time a schedule, compute-only or lowered.

    Raises:
        ScheduleError: costs that are negative, not finite or not one a stage; rows that wait for each other.
    """
    _check_costs(schedule, costs)
    free = [0.0] * schedule.num_ranks
    links: dict[tuple[int, int], float] = {}  # when the last message has left the sender
    ready: dict[tuple[Action, int], float] = {}  # when a result is there, on which rank
    spans: list[list[Span]] = [[] for _ in schedule.rows]
    for rank, cell in lock_step(schedule):
        needs = [need for action in cell.actions for need in inputs_of(action, schedule.num_stages)]
        start = max([free[rank], *(ready[need, rank] for need in needs)])
        free[rank] = stop = start + costs.of_cell(cell)
        spans[rank].append(Span(cell, start, stop))
        for action in cell.actions:
            ready[action.result, rank] = stop
            if send := message_of(schedule, action):
                link = rank, schedule.peer(send)
                links[link] = max(stop, links.get(link, 0.0)) + costs.transfer
                ready[action.result, link[1]] = links[link] + costs.latency
    return Timeline(schedule, tuple(map(tuple, spans)))


@dataclass(frozen=True, slots=True)
class Held:
    """What one micro-batch keeps of each stage, in any one unit.

    Args:
        before_input: from the start of its F to the end of its B or I (M_B of Qi et al. 2024).
        before_weight: from the end of its I to the end of its W (M_W).
    """

    before_input: tuple[float, ...]
    before_weight: tuple[float, ...]


def peak_held(schedule: Schedule, held: Held) -> tuple[float, ...]:
    """For each rank the most that its micro-batches keep at a time, in the unit of `held`."""
    peaks = []
    for row in schedule.rows:
        now = peak = 0.0
        for cell in row:
            now += sum(held.before_input[a.stage] for a in cell.actions if a.kind is Kind.F)
            peak = max(peak, now)
            for action in cell.actions:
                if action.kind in (Kind.B, Kind.I):
                    now -= held.before_input[action.stage]
                if action.kind is Kind.I:
                    now += held.before_weight[action.stage]
                elif action.kind is Kind.W:
                    now -= held.before_weight[action.stage]
            peak = max(peak, now)
        peaks.append(peak)
    return tuple(peaks)


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
    for name in ("latency", "transfer", "overlap"):
        if not 0 <= getattr(costs, name) < math.inf:
            raise ScheduleError(f"costs.{name} cannot be", found=getattr(costs, name), allowed=">= 0")
