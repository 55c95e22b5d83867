"""The Qwen families: Qwen2.5 (Qwen team 2024) with biases on q, k and v; Qwen3 (2025) with a norm on each head of q and
k instead, dense or with experts in some or all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from megads.checkpoint.hf_names import Family, Row, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.model.family import ModelFamily, grouped_attention
from megads.model.hugging_face import (
    EXPERT_ROWS,
    IGNORED,
    PREFIX,
    QK_NORM_ROWS,
    TRUNK_ROWS,
    experts_to,
    refuse_experts,
    sizes_from,
    sizes_to,
)
from megads.model.llama import swiglu_width

DEFAULTS = MappingProxyType({"norm_eps": 1e-6, "rope_theta": 1e6, "tied": False})
QWEN3_HEAD_DIM = 128  # where config.json of a dense Qwen3 is silent

_BIASES = tuple(f"model.layers.*.self_attn.{part}_proj.bias" for part in "qkv")
_family = partial(Family, ignored=IGNORED, prefix=PREFIX)


def _qwen2_to(model: ModelConfig) -> dict[str, Any]:
    refuse_experts(model)
    if model.hidden != model.heads * (model.head_dim or 0):
        raise CheckpointError(
            "Qwen2 in transformers has heads of width hidden / heads",
            found=f"model.head_dim {model.head_dim} x {model.heads} heads, model.hidden {model.hidden}",
            allowed="model.head_dim null; model.family qwen3 for others",
        )
    return {"architectures": ["Qwen2ForCausalLM"], **sizes_to(model), "use_sliding_window": False}


def _qwen3_to(model: ModelConfig) -> dict[str, Any]:
    refuse_experts(model)
    facts = {"attention_bias": False, "use_sliding_window": False}
    return {"architectures": ["Qwen3ForCausalLM"], **sizes_to(model), **facts}


def _qwen3_from(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "attention_bias", allowed=(False,), default=False)
    return sizes_from(config, head_dim=QWEN3_HEAD_DIM)


def _qwen3_moe_to(model: ModelConfig) -> dict[str, Any]:
    dense = sorted(set(range(model.layers)) - set(model.expert_layers))
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **sizes_to(model),
        **experts_to(model),
        "attention_bias": False,
        "use_sliding_window": False,
        "num_experts": model.experts,
        "moe_intermediate_size": model.expert_ffn,
        "norm_topk_prob": model.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }


def _qwen3_moe_from(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "attention_bias", allowed=(False,), default=False)
    return {
        **sizes_from(config),
        "experts": config.get("num_experts", config.get("num_local_experts")),
        "experts_per_token": config.get("num_experts_per_tok", 8),
        "expert_ffn": config.get("moe_intermediate_size"),
        "renormalise": config.get("norm_topk_prob", False),
        "dense_layers": _dense_layers(config),
    }


def _dense_layers(config: Mapping[str, Any]) -> int | list[int]:
    """Layers without experts: those that `mlp_only_layers` lists, and those that `decoder_sparse_step` passes over."""
    layers, step = config.get("num_hidden_layers"), config.get("decoder_sparse_step", 1)
    listed = config.get("mlp_only_layers") or []
    if not isinstance(step, int) or step < 1 or not all(isinstance(number, int) for number in listed):
        raise CheckpointError(
            "config.json: layers without experts are not given as numbers",
            found=f"decoder_sparse_step {step}, mlp_only_layers {listed}",
            allowed="a whole number from 1 on, and a list of numbers",
        )
    skipped = range(layers) if isinstance(layers, int) and step > 1 else ()
    return sorted({*listed, *(number for number in skipped if (number + 1) % step)}) or 0


QWEN2 = ModelFamily(
    hugging_face=_family(
        model_type="qwen2",
        rows=(*TRUNK_ROWS, Row("layers.*.attention.qkv.bias", _BIASES)),
        to_config=_qwen2_to,
        from_config=sizes_from,
    ),
    defaults=DEFAULTS,
    ffn=swiglu_width,
    attention=partial(grouped_attention, qkv_bias=True),
)

QWEN3 = ModelFamily(
    hugging_face=_family(
        model_type="qwen3", rows=(*TRUNK_ROWS, *QK_NORM_ROWS), to_config=_qwen3_to, from_config=_qwen3_from
    ),
    defaults=DEFAULTS,
    ffn=swiglu_width,
    attention=partial(grouped_attention, qk_norm=True),
)

QWEN3_MOE = ModelFamily(
    hugging_face=_family(
        model_type="qwen3_moe",
        rows=(*TRUNK_ROWS, *QK_NORM_ROWS, *EXPERT_ROWS),
        to_config=_qwen3_moe_to,
        from_config=_qwen3_moe_from,
    ),
    defaults=MappingProxyType({**DEFAULTS, "renormalise": True}),
    ffn=swiglu_width,
    attention=partial(grouped_attention, qk_norm=True),
)
