"""The native engine against plain torch: AdamW, decay, clipping, the gate, and state that comes back."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from megads.config.optim import OptimConfig
from megads.optim.precision import initial_dtype
from megads.optim.zero import NativeEngine
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill, parameter_table
from megads.parallel.shard import Init, ShardSpec

CONFIG = OptimConfig(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=None, precision="fp64")


class Toy(torch.nn.Module):
    """A decayed matrix and a vector that is not."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.matrix = scope.parameter("matrix", ShardSpec((6, 5), init=Init("normal", 1.0)))
        self.vector = scope.parameter("vector", ShardSpec((5,), init=Init("ones"), decay=False))


def make(config: OptimConfig) -> tuple[Toy, NativeEngine]:
    mesh = build_mesh(Layout(), 0)
    toy = Toy(Scope(mesh, initial_dtype(config.precision), 1, "toy"))
    for parameter in parameter_table([toy]):
        fill(parameter, seed=1)
    return toy, NativeEngine({0: torch.nn.ModuleList([toy])}, mesh, config=config)


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_an_engine_that_is_dropped_leaves_no_memory_behind(zero_stage: int) -> None:
    """Hooks of parameters must not keep their buckets: several models may be built one after the other."""
    toy, engine = make(replace(CONFIG, zero_stage=zero_stage))
    run(toy, engine, range(1, 3))
    weights = weakref.ref(engine.shares()[0].bucket)
    del toy, engine
    gc.collect()
    assert weights() is None


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((6, 5), (5,)))  # type: ignore


def run(toy: Toy, engine: NativeEngine, steps: range) -> list[float]:
    norms = []
    for step in steps:
        engine.zero_gradients()
        for parameter, gradient in zip((toy.matrix, toy.vector), gradients(step), strict=True):
            (parameter * gradient).sum().backward()
        engine.reduce(0)
        norms.append(engine.step(lr=1e-2).grad_norm.item())
    return norms


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_adamw_equals_torch(clip: float | None, zero_stage: int) -> None:
    toy, engine = make(replace(CONFIG, clip=clip, zero_stage=zero_stage, bucket_elements=7))
    matrix, vector = (
        toy.matrix.detach().clone().requires_grad_(),
        toy.vector.detach().clone().requires_grad_(),
    )
    reference = torch.optim.AdamW(
        [{"params": [matrix], "weight_decay": 0.1}, {"params": [vector], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    norms = run(toy, engine, range(1, 6))
    for step in range(1, 6):
        matrix.grad, vector.grad = gradients(step)
        expected = torch.nn.utils.clip_grad_norm_([matrix, vector], clip or 1e30)
        assert norms[step - 1] == pytest.approx(expected.item(), rel=1e-12)
        reference.step()
    # torch divides by (norm + 1e-6) when it clips; the factor differs by 1e-6 / norm
    bound = 1e-12 if clip is None else 1e-6
    assert torch.allclose(toy.matrix, matrix, rtol=bound, atol=bound)
    assert torch.allclose(toy.vector, vector, rtol=bound, atol=bound)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    toy, engine = make(CONFIG)
    run(toy, engine, range(1, 3))
    before = [p.tensor.clone() for p in engine.state()]
    engine.zero_gradients()
    toy.matrix.grad[2, 3] = float("inf")
    report = engine.step(lr=1e-2)
    assert not report.finite.item()
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, engine.state(), strict=True))
    assert engine.scalars()["step"] == 2
    assert run(toy, engine, range(3, 4))[0] > 0


def test_state_goes_on_bit_for_bit() -> None:
    toy, engine = make(CONFIG)
    run(toy, engine, range(1, 4))
    saved, scalars = {(p.name, p.box): p.tensor.clone() for p in engine.state()}, engine.scalars()
    run(toy, engine, range(4, 7))
    other, fresh = make(CONFIG)
    for piece in fresh.targets():
        piece.tensor.copy_(saved[piece.name, piece.box])
    fresh.load_scalars(scalars)
    run(other, fresh, range(4, 7))
    assert torch.equal(toy.matrix, other.matrix) and torch.equal(toy.vector, other.vector)


def test_sgd_has_no_state_and_no_decay() -> None:
    toy, engine = make(replace(CONFIG, name="sgd"))
    start = toy.matrix.detach().clone()
    run(toy, engine, range(1, 2))
    assert torch.allclose(toy.matrix, start - 1e-2 * gradients(1)[0], rtol=0, atol=1e-15)
    assert {p.name.split("/")[0] for p in engine.state()} == {"model"}
