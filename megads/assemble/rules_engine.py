"""Cross-checks of the optimizer engine: which engine has which stage, precision, pipeline, experts and offload.

One small pure function a rule; `rules.py` joins the tables. The table in README.md is what these rules let through
(`engine_table.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from megads.assemble.deepspeed_keys import OWNED, owned_keys
from megads.assemble.finding import Finding, Rule
from megads.config.optim import OptimConfig
from megads.config.root import Config

STAGES: Mapping[str, tuple[int, ...]] = MappingProxyType({"native": (0, 1, 2), "deepspeed": (0, 1, 2, 3)})
"""ZeRO stages of each engine."""

NATIVE_KEYS = ("reduce_every", "reduce_dtype", "shard_size", "moment_dtype", "offload")
"""Keys of section `optim` that only the native engine reads."""

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {f.name: f.default for f in fields(OptimConfig) if f.name in NATIVE_KEYS}
)

WHOLE_BACKWARDS = ("gpipe", "one_f_one_b")
"""Schedules in which the backward of a block is one action."""


def engine_has_stage(config: Config, world_size: int) -> Finding | None:
    engine, stage = config.optim.engine, config.optim.zero_stage
    stages = STAGES[engine]
    if stage in stages:
        return None
    return Finding(
        "optim.zero_stage",
        f"{stage} with optim.engine {engine}",
        f"{stages[0]} to {stages[-1]} with {engine}",
        "optim.engine=deepspeed has it",
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


def engine_has_optimizer(config: Config, world_size: int) -> Finding | None:
    if config.optim.engine == "native" or config.optim.name != "muon":
        return None
    return Finding(
        "optim.name",
        "muon with optim.engine deepspeed, which updates flat slices in which no matrix is whole",
        "adamw or sgd with deepspeed",
        "optim.engine=native has muon",
    )


def native_keys_have_native_engine(config: Config, world_size: int) -> Finding | None:
    used = [f"optim.{key}" for key in NATIVE_KEYS if getattr(config.optim, key) != DEFAULTS[key]]
    if config.optim.engine == "native" or not used:
        return None
    return Finding(
        used[0],
        f"{', '.join(used)} with optim.engine deepspeed, which does not read them",
        "their defaults, or optim.engine native",
        "optim.deepspeed has communication_data_type, and zero_optimization.offload_optimizer",
    )


def gathered_weights_have_one_stage(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    if config.optim.zero_stage != 3 or parallel.pipeline == parallel.virtual_stages == 1:
        return None
    return Finding(
        "optim.zero_stage",
        f"3 with parallel.pipeline {parallel.pipeline} and virtual_stages {parallel.virtual_stages}: every micro-batch "
        "would gather each stage's weights twice, and DeepSpeed sums gradients of one micro-batch after the other",
        "parallel.pipeline 1 and virtual_stages 1 with 3",
        "optim.zero_stage=2 keeps weights whole, and a pipeline cuts them",
    )


def gathered_weights_have_whole_backwards(config: Config, world_size: int) -> Finding | None:
    optim, schedule = config.optim, config.parallel.schedule
    if optim.zero_stage != 3 or schedule in WHOLE_BACKWARDS:
        return None
    return Finding(
        "parallel.schedule",
        f"{schedule} with optim.zero_stage 3, which frees a block's gradients after its backward",
        " or ".join(WHOLE_BACKWARDS),
    )


def experts_have_engine(config: Config, world_size: int) -> Finding | None:
    parallel, stage = config.parallel, config.optim.zero_stage
    tensor = parallel.expert_tensor or parallel.tensor
    if config.model.experts is None or config.optim.engine == "native":
        return None
    if parallel.expert == 1 and tensor == parallel.tensor:
        return None
    return Finding(
        "optim.engine",
        f"{config.optim.engine} with parallel.expert {parallel.expert} and expert_tensor {tensor} of tensor "
        f"{parallel.tensor}: DeepSpeed sums all gradients over one group, and experts are copied over other ranks",
        "native, or experts that lie as all else does (parallel.expert 1, expert_tensor null)",
        f"optim.engine=native optim.zero_stage={max(s for s in STAGES['native'] if s <= stage)}",
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


def offload_is_to_host(config: Config, world_size: int) -> Finding | None:
    for name in ("offload_optimizer", "offload_param"):
        section = _offload(config, name)
        if not isinstance(section, dict) or not section.keys() <= {"device", "pin_memory"}:
            found = "whose other keys move state to where checkpoints and the gate of a step do not reach it"
        elif section.get("device", "none") not in ("cpu", "none"):
            found = "but checkpoints are made of state in memory"
        else:
            continue
        return Finding(
            "optim.deepspeed",
            f"zero_optimization.{name}: {section}, {found}",
            "{device: cpu, pin_memory: true or false}",
        )
    return None


def offload_has_stage(config: Config, world_size: int) -> Finding | None:
    stage = config.optim.zero_stage
    for name, least, what in (("offload_param", 3, "weights"), ("offload_optimizer", 1, "optimizer state")):
        section = _offload(config, name)
        is_on = isinstance(section, dict) and section.get("device", "none") != "none"
        if is_on and stage < least and config.optim.engine == "deepspeed":
            return Finding(
                "optim.deepspeed",
                f"zero_optimization.{name} with optim.zero_stage {stage}, at which {what} are whole on each rank",
                f"optim.zero_stage {least} or more" if least < 3 else "optim.zero_stage 3",
            )
    return None


def _offload(config: Config, name: str) -> Any:
    zero = config.optim.deepspeed.get("zero_optimization", {})
    return zero.get(name, {}) if isinstance(zero, dict) else {}


RULES: tuple[Rule, ...] = (
    engine_has_stage,
    engine_has_precision,
    engine_has_optimizer,
    native_keys_have_native_engine,
    gathered_weights_have_one_stage,
    gathered_weights_have_whole_backwards,
    experts_have_engine,
    deepspeed_keys_have_reader,
    deepspeed_keys_are_free,
    offload_is_to_host,
    offload_has_stage,
)
