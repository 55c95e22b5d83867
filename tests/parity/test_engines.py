"""Engines against one another: 20 steps of each stage in float32, and a short run of every choice of README's table.

The reference is the native engine in one process. A block whose gradient is zero in theory, of which rounding makes
anything, is left out by name: the bias of attention's keys, which the softmax does not see.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from megads.assemble.engine_table import Choice, rows  # noqa: E402
from megads.assemble.rules_engine import STAGES  # noqa: E402
from megads.assemble.step import train_step  # noqa: E402
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of  # noqa: E402
from megads.config.root import Config  # noqa: E402
from megads.config.update import GroupConfig  # noqa: E402
from megads.parallel.mesh import build_mesh  # noqa: E402
from megads.verify.batch import synthetic_batch  # noqa: E402
from tests.parity.harness import Case, Model, assemble, make_config  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

NUM_STEPS = 20
ZERO_GRADIENT = "attention.qkv.bias"  # of which the middle third are keys
GPT = Model("gpt", layers=2)


@dataclass(frozen=True)
class Trained:
    """What came out: losses and norms by step, logical tensors by kind and name."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def imported_before_the_fork() -> None:
    """DeepSpeed's first `initialize` in a process imports torch's compiler: 2 s that every rank would pay."""
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


@pytest.fixture(autouse=True)
def fp16_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 on a CPU that torch computes it on."""
    accelerator = type(deepspeed.accelerator.get_accelerator())
    monkeypatch.setattr(accelerator, "is_fp16_supported", lambda self: True)


def train(config: Config, num_ranks: int, *, num_steps: int) -> Trained:
    """Train on synthetic batches; a step that finds the loss scale is taken again."""

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=config.model.vocab or 1)
        engine = build_engine(config, model, mesh=mesh)
        executor = build_executors(config, model, mesh=mesh).train
        num_rows = config.batch.global_size // mesh.layout.data
        first = mesh.group("dp").rank * num_rows
        losses, norms, step = [], [], 1
        while step <= num_steps:
            batch = synthetic_batch(config, step).rows(first, first + num_rows)
            result = train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
            if bool(result.report.finite):
                losses.append(result.loss.item())
                norms.append(result.report.grad_norm.item())
                step += 1
        return losses, norms, [(p.name, p.shape, p.box.slices, p.tensor.clone()) for p in engine.state()]

    results = run_ranks(work, num_ranks)
    assert all(result[:2] == results[0][:2] for result in results), "ranks disagree"
    losses, norms, _ = results[0]
    return Trained(losses, norms, assemble([parts for _, _, parts in results]))


def far(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], *, bound: float) -> list[str]:
    """Tensors that differ by more than `bound`, relative in the Euclidean norm."""
    assert got.keys() == expected.keys()
    told = []
    for name, values in expected.items():
        mine, theirs = got[name], values
        if name.endswith(ZERO_GRADIENT):
            mine, theirs = (torch.cat([t.chunk(3)[0], t.chunk(3)[2]]) for t in (mine, theirs))
        error = float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))
        if error > bound:
            told.append(f"{name}: {error:.1e}")
    return told


def _config(case: Case, name: str) -> Config:
    config = make_config(GPT, case, precision="fp32")
    return replace(config, optim=replace(config.optim, name=name, eps=1e-4))


@functools.cache
def _alone(name: str) -> Trained:
    return train(_config(Case(micro=4), name), 1, num_steps=NUM_STEPS)


LAYOUTS = {"tensor": Case(tensor=2, data=2, micro=7), "pipeline": Case(pipeline=2, data=2, micro=7)}
ENGINES = [(engine, stage) for engine, stages in STAGES.items() for stage in stages]
LONG_RUNS = [
    pytest.param(
        engine,
        stage,
        layout,
        name,
        id=f"{engine}-{stage}-{layout}-{name}",
        # one of the layouts and optimizers of each stage by default
        marks=[]
        if (layout == "pipeline", name == "sgd") == (bool(stage % 3), stage == 1)
        else pytest.mark.slow,
    )
    for engine, stage in ENGINES
    for layout in LAYOUTS
    for name in ("adamw", "sgd")
    if not (stage == 3 and layout == "pipeline")
]


@pytest.mark.parametrize(("engine", "stage", "layout", "name"), LONG_RUNS)
def test_every_stage_trains_alike(engine: str, stage: int, layout: str, name: str) -> None:
    case = replace(LAYOUTS[layout], engine=engine, zero=stage)
    reference = _alone(name)
    got = train(_config(case, name), 4, num_steps=NUM_STEPS)
    assert got.losses == pytest.approx(reference.losses, rel=1e-6)
    assert not far(got.tensors, reference.tensors, bound=1e-4 if name == "adamw" else 1e-6)


def _grouped(case: Case) -> Config:
    config = _config(case, "adamw")
    groups = (
        GroupConfig(match="*.bias", lr_scale=3.0),
        GroupConfig(match="layers.0.mlp.*.weight", lr_scale=0.5, weight_decay=0.3, eps=1e-3),
    )
    return replace(config, optim=replace(config.optim, groups=groups, ema=(0.5, 0.9)))


@pytest.mark.parametrize(("stage", "layout"), [(0, "tensor"), (2, "pipeline"), (3, "tensor")])
def test_groups_and_averages_are_the_same_under_deepspeed(stage: int, layout: str) -> None:
    reference = train(_grouped(Case(micro=4)), 1, num_steps=4)
    got = train(_grouped(replace(LAYOUTS[layout], engine="deepspeed", zero=stage)), 4, num_steps=4)
    assert {name.partition("/")[0] for name in got.tensors} == {"model", "optim", "ema_0.5", "ema_0.9"}
    assert not far(got.tensors, reference.tensors, bound=1e-4)
    plain = train(_config(Case(micro=4), "adamw"), 1, num_steps=4)
    assert far(reference.tensors, reference.tensors | plain.tensors, bound=1e-3), "groups change nothing"


@functools.cache
def _choice_alone(precision: Any, has_experts: bool) -> Trained:
    experts = "on every rank" if has_experts else "none"
    choice = Choice("native", 0, "none", precision, "none", experts)
    return train(choice.config, 1, num_steps=2)


def _choices() -> list[Any]:
    """All choices of the table; of each row one runs by default, others in turn."""
    found = []
    for number, row in enumerate(rows()):
        for place, choice in enumerate(row.choices):
            is_default = place == 11 * number % len(row.choices)
            words = (choice.engine, choice.zero_stage, choice.offload, choice.precision)
            name = "-".join(map(str, (*words, choice.pipeline, choice.experts))).replace(" ", "_")
            found.append(pytest.param(choice, id=name, marks=[] if is_default else pytest.mark.slow))
    return found


CHOICES = _choices()


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_the_table_trains(choice: Choice) -> None:
    """fp64 and fp32: as one process; bf16 and fp16: with at most twice its error in the loss."""
    has_experts = choice.experts != "none"
    exact, alone = (_choice_alone(p, has_experts) for p in ("fp64", choice.precision))
    got = train(choice.config, choice.num_ranks, num_steps=2)
    if choice.precision in ("fp64", "fp32"):
        bound = 1e-12 if choice.precision == "fp64" else 1e-6
        assert got.losses == pytest.approx(exact.losses, rel=bound)
        assert got.norms == pytest.approx(exact.norms, rel=10 * bound)
        return
    for mine, one, true in zip(got.losses, alone.losses, exact.losses, strict=True):
        assert abs(mine / true - 1) <= 2 * max(abs(one / true - 1), 1e-3)


def test_the_default_runs_meet_everything_in_the_table() -> None:
    chosen = [p.values[0] for p in CHOICES if not p.marks]
    every = [p.values[0] for p in CHOICES]
    for field in ("engine", "zero_stage", "offload", "precision", "pipeline", "experts"):
        assert {getattr(c, field) for c in chosen} == {getattr(c, field) for c in every}, field
