"""Cross-checks of what a run loads and starts from. One small pure function a rule; `rules.py` joins the tables."""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.root import Config


def start_keys_have_start(config: Config, world_size: int) -> Finding | None:
    checkpoint = config.checkpoint
    keys = {
        "checkpoint.start_missing": checkpoint.start_missing,
        "checkpoint.start_unused": checkpoint.start_unused,
        "checkpoint.start_other_vocab": checkpoint.start_other_vocab,
    }
    given = [key for key, value in keys.items() if value]
    if checkpoint.start is not None or not given:
        return None
    return Finding(
        given[0], f"{', '.join(given)} with checkpoint.start null", "none of them, or checkpoint.start=PATH"
    )


def start_is_for_fresh_runs(config: Config, world_size: int) -> Finding | None:
    checkpoint = config.checkpoint
    if checkpoint.start is None or checkpoint.load in ("auto", "never"):
        return None
    return Finding(
        "checkpoint.start",
        f"{checkpoint.start} with checkpoint.load {checkpoint.load}, which goes on from a step",
        "auto or never",
        "checkpoint.load=auto goes on from the run's own steps, and starts from the weights where there are none",
    )


RULES: tuple[Rule, ...] = (start_keys_have_start, start_is_for_fresh_runs)
