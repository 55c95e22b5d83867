"""Cross-checks of experts: their numbers and widths against each other, the expert grid and balance.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from megads.assemble.finding import Finding, Rule, divisors, multiples
from megads.config.model import SIGMOID_FAMILIES, ModelConfig
from megads.config.root import Config

EXPERT_KEYS = (
    "experts_per_token",
    "expert_ffn",
    "shared_experts",
    "dense_layers",
    "router",
    "renormalise",
    "routed_scaling",
    "expert_groups",
    "groups_per_token",
    "group_score",
    "balance",
    "balance_weight",
    "bias_rate",
    "z_loss",
    "capacity",
)
"""Keys of section `model` that only a model with experts reads."""

DEFAULTS: Mapping[str, Any] = MappingProxyType({f.name: f.default for f in fields(ModelConfig)})


def expert_keys_have_experts(config: Config, world_size: int) -> Finding | None:
    asked = {key: getattr(config.model, key) for key in EXPERT_KEYS}
    if asked["router"] == "softmax":  # written out in the configs of older dense runs
        asked["router"] = None
    used = [f"model.{key}" for key, value in asked.items() if value != DEFAULTS[key]]
    if config.parallel.expert > 1:
        used.append("parallel.expert")
    if config.parallel.expert_tensor is not None:
        used.append("parallel.expert_tensor")
    if config.model.experts is not None or not used:
        return None
    return Finding(
        used[0],
        f"{', '.join(used)} with model.experts null, a dense model that does not read them",
        "their defaults, or a number of model.experts",
    )


def experts_are_swiglu(config: Config, world_size: int) -> Finding | None:
    if config.model.experts is None or config.model.family != "gpt":
        return None
    return Finding(
        "model.experts",
        f"{config.model.experts} with model.family gpt; an expert is a SwiGLU layer without biases",
        "null with gpt, or model.family llama",
    )


def experts_suffice_for_token(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.experts is None or model.experts % model.expert_groups:
        return None
    eligible = model.experts // model.expert_groups * min(model.groups_per_token, model.expert_groups)
    if model.experts_per_token <= eligible:
        return None
    inside = (
        f" in {model.groups_per_token} of {model.expert_groups} groups" if model.expert_groups > 1 else ""
    )
    return Finding(
        "model.experts_per_token",
        f"{model.experts_per_token} of {eligible} experts{inside}",
        f"at most {eligible}",
    )


def experts_fill_groups(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.experts is None:
        return None
    groups, rest = model.expert_groups, model.experts % model.expert_groups
    if rest:
        return Finding(
            "model.expert_groups",
            f"{groups}; model.experts {model.experts} / {groups} = {model.experts / groups:.6g} experts a group",
            f"a divisor of model.experts: {divisors(model.experts)}",
        )
    if model.groups_per_token > groups:
        return Finding(
            "model.groups_per_token",
            f"{model.groups_per_token} of model.expert_groups {groups}",
            f"at most {groups}",
        )
    return None


def groups_have_two_experts(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.experts is None or model.expert_groups == 1 or model.experts != model.expert_groups:
        return None
    is_sigmoid = model.router == "sigmoid" or (model.router is None and model.family in SIGMOID_FAMILIES)
    score = model.group_score or ("top2" if is_sigmoid else "max")
    if score == "max":
        return None
    return Finding(
        "model.group_score",
        f"top2 with {model.experts} experts in {model.expert_groups} groups: one expert a group has no best two",
        f"max, or {model.experts // 2} groups or fewer",
    )


def some_layers_have_experts(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.experts is None or model.expert_layers:
        return None
    shown = model.dense_layers if isinstance(model.dense_layers, int) else list(model.dense_layers)
    return Finding(
        "model.dense_layers",
        f"{shown} of model.layers {model.layers}: no layer has experts",
        f"at most {model.layers - 1}",
        "model.experts=null makes every layer dense",
    )


def dense_layers_exist(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if isinstance(model.dense_layers, int) or max(model.dense_layers) < model.layers:
        return None
    return Finding(
        "model.dense_layers",
        f"{list(model.dense_layers)}: there is no layer {max(model.dense_layers)} among {model.layers}",
        f"numbers from 0 to {model.layers - 1}",
    )


def balance_has_weight(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.experts is None:
        return None
    if model.balance == "none" and model.balance_weight:
        return Finding(
            "model.balance_weight",
            f"{model.balance_weight:g} with model.balance none, which has no loss",
            "null, or model.balance sequence, global or bias",
        )
    if model.balance in ("sequence", "global") and model.balance_weight == 0:
        return Finding(
            "model.balance_weight",
            f"0 with model.balance {model.balance}, which is nothing but a loss",
            "above 0, or null: 0.001",
            "model.balance=none has no balance",
        )
    if model.balance != "bias" and model.bias_rate != DEFAULTS["bias_rate"]:
        return Finding(
            "model.bias_rate",
            f"{model.bias_rate:g} with model.balance {model.balance}, which moves no bias",
            f"{DEFAULTS['bias_rate']:g}, the default, or model.balance bias",
        )
    return None


def experts_fill_expert_ranks(config: Config, world_size: int) -> Finding | None:
    experts, degree = config.model.experts, config.parallel.expert
    if experts is None or experts % degree == 0:
        return None
    return Finding(
        "parallel.expert",
        f"{degree}; model.experts {experts} / {degree} = {experts / degree:.6g} experts a rank",
        f"a divisor of model.experts: {divisors(experts)}",
    )


def expert_grid_fills_stage(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    if config.model.experts is None or world_size % parallel.pipeline:
        return None
    stage = world_size // parallel.pipeline
    tensor = parallel.expert_tensor or parallel.tensor
    if stage % (parallel.expert * tensor) == 0:
        return None
    fitting = [n for n in range(1, stage + 1) if stage % (n * tensor) == 0]
    allowed = f"{', '.join(map(str, fitting))} with parallel.expert_tensor {tensor}" if fitting else "none"
    return Finding(
        "parallel.expert",
        f"{parallel.expert} x expert_tensor {tensor} = {parallel.expert * tensor} ranks in a stage of {stage}",
        f"{allowed}; the experts' ranks are those of tensor x context x data",
        None if fitting else "parallel.expert_tensor=1",
    )


def expert_ffn_fills_tensor(config: Config, world_size: int) -> Finding | None:
    model, parallel = config.model, config.parallel
    ffn, tensor = model.expert_ffn or model.ffn, parallel.expert_tensor or parallel.tensor
    if model.experts is None or ffn is None or ffn % tensor == 0:
        return None
    return Finding(
        "model.expert_ffn",
        f"{ffn}; {ffn} / parallel.expert_tensor {tensor} = {ffn / tensor:.6g} columns a rank",
        f"a multiple of {tensor}: {multiples(ffn, tensor)}",
        "parallel.expert_tensor=1 keeps experts whole",
    )


def shared_experts_fill_tensor(config: Config, world_size: int) -> Finding | None:
    model, tensor = config.model, config.parallel.tensor
    ffn = model.expert_ffn or model.ffn
    if model.experts is None or ffn is None or model.shared_experts * ffn % tensor == 0:
        return None
    width = model.shared_experts * ffn
    return Finding(
        "model.shared_experts",
        f"{model.shared_experts} x {ffn} = {width} wide; {width} / parallel.tensor {tensor} = {width / tensor:.6g}",
        f"a width that is a multiple of {tensor}: {multiples(width, tensor)}",
    )


RULES: tuple[Rule, ...] = (
    expert_keys_have_experts,
    experts_are_swiglu,
    experts_fill_groups,
    experts_suffice_for_token,
    groups_have_two_experts,
    some_layers_have_experts,
    dense_layers_exist,
    balance_has_weight,
    experts_fill_expert_ranks,
    expert_grid_fills_stage,
    expert_ffn_fills_tensor,
    shared_experts_fill_tensor,
)
