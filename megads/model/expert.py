"""What the keys of a config make of experts."""

from __future__ import annotations

from dataclasses import replace

from megads.config.model import ModelConfig
from megads.layers.router import MoESpec

DEFAULT_BALANCE_WEIGHT = 0.001


def complete_experts(config: ModelConfig) -> ModelConfig:
    """The config with the keys of experts written out that it leaves open; as it is, if it has none."""
    if config.experts is None:
        return config
    default_weight = 0.0 if config.balance in ("none", "bias") else DEFAULT_BALANCE_WEIGHT
    return replace(
        config,
        expert_ffn=config.expert_ffn or config.ffn,
        renormalise=bool(config.renormalise),
        group_score=config.group_score or ("max" if config.router == "softmax" else "top2"),
        balance_weight=default_weight if config.balance_weight is None else config.balance_weight,
    )


def describe_experts(config: ModelConfig) -> MoESpec | None:
    """The experts that a complete config means; None: a dense model."""
    if config.experts is None:
        return None
    if (
        config.expert_ffn is None
        or config.group_score is None
        or config.balance_weight is None
        or config.router is None
    ):
        raise ValueError("the config is not complete: catalog.complete")
    return MoESpec(
        experts=config.experts,
        per_token=config.experts_per_token,
        ffn=config.expert_ffn,
        shared_ffn=config.shared_experts * config.expert_ffn,
        scores=config.router,
        renormalises=bool(config.renormalise),
        scaling=config.routed_scaling,
        groups=config.expert_groups,
        groups_per_token=config.groups_per_token,
        group_score=config.group_score,
        balance=config.balance,
        balance_weight=config.balance_weight,
        bias_rate=config.bias_rate,
        z_weight=config.z_loss,
        capacity=config.capacity,
    )
