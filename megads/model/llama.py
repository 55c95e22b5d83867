"""The Llama family (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases, untied head, grouped
queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megads.checkpoint.hf import Family, Row, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.model.decoder import DecoderSpec
from megads.model.expert import describe_experts

FFN_MULTIPLE = 256


def describe(config: ModelConfig, *, vocab: int, sequence_length: int) -> DecoderSpec:
    """A Llama model of the sizes in `config`; what it leaves open is Llama's."""
    ffn = -(-(8 * config.hidden) // (3 * FFN_MULTIPLE)) * FFN_MULTIPLE
    return DecoderSpec(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        ffn=config.ffn or ffn,
        vocab=vocab,
        positions="rotary",
        max_positions=config.max_positions or sequence_length,
        rope_theta=config.rope_theta,
        norm="rms",
        norm_eps=config.norm_eps or 1e-6,
        activation="swiglu",
        has_bias=False,
        tied=bool(config.tied),
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        init_std=config.init_std,
        moe=describe_experts(config, ffn=config.ffn or ffn),
    )


def _to_hugging_face(spec: DecoderSpec) -> dict[str, Any]:
    if spec.moe is not None:
        raise CheckpointError(
            "Llama in transformers has no experts",
            found=f"model.experts {spec.moe.experts}",
            allowed="dense models",
            do="keep the checkpoint as it is: megads trains, evaluates and generates from it",
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.max_positions,
        "hidden_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.hidden // spec.heads,
        "intermediate_size": spec.ffn,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": spec.attention_dropout,
        "initializer_range": spec.init_std,
        "tie_word_embeddings": spec.tied,
    }


def _from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    require(config, "hidden_act", allowed=("silu",), default="silu")
    require(config, "attention_bias", allowed=(False,), default=False)
    require(config, "mlp_bias", allowed=(False,), default=False)
    require(config, "rope_scaling", allowed=(None,), default=None)
    rope = config.get("rope_parameters") or {}  # transformers 5 keeps theta in here
    require(rope, "rope_type", allowed=("default",), default="default")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        require(config, "head_dim", allowed=(None, hidden // heads), default=None)
    return {
        "layers": config.get("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads"),
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
