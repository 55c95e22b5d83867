"""The Llama family (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases, untied head, grouped
queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from megads.checkpoint.hf_names import Family, Row, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.model.family import ModelFamily

FFN_MULTIPLE = 256


def swiglu_width(hidden: int) -> int:
    """8/3 hidden, rounded up to a multiple of 256 (Touvron et al. 2023, section 2.2)."""
    return -(-(8 * hidden) // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE


def _to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    if model.experts is not None:
        raise CheckpointError(
            "Llama in transformers has no experts",
            found=f"model.experts {model.experts}",
            allowed="dense models",
            do="keep the checkpoint as it is: megads trains, evaluates and generates from it",
        )
    return {
        "architectures": ["LlamaForCausalLM"],
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
        "rope_theta": model.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
    }


def _from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "hidden_act", allowed=("silu",), default="silu")
    require(config, "attention_bias", allowed=(False,), default=False)
    require(config, "mlp_bias", allowed=(False,), default=False)
    require(config, "rope_scaling", allowed=(None,), default=None)
    rope = config.get("rope_parameters") or {}  # transformers 5 keeps theta in here
    require(rope, "rope_type", allowed=("default",), default="default")
    return {
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "ffn": config.get("intermediate_size"),
        "vocab": config.get("vocab_size"),
        "max_positions": config.get("max_position_embeddings"),
        "tied": config.get("tie_word_embeddings", False),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "init_std": config.get("initializer_range", 0.02),
    }


def _layer_row(name: str, *foreign: str) -> Row:
    return Row(f"layers.*.{name}.weight", tuple(f"model.layers.*.{part}.weight" for part in foreign))


HUGGING_FACE = Family(
    model_type="llama",
    rows=(
        Row("embedding.word.weight", ("model.embed_tokens.weight",)),
        _layer_row("attention_norm", "input_layernorm"),
        _layer_row("attention.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        _layer_row("attention.out", "self_attn.o_proj"),
        _layer_row("mlp_norm", "post_attention_layernorm"),
        _layer_row("mlp.gate_up", "mlp.gate_proj", "mlp.up_proj"),
        _layer_row("mlp.down", "mlp.down_proj"),
        Row("head.norm.weight", ("model.norm.weight",)),
        Row("head.output.weight", ("lm_head.weight",)),
    ),
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),  # follows from rope_theta
    prefix="model.",
    to_config=_to_hugging_face,
    from_config=_from_hugging_face,
)

LLAMA = ModelFamily(
    hugging_face=HUGGING_FACE,
    defaults=MappingProxyType({"norm_eps": 1e-6, "rope_theta": 10000.0, "tied": False}),
    ffn=swiglu_width,
)
