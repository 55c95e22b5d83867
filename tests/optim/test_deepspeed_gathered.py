"""DeepSpeed's stage 3: numbers under layouts and memory options, what is whole when, evaluation, generation."""

from __future__ import annotations

import functools
import importlib
import os
from dataclasses import replace
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from megads.assemble.step import train_step  # noqa: E402
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of  # noqa: E402
from megads.config.root import Config  # noqa: E402
from megads.evaluate.generate import Generator, Sampling  # noqa: E402
from megads.optim import deepspeed_gathered  # noqa: E402
from megads.optim.deepspeed_gathered import GatheredTwins  # noqa: E402
from megads.parallel.mesh import build_mesh  # noqa: E402
from megads.pipeline.executor import global_sum  # noqa: E402
from tests.parity.harness import (  # noqa: E402
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
from tests.ranks import run_ranks  # noqa: E402

TIED, UNTIED = Model("gpt", layers=2), Model("llama", layers=2)
LONG = Model("llama", layers=2, seq=12, documents=True)
DS = Case(engine="deepspeed", zero=3, micro=2)
CASES = (
    (UNTIED, replace(DS, data=2, recompute="full", loss_chunk=3)),
    (TIED, replace(DS, tensor=2, data=2, sequence=True, recompute=("norm", "activation"))),
    (TIED, replace(DS, data=4, micro=1, bucket=3000, schedule="gpipe")),
    (LONG, replace(DS, context=2, data=2, offload=True)),
    (TIED, replace(DS, micro=4)),
)


@pytest.fixture(scope="module", autouse=True)
def imported_before_the_fork() -> None:
    """DeepSpeed's first `initialize` in a process imports torch's compiler: 2 s that every rank would pay."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@functools.cache
def _exact(family: str, seq: int) -> Outcome:
    model = next(model for model, _ in CASES if (model.family, model.seq) == (family, seq))
    return run_case(model, Case(micro=4), precision="fp64", steps=3)


@pytest.mark.parametrize(("model", "case"), CASES, ids=[f"{m.family}-{c}" for m, c in CASES])
def test_fp32_equals_one_process(model: Model, case: Case) -> None:
    reference = _exact(model.family, model.seq)
    got = run_case(model, case, precision="fp32", steps=3)
    assert got.losses == pytest.approx(reference.losses, rel=1e-6)
    assert got.norms == pytest.approx(reference.norms, rel=1e-6)
    errors = gradient_error(got, reference)
    assert max(errors.values()) <= 1e-5, errors


def _forget_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every micro-batch replaces the one before."""
    zero3 = importlib.import_module("deepspeed.runtime.zero.stage3").DeepSpeedZeroOptimizer_Stage3
    monkeypatch.setattr(zero3, "clear_backward_seen_flag", lambda self: None)


def _keep_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatheredTwins, "num_summands", 1)


def _forget_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_gathered, "sum_outside", lambda bucket, mesh: None)


@pytest.mark.parametrize("mutation", [_forget_what_was_there, _keep_the_mean, _forget_partial_sums])
def test_a_broken_stage_is_seen(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    try:
        got = run_case(TIED, CASES[1][1], precision="fp32", steps=1)
    except AssertionError as error:
        assert "ranks disagree" in str(error)
    else:
        reference = _exact("gpt", 10)
        assert (
            max(*gradient_error(got, reference).values(), abs(got.norms[0] / reference.norms[0] - 1)) > 1e-3
        )


def _made(config: Config, rank: int, size: int) -> Any:
    mesh = build_mesh(layout_of(config, size), rank)
    model = build_model(config, mesh, vocab=VOCAB)
    engine = build_engine(config, model, mesh=mesh)
    return mesh, model, engine, build_executors(config, model, mesh=mesh)


def _rows(mesh: Any) -> Any:
    size = GLOBAL_BATCH // mesh.layout.data
    first = mesh.group("dp").rank * size
    return make_batch(1).rows(first, first + size)


@pytest.mark.parametrize("offload", [(), ("offload_optimizer", "offload_param")], ids=["device", "host"])
def test_weights_and_gradients_are_there_for_two_blocks_at_most(offload: tuple[str, ...]) -> None:
    """While a layer runs forward: its weights and the next block's; between steps: nothing."""
    config = make_config(replace(UNTIED, layers=4), replace(DS, data=2), precision="bf16")
    keys: Any = {"zero_optimization": {name: {"device": "cpu"} for name in offload}}
    config = replace(config, optim=replace(config.optim, deepspeed=keys))

    def work(rank: int, size: int) -> Any:
        mesh, model, engine, executors = _made(config, rank, size)
        twins = engine._twins
        seen: list[tuple[int, int]] = []

        def weigh(*_: Any) -> None:
            weights = sum(b.values.untyped_storage().nbytes() > 0 for b in twins._buckets)
            seen.append((weights, sum(b.gradients.untyped_storage().nbytes() > 0 for b in twins._buckets)))

        weigh()
        layer = model.stages[0][2]
        layer.attention.register_forward_hook(weigh)
        layer.attention.register_full_backward_hook(weigh)
        train_step(_rows(mesh), executor=executors.train, engine=engine, mesh=mesh, lr=1e-3)
        weigh()
        most = max(len(uses) + len(more) for uses, more in zip(twins._uses, twins._uses[1:], strict=False))
        return seen, most, {p.shape for p in layer.parameters()}

    for seen, most, shapes in run_ranks(work, 2):
        assert seen[0] == seen[-1] == (0, 0)
        assert all(0 < weights <= most for weights, _ in seen[1:-1])
        assert {gradients for _, gradients in seen[1:-1]} == {0, most // 2}
        assert (64, 64) in shapes  # parameters keep theirs while their memory is free


def test_evaluation_and_generation_find_weights() -> None:
    """After a step: the loss of the evaluation, and a text, as in one process of the native engine."""

    def work_of(config: Config) -> Any:
        def work(rank: int, size: int) -> Any:
            mesh, model, engine, executors = _made(config, rank, size)
            train_step(_rows(mesh), executor=executors.train, engine=engine, mesh=mesh, lr=1e-2)
            model.eval()
            with torch.no_grad():
                totals = executors.evaluate.run(_rows(mesh))
            loss = global_sum(totals, "loss", mesh=mesh).item()
            text = Generator(model, mesh).extend([1, 2, 3], num_tokens=5, sampling=Sampling(temperature=0.0))
            train_step(_rows(mesh), executor=executors.train, engine=engine, mesh=mesh, lr=1e-2)
            return loss, text

        return work

    alone = run_ranks(work_of(make_config(TIED, Case(micro=4), precision="fp32")), 1)
    got = run_ranks(work_of(make_config(TIED, replace(DS, tensor=2, data=2), precision="fp32")), 4)
    for loss, text in got:
        assert loss == pytest.approx(alone[0][0], rel=1e-6)
        assert text == alone[0][1]
