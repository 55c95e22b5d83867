"""The learning rate: warm-up, shapes, ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megads.config.optim import OptimConfig
from megads.optim.schedule import learning_rate


def rates(config: OptimConfig, total: int) -> list[float]:
    return [learning_rate(step, config, total_steps=total) for step in range(1, total + 1)]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, decay="constant")
    assert rates(config, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    assert rates(OptimConfig(lr=1e-3, decay="constant"), 2) == [1e-3, 1e-3]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_goes_down_to_the_minimum_and_stays(decay: str) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, decay=decay, decay_steps=10)  # type: ignore[arg-type]
    found = rates(config, 14)
    assert found[1] == 1.0
    assert all(a > b for a, b in pairwise(found[1:10]))
    assert found[9:] == pytest.approx([0.1] * 5)
    middle = learning_rate(6, config, total_steps=14)
    assert middle == pytest.approx(0.55)  # half of the way, in both shapes
    if decay == "cosine":
        assert learning_rate(4, config, total_steps=14) == pytest.approx(
            0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
        )
