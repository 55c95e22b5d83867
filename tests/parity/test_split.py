"""Split backwards and V placements on real ranks: what is alive, what is reduced when, evaluation, generation.

That every schedule has the numbers of one process is the matter of `test_schedules.py`; here are the combinations with
what a backward waits for.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megads.assemble.schedule import schedule_of
from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.evaluate.generate import Generator, Sampling
from megads.optim.zero import NativeEngine
from megads.parallel import gradient
from megads.parallel.collectives import Pending, all_reduce_
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.weight_queue import WeightQueue
from megads.pipeline.executor import global_sum
from tests.parity.harness import (
    GLOBAL_BATCH,
    VOCAB,
    Case,
    Model,
    Outcome,
    gradient_error,
    make_batch,
    make_config,
    run_case,
)
from tests.ranks import run_ranks

GPT, LLAMA = Model("gpt"), Model("llama")  # tied, untied
CASES = (
    (GPT, Case(pipeline=2, data=2, micro=2, schedule="dualpipe_v", chunks=2, zero=1, bucket=3000)),
    (
        LLAMA,
        Case(
            tensor=2, pipeline=2, micro=4, schedule="zbv", chunks=2, sequence=True, pieces=2, recompute="full"
        ),
    ),
)
SLOW_CASES = (
    (GPT, Case(pipeline=3, micro=2, schedule="zero_bubble_h2")),
    (LLAMA, Case(pipeline=2, data=2, micro=2, schedule="zero_bubble_h1", zero=1, bucket=3000)),
    (GPT, Case(tensor=2, pipeline=2, micro=4, schedule="dualpipe_v", chunks=2, sequence=True)),
    (GPT, Case(pipeline=2, micro=28, schedule="dualpipe_v", chunks=2)),  # one micro-batch
    (GPT, Case(micro=4, schedule="zbv", chunks=2)),  # one rank
    (GPT, Case(micro=4, schedule="dualpipe_v", chunks=2, recompute="full")),
)


@functools.cache
def _reference(family: str, layers: int) -> Outcome:
    return run_case(Model(family, layers=layers), Case(micro=28), precision="fp64", steps=2)


def check(model: Model, case: Case) -> None:
    reference = _reference(model.family, model.layers)
    got = run_case(model, case, precision="fp64", steps=2)
    assert got.losses == pytest.approx(reference.losses, rel=1e-12)
    assert got.norms == pytest.approx(reference.norms, rel=1e-11)
    errors = gradient_error(got, reference)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= 1e-12, f"{worst}: {errors[worst]:.2e}"


def _ids(cases: tuple[tuple[Model, Case], ...]) -> list[str]:
    return [f"{model.family}-{case}" for model, case in cases]


@pytest.mark.parametrize(("model", "case"), CASES, ids=_ids(CASES))
def test_combinations_change_nothing(model: Model, case: Case) -> None:
    check(model, case)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "case"), SLOW_CASES, ids=_ids(SLOW_CASES))
def test_slow_combinations_change_nothing(model: Model, case: Case) -> None:
    check(model, case)


@pytest.mark.parametrize("schedule", ["gpipe", "zero_bubble_h1", "zero_bubble_h2"])
def test_the_order_of_the_work_changes_no_bit(schedule: str) -> None:
    """Stages on the same ranks add up the same micro-batches in the same order, whole or split, in float32."""
    found = run_case(LLAMA, Case(pipeline=2, micro=4, schedule=schedule), precision="fp32", steps=2)
    expected = _in_order()
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    assert all(torch.equal(found.final[name], value) for name, value in expected.final.items())
    assert all(torch.equal(found.gradients[name], value) for name, value in expected.gradients.items())


@functools.cache
def _in_order() -> Outcome:
    return run_case(LLAMA, Case(pipeline=2, micro=4), precision="fp32", steps=2)


LIVE_CASES = (
    Case(pipeline=2, micro=4, schedule="gpipe"),
    Case(pipeline=4, micro=4),
    Case(pipeline=2, micro=4, schedule="interleaved", chunks=2),
    Case(pipeline=4, micro=4, schedule="zero_bubble_h1"),
    Case(pipeline=4, micro=4, schedule="zero_bubble_h2"),
    Case(pipeline=2, micro=4, schedule="zbv", chunks=2),
    Case(pipeline=2, micro=4, schedule="dualpipe_v", chunks=2),
)


def _ran(case: Case) -> list[tuple[int, int, int]]:
    """Of each rank after one step: most alive, buckets reduced before the backward was over, work left in the queue."""
    config = make_config(LLAMA, case, precision="fp32")

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        rows, dp_rank = GLOBAL_BATCH // mesh.layout.data, mesh.group("dp").rank
        batch = make_batch(1).rows(dp_rank * rows, (dp_rank + 1) * rows)
        train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
        assert isinstance(engine, NativeEngine)
        return executor.peak_live, engine.num_early_reductions, model.queue.num_kept

    return run_ranks(work, case.world_size)


@pytest.mark.parametrize("case", LIVE_CASES, ids=str)
def test_no_more_is_alive_than_the_schedule_declares(case: Case) -> None:
    config = make_config(LLAMA, case, precision="fp32")
    declared = schedule_of(config.parallel, num_micro_batches=7).max_live
    found = _ran(case)
    assert tuple(peak for peak, _, _ in found) == declared
    assert all(left == 0 for _, _, left in found)


@pytest.mark.parametrize(("schedule", "chunks"), [("zero_bubble_h1", 1), ("zbv", 2), ("dualpipe_v", 2)])
def test_buckets_are_reduced_inside_the_last_weight_gradient(schedule: str, chunks: int) -> None:
    case = Case(pipeline=2, data=2, micro=2, schedule=schedule, chunks=chunks, bucket=3000)
    assert min(early for _, early, _ in _ran(case)) > 0


def _break_readiness(mesh: Mesh) -> None:
    """What counts a parameter as complete because autograd called its hook in I."""
    WeightQueue.waiting = lambda self, stage, micro_batch: ()  # type: ignore[method-assign]
    gradient.start_all_reduce = lambda t, group: Pending(all_reduce_(t, group))  # type: ignore[assignment]


def test_a_reduction_before_its_weight_gradient_is_seen() -> None:
    case = Case(pipeline=2, data=2, micro=2, schedule="zero_bubble_h1")
    broken = run_case(LLAMA, case, precision="fp64", steps=1, before=_break_readiness)
    assert max(gradient_error(broken, _reference("llama", 3)).values()) > 1e-3


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_v_evaluates_and_generates_like_one_process(family: str) -> None:
    """The first and the last stage are on one rank, which sends in the middle of its work and ends it."""

    def of(case: Case) -> list[tuple[float, list[int]]]:
        config = make_config(Model(family), case, precision="fp64")

        def work(rank: int, size: int) -> Any:
            mesh = build_mesh(layout_of(config, size), rank)
            model = build_model(config, mesh, vocab=VOCAB)
            build_engine(config, model, mesh=mesh)
            executor = build_executors(config, model, mesh=mesh).evaluate
            with torch.no_grad():
                loss = global_sum(executor.run(make_batch(1)), "loss", mesh=mesh).item()
            text = Generator(model, mesh).extend([3, 1, 4], num_tokens=6, sampling=Sampling(temperature=0.0))
            return loss, text

        return run_ranks(work, case.world_size)

    ((loss, text),) = of(Case(micro=4))
    found = of(Case(pipeline=2, micro=4, schedule="zbv", chunks=2))
    assert len(text) == 6
    assert [made for _, made in found] == [text, text]
    assert [value for value, _ in found] == pytest.approx([loss, loss], rel=1e-12)
