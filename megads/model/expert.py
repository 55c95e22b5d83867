"""What the keys of a config make of experts, and the terms of the loss that a model has."""

from __future__ import annotations

from megads.config.model import ModelConfig
from megads.layers.router import MoESpec

DEFAULT_BALANCE_WEIGHT = 0.001


def describe_experts(config: ModelConfig, *, ffn: int) -> MoESpec | None:
    """The experts that `config` means, nothing left open; None: a dense model.

    Args:
        ffn: width of a dense layer, and of an expert where the config names none.
    """
    if config.experts is None:
        return None
    expert_ffn = config.expert_ffn or ffn
    default_weight = 0.0 if config.balance in ("none", "bias") else DEFAULT_BALANCE_WEIGHT
    return MoESpec(
        experts=config.experts,
        per_token=config.experts_per_token,
        ffn=expert_ffn,
        shared_ffn=config.shared_experts * expert_ffn,
        dense_layers=config.dense_layers,
        scores=config.router,
        renormalises=config.renormalise,
        scaling=config.routed_scaling,
        groups=config.expert_groups,
        groups_per_token=config.groups_per_token,
        group_score=config.group_score or ("max" if config.router == "softmax" else "top2"),
        balance=config.balance,
        balance_weight=default_weight if config.balance_weight is None else config.balance_weight,
        bias_rate=config.bias_rate,
        z_weight=config.z_loss,
        capacity=config.capacity,
    )
