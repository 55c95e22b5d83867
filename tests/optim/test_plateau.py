"""Lower when validation no longer improves: torch's ReduceLROnPlateau, loss by loss, through a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from megads.config.schedule import PlateauConfig
from megads.optim.plateau import Plateau

CONFIGS = (
    PlateauConfig(factor=0.5, patience=2),
    PlateauConfig(factor=0.1, patience=0, threshold=0.02),
    PlateauConfig(factor=0.7, patience=1, cooldown=3),
)


def losses(seed: int) -> list[float]:
    """A loss that goes down ever more slowly, with noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.randn(80, generator=generator, dtype=torch.float64)
    return (3.0 + torch.arange(1, 81, dtype=torch.float64) ** -0.5 + noise).tolist()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equal_to_torchs(config: PlateauConfig) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    theirs = ReduceLROnPlateau(
        optimizer,
        factor=config.factor,
        patience=config.patience,
        threshold=config.threshold,
        cooldown=config.cooldown,
        eps=0.0,
    )
    ours = Plateau(config)
    for number, loss in enumerate(losses(1)):
        theirs.step(loss)
        before = ours.factor
        assert ours.observe(loss) is (ours.factor != before)
        assert 1e-2 * ours.factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        if number == 40:  # killed and started again
            state = json.loads(json.dumps(ours.state()))
            ours = Plateau(config)
            ours.load(state)
    assert ours.num_reductions >= 3
