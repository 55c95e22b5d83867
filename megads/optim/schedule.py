"""The learning rate as a function of the step. No state: resuming is arithmetic."""

from __future__ import annotations

import math

from megads.config.optim import OptimConfig


def learning_rate(step: int, config: OptimConfig, *, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1).

    Linear from 0 to `lr` over the warm-up, reached at step `warmup_steps`; then `decay` down to `min_lr`,
    reached at step `decay_steps` (default `total_steps`), and constant from there.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    end = config.decay_steps or total_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if config.decay == "cosine" else 1.0 - progress
    return config.min_lr + (config.lr - config.min_lr) * shape
