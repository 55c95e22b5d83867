"""Cross-checks of the optimizer, its engine and the length of the run.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.deepspeed_keys import OWNED, owned_keys
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


def engine_has_stage(config: Config, world_size: int) -> Finding | None:
    engine, stage = config.optim.engine, config.optim.zero_stage
    stages = (1, 2) if engine == "deepspeed" else (0, 1)
    if stage in stages:
        return None
    return Finding(
        "optim.zero_stage",
        f"{stage} with optim.engine {engine}",
        f"{stages[0]} or {stages[1]} with {engine}",
        f"optim.engine={'native' if engine == 'deepspeed' else 'deepspeed'} has it",
    )


def engine_has_precision(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.engine != "deepspeed" or optim.precision != "fp64":
        return None
    return Finding(
        "optim.precision",
        "fp64 with optim.engine deepspeed, whose masters are float32",
        "fp32, bf16, or fp16",
        "optim.engine=native has fp64",
    )


def deepspeed_keys_have_reader(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.engine == "deepspeed" or not optim.deepspeed:
        return None
    return Finding(
        "optim.deepspeed",
        f"{', '.join(optim.deepspeed)} with optim.engine {optim.engine}, which does not read them",
        "no keys, or optim.engine deepspeed",
    )


def deepspeed_keys_are_free(config: Config, world_size: int) -> Finding | None:
    zero = config.optim.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return Finding(
            "optim.deepspeed", f"zero_optimization: {zero}", "zero_optimization: {key: value, ...}"
        )
    owned = owned_keys(config.optim.deepspeed)
    if not owned:
        return None
    return Finding(
        "optim.deepspeed",
        f"{', '.join(owned)}, which megads sets itself",
        "keys of DeepSpeed that megads has no part in",
        "; ".join(f"instead of {name}: {OWNED[name]}" for name in owned),
    )


RULES: tuple[Rule, ...] = (
    decay_goes_down,
    warmup_ends_before_decay,
    stop_is_in_run,
    engine_has_stage,
    engine_has_precision,
    deepspeed_keys_have_reader,
    deepspeed_keys_are_free,
)
