"""`verify/routing.py`: a near-tie goes the reference's way, and only a near-tie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megads.config.root import Config
from megads.verify.measure import Watch, measure
from megads.verify.outcome import Outcome
from megads.verify.routing import Routes
from tests.parity.harness import Case, Model, make_config

MOE = Model("llama", layers=2, overrides={"experts": 4, "expert_ffn": 16, "init_std": 0.1})


def config_of(case: Case, precision: str) -> Config:
    return make_config(MOE, case, precision=precision)


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return measure(config_of(Case(micro=28), "fp64"), 1, steps=2, watch=Watch(modules=False))


def test_the_reference_keeps_every_choice(reference: Outcome) -> None:
    assert set(reference.routes.experts) == {
        (step, f"layers.{layer}.mlp.router.choice") for step in (1, 2) for layer in (0, 1)
    }
    for chosen in reference.routes.experts.values():
        assert chosen.shape == (28, 10, 2)
        assert (
            chosen[..., 0] != chosen[..., 1]
        ).all()  # of two experts, neither twice: every token was written
    assert sum(near.mean() for near in reference.routes.is_near.values()) < 0.01


def forced(reference: Outcome, *, is_near: bool) -> Outcome:
    """The reference with every choice turned to the next expert."""
    routes = Routes(
        {key: (chosen + 1) % 4 for key, chosen in reference.routes.experts.items()},
        {key: np.full_like(near, is_near) for key, near in reference.routes.is_near.items()},
    )
    return replace(reference, routes=routes)


@pytest.mark.parametrize("case", [Case(micro=28), Case(tensor=2, data=2, expert=2, micro=2)], ids=str)
def test_only_near_ties_are_replaced(reference: Outcome, case: Case) -> None:
    config = config_of(case, "fp32")
    same = measure(
        config, case.world_size, steps=2, watch=Watch(forced(reference, is_near=False), modules=False)
    )
    assert same.num_replayed == 0
    assert same.num_choices == 2 * 2 * 280
    assert same.losses == pytest.approx(reference.losses, rel=1e-6)
    other = measure(
        config, case.world_size, steps=2, watch=Watch(forced(reference, is_near=True), modules=False)
    )
    assert other.num_replayed == other.num_choices
    assert other.losses != pytest.approx(reference.losses, rel=1e-6)
