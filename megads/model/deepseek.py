"""The DeepSeek families: V2 and V2-Lite (DeepSeek-AI 2024a), V3 and what has its shape (DeepSeek-AI 2024b; Moonlight).

Latent attention with interleaved rotary positions; first layers dense, then experts beside a shared MLP. V2 routes by
softmax, with groups by their best score; V3 by sigmoid and a bias that keeps experts busy alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from megads.checkpoint.hf_names import Family, Row, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.layers.mla import MLASpec
from megads.model.family import ModelFamily, known, rotary_positions
from megads.model.hugging_face import (
    EXPERT_ROWS,
    IGNORED,
    PREFIX,
    TRUNK_ROWS,
    layer_row,
    sizes_from,
    sizes_to,
)
from megads.model.llama import swiglu_width
from megads.ops.rope import RopeSpec, yarn_magnitude

LATENT_EPS = 1e-6
"""Of the norms of the latents, whatever the other norms have."""
SEQUENCE_WEIGHT = 1e-4
"""Of V3's balance loss in each sequence (section 4.2 of its report; config.json names another one)."""


def latent_attention(config: ModelConfig) -> MLASpec:
    """Latent attention of the sizes in a complete config."""
    nope_dim, rope_dim = known(config.nope_dim), known(config.rope_dim)
    sharpness = 1.0
    if config.rope_scaling == "yarn" and config.rope_mscale_all_dim is not None:
        sharpness = yarn_magnitude(config.rope_factor, config.rope_mscale_all_dim)
    return MLASpec(
        heads=config.heads,
        q_lora=config.q_lora,
        kv_lora=known(config.kv_lora),
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=known(config.v_dim),
        norm_eps=LATENT_EPS,
        scale=(nope_dim + rope_dim) ** -0.5 * sharpness**2,
    )


def interleaved_positions(config: ModelConfig) -> RopeSpec:
    """Rotary positions of a complete config, of neighbouring elements."""
    return rotary_positions(config, is_interleaved=True)


def _sizes_to(model: ModelConfig, *, router: str) -> dict[str, Any]:
    """What config.json says of both families.

    Raises:
        CheckpointError: no experts, no shared ones, or another router than transformers has.
    """
    dense = model.layers - len([n for n in model.expert_layers if n < model.layers])
    is_first = model.expert_layers == tuple(range(dense, model.layers + model.mtp_layers))
    wrong = {
        "model.experts null": model.experts is None,
        f"model.router {model.router}": model.router != router,
        "model.shared_experts 0": model.shared_experts == 0,
        f"model.capacity {model.capacity}": model.capacity is not None,
        f"model.dense_layers {model.dense_layers}": not is_first,
    }
    if found := [name for name, is_wrong in wrong.items() if is_wrong]:
        raise CheckpointError(
            f"{model.family} in transformers has first dense layers, then experts behind a {router} router and "
            "beside a shared one",
            found=", ".join(found),
            allowed="such models",
            do="keep the checkpoint as it is: megads trains, evaluates and generates from it",
        )
    sizes = sizes_to(model)
    if model.rope_scaling == "yarn" and model.rope_mscale_all_dim is not None:
        sizes["rope_scaling"] |= {"mscale": model.rope_mscale, "mscale_all_dim": model.rope_mscale_all_dim}
    return {
        **sizes,
        "head_dim": model.rope_dim,
        "q_lora_rank": model.q_lora,
        "kv_lora_rank": model.kv_lora,
        "qk_nope_head_dim": model.nope_dim,
        "qk_rope_head_dim": model.rope_dim,
        "v_head_dim": model.v_dim,
        "attention_bias": False,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "num_experts_per_tok": model.experts_per_token,
        "moe_intermediate_size": model.expert_ffn,
        "moe_layer_freq": 1,
        "first_k_dense_replace": dense,
        "routed_scaling_factor": model.routed_scaling,
        "n_group": model.expert_groups,
        "topk_group": model.groups_per_token,
        "norm_topk_prob": model.renormalise,
        "scoring_func": router,
    }


def _sizes_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the section `model` is for a config.json of both families."""
    require(config, "attention_bias", allowed=(False,), default=False)
    require(config, "moe_layer_freq", allowed=(1,), default=1)
    heads = config.get("num_attention_heads")
    require(config, "num_key_value_heads", allowed=(heads, None), default=None)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    mscales = {key: rope.pop(key, None) for key in ("mscale", "mscale_all_dim")}
    sizes = sizes_from({**config, "rope_scaling": rope, "rope_parameters": {}})
    if all(mscales.values()):
        sizes |= {f"rope_{key}": value for key, value in mscales.items()}
    elif any(mscales.values()):
        require(mscales, "mscale_all_dim", allowed=("mscale and mscale_all_dim, or neither",), default=None)
    return {
        **sizes,
        "head_dim": None,
        "kv_heads": heads,
        "q_lora": config.get("q_lora_rank"),
        "kv_lora": config.get("kv_lora_rank"),
        "nope_dim": config.get("qk_nope_head_dim"),
        "rope_dim": config.get("qk_rope_head_dim"),
        "v_dim": config.get("v_head_dim"),
        "experts": config.get("n_routed_experts", config.get("num_local_experts")),
        "shared_experts": config.get("n_shared_experts"),
        "experts_per_token": config.get("num_experts_per_tok"),
        "expert_ffn": config.get("moe_intermediate_size"),
        "dense_layers": config.get("first_k_dense_replace", 0),
        "routed_scaling": config.get("routed_scaling_factor", 1.0),
        "expert_groups": config.get("n_group") or 1,
        "groups_per_token": config.get("topk_group") or 1,
        "renormalise": config.get("norm_topk_prob", False),
    }


def _v2_to(model: ModelConfig) -> dict[str, Any]:
    sizes = _sizes_to(model, router="softmax")
    wrong = [
        name
        for name, is_wrong in {
            "model.renormalise true": model.renormalise,
            "model.balance bias": model.balance == "bias",
            f"model.group_score {model.group_score}": model.expert_groups > 1 and model.group_score != "max",
            f"model.mtp_layers {model.mtp_layers}": model.mtp_layers,
        }.items()
        if is_wrong
    ]
    if wrong:
        raise CheckpointError(
            "DeepSeek-V2 in transformers has plain gates and groups by their best score, and predicts one token",
            found=", ".join(wrong),
            allowed="model.family deepseek_v3 for others",
        )
    method = "greedy" if model.expert_groups == 1 else "group_limited_greedy"
    return {"architectures": ["DeepseekV2ForCausalLM"], **sizes, "topk_method": method}


def _v2_from(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "mlp_bias", allowed=(False,), default=False)
    require(config, "scoring_func", allowed=("softmax",), default="softmax")
    require(config, "norm_topk_prob", allowed=(False, None), default=False)
    require(config, "topk_method", allowed=("greedy", "group_limited_greedy"), default="greedy")
    is_limited = config.get("topk_method") == "group_limited_greedy"
    weight = config.get("aux_loss_alpha") if config.get("seq_aux") else None
    return {
        **_sizes_from(config),
        **({} if is_limited else {"expert_groups": 1, "groups_per_token": 1}),
        "renormalise": False,
        "router": "softmax",
        "balance": "sequence" if weight else "none",
        "balance_weight": weight or 0.0,
    }


def _v3_to(model: ModelConfig) -> dict[str, Any]:
    sizes = _sizes_to(model, router="sigmoid")
    if model.balance != "bias" or model.group_score != "top2":
        raise CheckpointError(
            "DeepSeek-V3 in transformers has a bias in its choice of experts, and groups by their best two scores",
            found=f"model.balance {model.balance}, model.group_score {model.group_score}",
            allowed="model.balance bias, model.group_score top2",
        )
    facts = {"topk_method": "noaux_tc", "rope_interleave": True, "num_nextn_predict_layers": model.mtp_layers}
    return {"architectures": ["DeepseekV3ForCausalLM"], **sizes, **facts}


def _v3_from(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "scoring_func", allowed=("sigmoid",), default="sigmoid")
    require(config, "topk_method", allowed=("noaux_tc",), default="noaux_tc")
    require(config, "rope_interleave", allowed=(True,), default=True)
    return {
        **_sizes_from(config),
        "router": "sigmoid",
        "group_score": "top2",
        "balance": "bias",
        "balance_weight": SEQUENCE_WEIGHT if config.get("seq_aux") else 0.0,
        "mtp_layers": config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 0)),
    }


EH_PROJ = "layers.*.eh_proj.weight"

ROWS = (
    *(row for row in TRUNK_ROWS if row.name != "layers.*.attention.qkv.weight"),
    *EXPERT_ROWS,
    layer_row("attention.q", "self_attn.q_proj"),
    layer_row("attention.q.down", "self_attn.q_a_proj"),
    layer_row("attention.q.norm", "self_attn.q_a_layernorm"),
    layer_row("attention.q.up", "self_attn.q_b_proj"),
    layer_row("attention.kv.down", "self_attn.kv_a_proj_with_mqa"),
    layer_row("attention.kv.norm", "self_attn.kv_a_layernorm"),
    layer_row("attention.kv.up", "self_attn.kv_b_proj"),
    layer_row("mlp.shared.gate_up", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    layer_row("mlp.shared.down", "mlp.shared_experts.down_proj"),
    Row("layers.*.mlp.router.bias", ("model.layers.*.mlp.gate.e_score_correction_bias",)),
    layer_row("enorm", "enorm"),
    layer_row("hnorm", "hnorm"),
    layer_row("eh_proj", "eh_proj"),
    layer_row("norm", "shared_head.norm"),
)
"""Latent attention, experts and shared ones, and the layers of multi-token prediction."""

COPIES = (
    ("model.layers.*.embed_tokens.weight", "model.embed_tokens.weight"),
    ("model.layers.*.shared_head.head.weight", "lm_head.weight"),
)
"""What published files repeat in the layers of multi-token prediction."""

FP8 = tuple(
    part
    for row in ROWS
    for part in row.parts
    if "_proj" in part and part.endswith(".weight") and row.name != EH_PROJ
)
"""What V3 is published in: all projections of the layers; not embedding, head, router and norms."""

DEFAULTS = MappingProxyType(
    {
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tied": False,
        "kv_lora": 512,
        "nope_dim": 128,
        "rope_dim": 64,
        "v_dim": 128,
    }
)

_family = partial(Family, rows=ROWS, ignored=IGNORED, prefix=PREFIX, copies=COPIES)

DEEPSEEK_V2 = ModelFamily(
    hugging_face=_family(model_type="deepseek_v2", to_config=_v2_to, from_config=_v2_from),
    defaults=MappingProxyType({**DEFAULTS, "renormalise": False}),
    ffn=swiglu_width,
    attention=latent_attention,
    rope=interleaved_positions,
)

DEEPSEEK_V3 = ModelFamily(
    hugging_face=_family(model_type="deepseek_v3", to_config=_v3_to, from_config=_v3_from, fp8=FP8),
    defaults=MappingProxyType({**DEFAULTS, "renormalise": True, "router": "sigmoid"}),
    ffn=swiglu_width,
    attention=latent_attention,
    rope=interleaved_positions,
)
