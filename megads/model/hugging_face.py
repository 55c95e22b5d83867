"""What the families of Llama's descent share in Hugging Face's format: names of the trunk, keys of config.json.

Both dialects of config.json are read, and what is written both versions of transformers read:

    transformers 4    rope_theta: 500000.0, rope_scaling: {rope_type: llama3, factor: 8.0, ...}
    transformers 5    rope_parameters: {rope_type: llama3, rope_theta: 500000.0, factor: 8.0, ...}

Here are no weights: `checkpoint/hf.py` reads and writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megads.checkpoint.hf_names import Row, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError


def layer_row(name: str, *foreign: str) -> Row:
    """The weight of one module of a layer, or of several that are fused here."""
    return Row(f"layers.*.{name}.weight", tuple(f"model.layers.*.{part}.weight" for part in foreign))


TRUNK_ROWS = (
    Row("embedding.word.weight", ("model.embed_tokens.weight",)),
    layer_row("attention_norm", "input_layernorm"),
    layer_row("attention.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    layer_row("attention.out", "self_attn.o_proj"),
    layer_row("mlp_norm", "post_attention_layernorm"),
    layer_row("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj"),
    layer_row("mlp.down", "mlp.down_proj"),
    Row("head.norm.weight", ("model.norm.weight",)),
    Row("head.output.weight", ("lm_head.weight",)),
)
"""Embedding, attention, dense feed-forward layers and head."""

QK_NORM_ROWS = (
    layer_row("attention.q_norm", "self_attn.q_norm"),
    layer_row("attention.k_norm", "self_attn.k_norm"),
)

EXPERT_ROWS = (
    layer_row("mlp.router", "mlp.gate"),
    layer_row("mlp.experts.gate_up", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
    layer_row("mlp.experts.down", "mlp.experts.*.down_proj"),
    Row("layers.*.mlp.experts.gate_up.weight", ("model.layers.*.mlp.experts.gate_up_proj",)),
    Row("layers.*.mlp.experts.down.weight", ("model.layers.*.mlp.experts.down_proj",)),
)
"""Router and experts, one by one or stacked."""

IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)  # follows from rope_theta
PREFIX = "model."


def sizes_to(model: ModelConfig) -> dict[str, Any]:
    """What config.json says about a complete config, whatever the family."""
    refuse_width(model)
    return {
        "vocab_size": model.vocab,
        "max_position_embeddings": model.max_positions,
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        **_rope_to(model),
    }


def sizes_from(
    config: Mapping[str, Any], *, theta: float = 10000.0, head_dim: int | None = None
) -> dict[str, Any]:
    """What the section `model` is for a config.json, whatever the family.

    Args:
        theta, head_dim: what transformers takes for them where config.json is silent.
    """
    require(config, "hidden_act", allowed=("silu",), default="silu")
    require(config, "use_sliding_window", allowed=(False,), default=False)
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        require(config, "layer_types", allowed=("full_attention in all layers",), default=None)
    return {
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim", head_dim),
        "ffn": config.get("intermediate_size"),
        "vocab": config.get("vocab_size"),
        "max_positions": config.get("max_position_embeddings"),
        "tied": config.get("tie_word_embeddings", False),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "init_std": config.get("initializer_range", 0.02),
        **_rope_from(config, theta),
    }


def _rope_to(model: ModelConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_theta": model.rope_theta}
    if model.rope_scaling == "none":
        return found
    slow, fast = (
        ("low_freq_factor", "high_freq_factor")
        if model.rope_scaling == "llama3"
        else ("beta_slow", "beta_fast")
    )
    scaling = {
        "rope_type": model.rope_scaling,
        "factor": model.rope_factor,
        "original_max_position_embeddings": model.rope_original_positions,
        slow: model.rope_few_turns,
        fast: model.rope_many_turns,
    }
    return {**found, "rope_scaling": scaling}


def _rope_from(config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require({"rope_type": kind}, "rope_type", allowed=("default", "llama3", "yarn"), default="default")
    require(rope, "partial_rotary_factor", allowed=(1, None), default=1)
    found = {"rope_theta": rope.get("rope_theta", config.get("rope_theta", theta))}
    if kind == "default":
        return found
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        require(rope, key, allowed=(None,), default=None)
    require(rope, "truncate", allowed=(True,), default=True)
    slow, fast = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    return {
        **found,
        "rope_scaling": kind,
        "rope_factor": rope.get("factor"),
        "rope_original_positions": rope.get(
            "original_max_position_embeddings", config.get("max_position_embeddings")
        ),
        "rope_few_turns": rope.get(slow),
        "rope_many_turns": rope.get(fast),
    }


def experts_to(model: ModelConfig) -> dict[str, Any]:
    """What config.json says about the experts of a complete config.

    Raises:
        CheckpointError: no experts, or what transformers' softmax router with equal experts does not do.
    """
    allowed: dict[str, tuple[object, ...]] = {
        "router": ("softmax",),
        "shared_experts": (0,),
        "routed_scaling": (1.0,),
        "expert_groups": (1,),
        "capacity": (None,),
        "balance": ("none", "sequence", "global"),
    }
    wrong = [
        f"model.{key} {getattr(model, key)}"
        for key, values in allowed.items()
        if getattr(model, key) not in values
    ]
    if model.experts is None or wrong:
        raise CheckpointError(
            f"{model.family} in transformers has experts behind a softmax router, and nothing beside them",
            found="model.experts null" if model.experts is None else ", ".join(wrong),
            allowed=", ".join(f"{key} {' or '.join(map(str, values))}" for key, values in allowed.items()),
            do="keep the checkpoint as it is: megads trains, evaluates and generates from it",
        )
    return {
        "num_experts_per_tok": model.experts_per_token,
        "output_router_logits": False,
        "router_aux_loss_coef": model.balance_weight,
    }


def refuse_width(model: ModelConfig) -> None:
    """Say that nobody else scales logits and attention by the width of a base model (muP).

    Raises:
        CheckpointError: the config has a base of another width.
    """
    is_scaled = model.mup_base_hidden not in (None, model.hidden)
    if is_scaled or model.mup_base_head_dim not in (None, model.head_dim):
        raise CheckpointError(
            "a model scaled by muP has no name elsewhere",
            found=f"model.mup_base_hidden {model.mup_base_hidden}, model.mup_base_head_dim {model.mup_base_head_dim}",
            allowed="models without muP, or as wide as their base",
            do="keep the checkpoint as it is: megads trains, evaluates and generates from it",
        )


def refuse_experts(model: ModelConfig) -> None:
    """Say that a dense family of transformers has no experts.

    Raises:
        CheckpointError: the config has.
    """
    if model.experts is not None:
        raise CheckpointError(
            f"{model.family} in transformers has no experts",
            found=f"model.experts {model.experts}",
            allowed="dense models; model.family qwen3_moe or mixtral for experts",
            do="keep the checkpoint as it is: megads trains, evaluates and generates from it",
        )
