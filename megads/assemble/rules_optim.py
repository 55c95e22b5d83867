"""Cross-checks of the optimizer and the length of the run (its engine: `rules_engine.py`).

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.root import Config


def decay_goes_down(config: Config, world_size: int) -> Finding | None:
    lr, min_lr = config.optim.lr, config.optim.min_lr
    if min_lr <= lr:
        return None
    return Finding("optim.min_lr", f"{min_lr} above optim.lr {lr}", f"at most {lr}")


def warmup_ends_before_decay(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    key, last, unit, warmup = ("run.steps", config.run.steps, "steps", optim.warmup_steps)
    if optim.decay_steps is not None:
        key, last = ("optim.decay_steps", optim.decay_steps)
    elif optim.decay_tokens is not None and optim.warmup_tokens is not None:
        key, last, unit, warmup = ("optim.decay_tokens", optim.decay_tokens, "tokens", optim.warmup_tokens)
    if warmup < last:
        return None
    return Finding(f"optim.warmup_{unit}", f"{warmup} of {key} {last}", f"at most {last - 1}")


def stop_is_in_run(config: Config, world_size: int) -> Finding | None:
    stop, steps = config.run.stop_after, config.run.steps
    if stop is None or stop <= steps:
        return None
    return Finding("run.stop_after", f"{stop} of run.steps {steps}", f"at most {steps}, or null")


RULES: tuple[Rule, ...] = (
    decay_goes_down,
    warmup_ends_before_decay,
    stop_is_in_run,
)
