"""Mixtral (Jiang et al. 2024): Llama's trunk with experts in every layer, the gates of a token summing to 1."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megads.checkpoint.hf_names import Family, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.model.family import ModelFamily
from megads.model.hugging_face import (
    EXPERT_ROWS,
    IGNORED,
    PREFIX,
    TRUNK_ROWS,
    experts_to,
    layer_row,
    sizes_from,
    sizes_to,
)
from megads.model.llama import swiglu_width

_EXPERTS = "block_sparse_moe.experts.*"
_STACKED = tuple(row for row in EXPERT_ROWS if not row.is_dealt)  # as transformers 5 may store them


def _to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    facts = experts_to(model)
    if not model.renormalise or len(model.expert_layers) < model.layers:
        raise CheckpointError(
            "Mixtral in transformers has experts in every layer, the gates of a token divided by their sum",
            found=f"model.renormalise {model.renormalise}, experts in layers {list(model.expert_layers)}",
            allowed="model.renormalise true, model.dense_layers 0; model.family qwen3_moe for others",
        )
    return {
        "architectures": ["MixtralForCausalLM"],
        **sizes_to(model),
        **facts,
        "intermediate_size": model.expert_ffn,
        "num_local_experts": model.experts,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "sliding_window", allowed=(None,), default=None)
    require(config, "router_jitter_noise", allowed=(0, None), default=0)
    sizes = sizes_from(config, theta=1e6)
    return {
        **sizes,
        "norm_eps": config.get("rms_norm_eps", 1e-5),
        "experts": config.get("num_local_experts", config.get("num_experts")),
        "experts_per_token": config.get("num_experts_per_tok", 2),
        "renormalise": True,
    }


MIXTRAL = ModelFamily(
    hugging_face=Family(
        model_type="mixtral",
        rows=(
            *TRUNK_ROWS,
            layer_row("mlp.router", "block_sparse_moe.gate"),
            layer_row("mlp.experts.gate_up", f"{_EXPERTS}.w1", f"{_EXPERTS}.w3"),
            layer_row("mlp.experts.down", f"{_EXPERTS}.w2"),
            *_STACKED,
        ),
        ignored=IGNORED,
        prefix=PREFIX,
        to_config=_to_hugging_face,
        from_config=_from_hugging_face,
    ),
    defaults=MappingProxyType({"norm_eps": 1e-5, "rope_theta": 1e6, "tied": False, "renormalise": True}),
    ffn=swiglu_width,
)
