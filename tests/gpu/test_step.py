"""A training step on a GPU: the same numbers as on the CPU, and a host that never waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from megads.assemble.step import StepResult, train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.optim.engine import Engine
from megads.parallel.mesh import Mesh, build_mesh
from megads.pipeline.executor import Executor
from tests.parity.harness import VOCAB, Case, Model, make_batch, make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EXPERTS = Model(
    "llama",
    layers=2,
    overrides={
        "experts": 8,
        "expert_ffn": 16,
        "shared_experts": 1,
        "router": "sigmoid",
        "renormalise": True,
        "balance": "bias",
        "balance_weight": 1e-3,
        "z_loss": 1e-3,
    },
)
MODELS = (Model("gpt", dropout=0.1), Model("gpt"), Model("llama"), EXPERTS)


@dataclass(frozen=True)
class Trainee:
    """One process' parts on one device."""

    mesh: Mesh
    engine: Engine
    executor: Executor
    weights: dict[str, torch.Tensor]

    def step(self, number: int) -> StepResult:
        batch = make_batch(number).to(self.mesh.device)
        return train_step(batch, executor=self.executor, engine=self.engine, mesh=self.mesh, lr=1e-3)


def build(model: Model, device: str, *, precision: str) -> Trainee:
    config = make_config(model, Case(micro=7), precision=precision)
    mesh = build_mesh(layout_of(config, 1), 0, device=torch.device(device))
    parts = build_model(config, mesh, vocab=VOCAB)
    weights = {p.logical_name: p.detach().cpu().clone() for p in parts.parameters}
    engine = build_engine(config, parts, mesh=mesh)
    executor = build_executors(config, parts, mesh=mesh).train
    parts.train()
    return Trainee(mesh, engine, executor, weights)


@pytest.mark.parametrize("model", MODELS, ids=["gpt-dropout", "gpt", "llama", "experts"])
def test_as_on_the_cpu(model: Model) -> None:
    """The same initial bits; in float64 the same losses and norms; in low precision close to them."""
    exact, double = build(model, "cpu", precision="fp64"), build(model, "cuda", precision="fp64")
    assert all(torch.equal(exact.weights[name], double.weights[name]) for name in exact.weights)
    runs = {p: build(model, "cuda", precision=p) for p in ("fp32", "bf16", "fp16")}
    for number in (1, 2, 3):
        expected = exact.step(number)
        for trainee, bound in (
            (double, 1e-11),
            (runs["fp32"], 1e-5),
            (runs["bf16"], 1e-2),
            (runs["fp16"], 3e-3),
        ):
            got = trainee.step(number)
            assert got.loss.item() == pytest.approx(expected.loss.item(), rel=bound)
            norm = expected.report.grad_norm.item()
            assert got.report.grad_norm.item() == pytest.approx(norm, rel=10 * bound)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, a call that makes the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_host_never_waits_in_a_step(family: str, precision: str) -> None:
    check_no_waiting(build(Model(family), "cuda", precision=precision))


def test_the_host_never_waits_for_experts() -> None:
    """On one rank in bf16, where the grouped product takes its counts from the device."""
    check_no_waiting(build(EXPERTS, "cuda", precision="bf16"))


def check_no_waiting(trainee: Trainee) -> None:
    trainee.step(1)  # what is made once may wait
    batch = make_batch(2).to(trainee.mesh.device)
    with no_waiting():
        result = train_step(
            batch, executor=trainee.executor, engine=trainee.engine, mesh=trainee.mesh, lr=1e-3
        )
    assert result.loss.isfinite()


def test_waiting_is_seen() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroni"), no_waiting():
        x.sum().item()
