"""Which steps are admitted: against a plain loop over lists, through a checkpoint, and with windows that change."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from megads.config.guard import GuardConfig
from megads.optim.guard import SpikeGuard

CPU = torch.device("cpu")
SPIKES = {25: (9.0, 1.0), 31: (3.0, 40.0), 44: (math.nan, 1.0), 45: (3.0, math.inf), 59: (8.0, 1.0)}


def numbers(count: int) -> list[tuple[float, float]]:
    """Losses and norms of steps, with spikes of either."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    rows = [(3.0 - 0.002 * t + 0.02 * a, 1.0 + 0.1 * b) for t, (a, b) in enumerate(noise.tolist())]
    return [SPIKES.get(t, row) for t, row in enumerate(rows)]


def admit(guard: SpikeGuard, row: tuple[float, float]) -> bool:
    loss, norm = (torch.tensor(value, dtype=torch.float64) for value in row)
    guard.expect(loss)
    return bool(guard.admits(norm))


def plain(rows: list[tuple[float, float]], config: GuardConfig) -> list[bool]:
    taken: list[tuple[float, float]] = []
    verdicts = []
    for row in rows:
        last = taken[-config.window :]
        is_sound = all(map(math.isfinite, row))
        if 2 * len(last) >= config.window:
            for value, seen in zip(row, zip(*last, strict=True), strict=True):
                is_sound &= value <= statistics.mean(seen) + config.sigma * statistics.stdev(seen)
        verdicts.append(is_sound)
        taken += [row] * is_sound
    return verdicts


@pytest.mark.parametrize("window", [20, 21, 60])
def test_equal_to_a_plain_loop(window: int) -> None:
    config, rows = GuardConfig(window=window), numbers(70)
    guard = SpikeGuard(config, CPU)
    verdicts = [admit(guard, row) for row in rows]
    assert verdicts == plain(rows, config)
    found = {t for t, is_sound in enumerate(verdicts) if not is_sound}
    if window == 60:  # less than half of it is known by step 25
        assert found == set(SPIKES) - {25}
    else:
        assert found == set(SPIKES)


def test_a_checkpoint_keeps_every_bit() -> None:
    config, rows = GuardConfig(window=10, sigma=2.0), numbers(60)
    straight, stopped = SpikeGuard(config, CPU), SpikeGuard(config, CPU)
    for number, row in enumerate(rows):
        assert admit(straight, row) is admit(stopped, row)
        assert torch.equal(straight.bounds, stopped.bounds)
        if number % 7 == 3:
            state = json.loads(json.dumps(stopped.state()))
            stopped = SpikeGuard(config, CPU)
            stopped.load(state)


@pytest.mark.parametrize("size", [6, 24])
def test_a_window_of_another_size_takes_the_last_steps(size: int) -> None:
    rows = [row for row in numbers(43) if row not in SPIKES.values()]
    guard = SpikeGuard(GuardConfig(window=12), CPU)
    for row in rows:
        admit(guard, row)
    other = SpikeGuard(GuardConfig(window=size), CPU)
    other.load(guard.state())
    admit(other, (3.0, 1.0))
    seen = list(zip(*rows[-min(size, 12) :], strict=True))
    expected = [statistics.mean(s) + 6.0 * statistics.stdev(s) for s in seen]
    assert other.bounds.tolist() == pytest.approx(expected, rel=1e-12)
