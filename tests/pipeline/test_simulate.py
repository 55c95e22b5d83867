"""Times against closed forms, against a longest path, and against torch's own schedules to come."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Schedule
from megads.pipeline.lower import lower
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.simulate import Costs, Timeline, equal_costs, simulate, split_costs
from megads.pipeline.text import parse_schedule


@pytest.mark.parametrize("name", SCHEDULES)
def test_bubble_and_peak_equal_the_closed_forms(name: str) -> None:
    """(p-1)(F+B) on every rank, whatever m; for m <= p the whole is (m+p-1)(F+B)."""
    random_ = random.Random(name)
    for _ in range(80):
        p, m = random_.randint(1, 8), random_.randint(1, 20)
        forward, backward = random_.uniform(0.1, 5), random_.uniform(0.1, 5)
        schedule = build(name, num_stages=p, num_micro_batches=m)
        timeline = simulate(schedule, equal_costs(p, forward=forward, backward=backward))
        bubble = SCHEDULES[name].bubble(p, m, num_chunks=1, forward=forward, backward=backward)
        assert bubble == pytest.approx((p - 1) * (forward + backward), rel=1e-12)
        assert timeline.idle == pytest.approx([bubble] * p, abs=1e-9)
        assert timeline.makespan == pytest.approx((m + p - 1) * (forward + backward), abs=1e-9)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-9)
        assert timeline.peak_live == schedule.max_live


def test_interleaving_divides_the_bubble_by_the_chunks() -> None:
    """(p-1)(F+B)/v on every rank for whole rounds, F and B of a rank; else no closed form is claimed."""
    random_ = random.Random(5)
    for _ in range(60):
        p, v = random_.randint(1, 6), random_.randint(2, 4)
        m = p * random_.randint(1, 4)
        forward, backward = random_.uniform(0.1, 5), random_.uniform(0.1, 5)
        schedule = build("interleaved", num_stages=p * v, num_micro_batches=m, num_chunks=v)
        costs = equal_costs(p * v, forward=forward / v, backward=backward / v)
        timeline = simulate(schedule, costs)
        closed_form = SCHEDULES["interleaved"].bubble
        bubble = closed_form(p, m, num_chunks=v, forward=forward, backward=backward)
        assert bubble == pytest.approx((p - 1) * (forward + backward) / v, rel=1e-12)
        assert timeline.idle == pytest.approx([bubble] * p, abs=1e-9)
        assert timeline.peak_live == schedule.max_live
        if p > 1:
            assert closed_form(p, m + 1, num_chunks=v, forward=forward, backward=backward) is None


def longest_path(schedule: Schedule, costs: Costs) -> float:
    """Makespan by relaxing every edge until nothing moves: row order, data, latency. Single B only."""
    ranks = {(a.kind, a.stage, a.micro_batch): r for r, _, cell in schedule.cells() for a in cell.actions}
    edges: list[tuple[Action, Action, float]] = []

    def hop(kind: Kind, m: int, source: int, target: int) -> tuple[Action, Action, float]:
        is_local = ranks[kind, source, m] == ranks[kind, target, m]
        return Action(kind, source, m), Action(kind, target, m), 0.0 if is_local else costs.latency

    for row in schedule.rows:
        actions = [action for cell in row for action in cell.actions]
        edges += [(a, b, 0.0) for a, b in itertools.pairwise(actions)]
    for kind, stage, m in ranks:
        if kind is Kind.F and stage + 1 < schedule.num_stages:
            edges.append(hop(kind, m, stage, stage + 1))
        if kind is Kind.B and stage > 0:
            edges.append(hop(kind, m, stage, stage - 1))

    def cost(action: Action) -> float:
        return (costs.forward if action.kind is Kind.F else costs.backward)[action.stage]

    start = {Action(*key): 0.0 for key in ranks}
    moved = True
    while moved:
        moved = False
        for a, b, delay in edges:
            if start[a] + cost(a) + delay > start[b]:
                start[b], moved = start[a] + cost(a) + delay, True
    return max(start[action] + cost(action) for action in start)


@pytest.mark.parametrize(("name", "num_chunks"), [*((name, 1) for name in SCHEDULES), ("interleaved", 3)])
def test_uneven_costs_and_latency_equal_the_longest_path(name: str, num_chunks: int) -> None:
    random_ = random.Random(name)
    for _ in range(20):
        p, m = random_.randint(1, 5), random_.randint(1, 6)
        draws = [[random_.uniform(0.1, 3) for _ in range(p * num_chunks)] for _ in range(3)]
        costs = split_costs(
            draws[0], input_gradient=draws[1], weight_gradient=draws[2], latency=random_.uniform(0, 1)
        )
        schedule = build(name, num_stages=p * num_chunks, num_micro_batches=m, num_chunks=num_chunks)
        timeline = simulate(schedule, costs)
        assert timeline.makespan == pytest.approx(longest_path(schedule, costs), abs=1e-9)
        for rank in range(p):
            work = m * sum(costs.forward[s] + costs.backward[s] for s in schedule.stages_of(rank))
            assert timeline.idle[rank] == pytest.approx(timeline.makespan - work, abs=1e-9)
        lowered = simulate(lower(schedule), costs)
        assert (lowered.spans, lowered.idle, lowered.peak_live) == (
            timeline.spans,
            timeline.idle,
            timeline.peak_live,
        )


def test_one_micro_batch_pays_every_hop() -> None:
    timeline = simulate(
        build("gpipe", num_stages=4, num_micro_batches=1), equal_costs(4, forward=2, backward=3, latency=0.5)
    )
    assert timeline.makespan == 4 * 5 + 6 * 0.5
    assert [(str(span.cell), span.start, span.stop) for span in timeline.spans[1]] == [
        ("1F0", 2.5, 4.5),
        ("1B0", 16.5, 19.5),
    ]


def spans_idle(timeline: Timeline) -> list[float]:
    """Idle time between a rank's own first start and last stop (how zero-bubble papers count)."""
    return [
        row[-1].stop - row[0].start - sum(span.stop - span.start for span in row) for row in timeline.spans
    ]


def test_schedules_to_come_have_their_known_bubbles(torch_schedule: Callable[..., Schedule]) -> None:
    """Published values: ZB-V has no bubble at F = I = W, and the peaks."""
    zbv = simulate(torch_schedule("ZBVZeroBubble", 4, 12, 2), equal_costs(8, forward=1, backward=2))
    assert spans_idle(zbv) == pytest.approx([0.0] * 4, abs=1e-9)
    assert max(zbv.peak_live) == 8
    dualpipe_v = simulate(torch_schedule("DualPipeV", 4, 12, 2), equal_costs(8, forward=1, backward=2))
    assert max(dualpipe_v.peak_live) == 9


def test_split_and_overlapped_cells() -> None:
    schedule = parse_schedule(
        "schedule pair\nmicro_batches 2\nplacement 0\nmax_live 2\nrank 0: 0F0 (0F1+0I0) 0W0 0B1\n"
    )
    costs = split_costs([1.0], input_gradient=[3.0], weight_gradient=[5.0])
    timeline = simulate(schedule, costs)
    assert [span.stop for span in timeline.spans[0]] == [1, 5, 10, 18]
    assert timeline.peak_live == (2,)


def test_costs_of_nothing() -> None:
    timeline = simulate(
        build("gpipe", num_stages=2, num_micro_batches=2), equal_costs(2, forward=0, backward=0)
    )
    assert (timeline.makespan, timeline.bubble_fraction) == (0, 0)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        (equal_costs(3), r"costs.forward is not one number a stage(.|\n)*3(.|\n)*2"),
        (equal_costs(2, forward=-1.0), "costs.forward has a duration"),
        (equal_costs(2, backward=float("nan")), "costs.backward has a duration"),
        (equal_costs(2, latency=-1.0), "costs.latency"),
    ],
)
def test_wrong_costs_are_refused(costs: Costs, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        simulate(build("gpipe", num_stages=2, num_micro_batches=2), costs)


def test_rows_that_wait_for_each_other_cannot_be_timed() -> None:
    schedule = parse_schedule(
        "schedule knot\nmicro_batches 1\nplacement 0 1\nmax_live 1 1\nrank 0: 0B0 0F0\nrank 1: 1F0 1B0\n"
    )
    with pytest.raises(ScheduleError, match="waits for another"):
        simulate(schedule, equal_costs(2))
