"""bf16 and fp16 under a layout: at most twice the error of one process, and one loss scale for all ranks."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.config.loss_scale import LossScaleConfig
from megads.config.optim import OptimConfig
from megads.optim.precision import LossScale
from megads.parallel.mesh import build_mesh
from tests.parity.harness import (
    GLOBAL_BATCH,
    VOCAB,
    Case,
    Model,
    Outcome,
    gradient_error,
    make_batch,
    make_config,
)
from tests.parity.harness import run_case as run
from tests.ranks import run_ranks

LLAMA = Model("llama", layers=2)
FP16 = OptimConfig(lr=1.0, precision="fp16")
CASES = (
    Case(tensor=2, micro=4, sequence=True),
    Case(tensor=2, pipeline=2, micro=4),
    Case(data=2, micro=2, zero=1, recompute="full"),
)


@functools.cache
def reference() -> Outcome:
    return run(LLAMA, Case(micro=28), precision="fp64", steps=3)


@functools.cache
def one_process(precision: str) -> Outcome:
    return run(LLAMA, Case(micro=4), precision=precision, steps=3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_at_most_twice_the_error_of_one_process(case: Case, precision: str) -> None:
    alone, got = one_process(precision), run(LLAMA, case, precision=precision, steps=3)
    assert all(torch.equal(alone.initial[n], got.initial[n]) for n in alone.initial)
    errors, allowed = (gradient_error(o, reference()) for o in (got, alone))
    assert 1e-5 < max(allowed.values()) < 0.1, "the reference run is not in low precision"
    assert max(errors.values()) <= 2 * max(allowed.values())
    mean, mean_allowed = (sum(e.values()) / len(e) for e in (errors, allowed))
    assert mean <= 2 * mean_allowed
    for step, loss in enumerate(reference().losses):
        assert abs(got.losses[step] / loss - 1) <= 2 * max(abs(alone.losses[step] / loss - 1), 1e-3)


def test_low_precision_weights_are_rounded_masters() -> None:
    """A checkpoint holds float32 masters, and they move by less than bf16 could tell."""
    outcome = one_process("bf16")
    assert {v.dtype for v in outcome.final.values()} == {torch.float32}
    moved = [n for n, v in outcome.final.items() if not torch.equal(v, outcome.initial[n])]
    assert len(moved) == len(outcome.final)


@pytest.mark.parametrize(
    "case",
    [Case(tensor=2, pipeline=2, micro=4), Case(data=2, pipeline=2, micro=2, zero=2, bucket=3000)],
    ids=str,
)
def test_scale_follows_grad_scaler_and_all_ranks_agree(case: Case) -> None:
    """inf in one gradient of one rank of one stage: every rank skips, and the scale goes as torch's GradScaler."""
    bad_steps = {4, 7}
    config = make_config(
        LLAMA, replace(case, optim={"loss_scale": LossScaleConfig(interval=2)}), precision="fp16"
    )

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        trace = []
        for step in range(1, 8):
            if rank == 3 and step in bad_steps:
                target = model.parameters[0]
                hook = target.register_hook(lambda g: torch.full_like(g, float("inf")))
            before = [p.tensor.clone() for p in engine.state()]
            batch = make_batch(step).rows(0, GLOBAL_BATCH // case.data)
            result = train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
            if rank == 3 and step in bad_steps:
                hook.remove()
            still = all(torch.equal(a, p.tensor) for a, p in zip(before, engine.state(), strict=True))
            trace.append((engine.loss_scale.item(), bool(result.report.finite), still))
        return trace

    traces = run_ranks(work, case.world_size)
    assert all(trace == traces[0] for trace in traces)
    assert [not finite for _, finite, _ in traces[0]] == [step in bad_steps for step in range(1, 8)]
    assert [still for _, _, still in traces[0]] == [step in bad_steps for step in range(1, 8)]
    scales = [scale for scale, _, _ in traces[0]]
    assert scales[:4] == [65536.0, 131072.0, 131072.0, 65536.0]
    assert scales == _grad_scaler_trace([s in bad_steps for s in range(1, 8)])


def _grad_scaler_trace(is_bad: list[bool]) -> list[float]:
    """The scale after each step of torch's own scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=2)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    trace = []
    for bad in is_bad:
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        if bad:
            weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        trace.append(scaler.get_scale())
    return trace


def test_scale_grows_after_the_interval_and_survives_saving() -> None:
    scale = LossScale(torch.device("cpu"), FP16)
    reference = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=2000)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(1, 4100):
        bad = step == 1500
        optimizer.zero_grad()
        reference.scale(weight.sum()).backward()
        if bad:
            weight.grad.fill_(float("inf"))
        reference.step(optimizer)
        reference.update()
        scale.update(torch.tensor(not bad))
        if step == 2500:
            other = LossScale(torch.device("cpu"), FP16)
            other.load(scale.state())
            scale = other
        assert scale.value.item() == reference.get_scale(), step


def test_other_precisions_have_no_scale() -> None:
    scale = LossScale(torch.device("cpu"), OptimConfig(lr=1.0, precision="bf16"))
    scale.update(torch.tensor(False))
    assert scale.value.item() == 1.0
