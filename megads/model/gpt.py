"""The GPT-2 family (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from megads.checkpoint.hf_names import Family, Row, require
from megads.config.model import ModelConfig
from megads.errors import CheckpointError
from megads.model.family import ModelFamily, grouped_attention
from megads.model.hugging_face import refuse_width


def _to_hugging_face(model: ModelConfig) -> dict[str, Any]:
    if model.kv_heads != model.heads or model.hidden != model.heads * (model.head_dim or 0):
        raise CheckpointError(
            "GPT-2 in transformers has neither grouped queries nor heads of another width than hidden / heads",
            found=f"model.kv_heads {model.kv_heads} of {model.heads} heads, model.head_dim {model.head_dim}",
            allowed="model.family llama for grouped queries",
        )
    refuse_width(model)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab,
        "n_positions": model.max_positions,
        "n_embd": model.hidden,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": model.ffn,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": model.norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": model.attention_dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
    }


def _from_hugging_face(config: Mapping[str, Any]) -> dict[str, Any]:
    require(config, "activation_function", allowed=("gelu_new", "gelu_pytorch_tanh"), default="gelu_new")
    require(config, "scale_attn_weights", allowed=(True,), default=True)
    require(config, "scale_attn_by_inverse_layer_idx", allowed=(False,), default=False)
    require(config, "add_cross_attention", allowed=(False,), default=False)
    return {
        "layers": config.get("n_layer"),
        "hidden": config.get("n_embd"),
        "heads": config.get("n_head"),
        "ffn": config.get("n_inner"),
        "vocab": config.get("vocab_size"),
        "max_positions": config.get("n_positions"),
        "tied": config.get("tie_word_embeddings", True),
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "dropout": config.get("resid_pdrop", 0.1),
        "attention_dropout": config.get("attn_pdrop", 0.1),
        "init_std": config.get("initializer_range", 0.02),
    }


def _block_rows(name: str, foreign: str, *, is_transposed: bool) -> tuple[Row, Row]:
    """Weight and bias of one module."""
    return (
        Row(f"layers.*.{name}.weight", (f"transformer.h.*.{foreign}.weight",), is_transposed),
        Row(f"layers.*.{name}.bias", (f"transformer.h.*.{foreign}.bias",)),
    )


HUGGING_FACE = Family(
    model_type="gpt2",
    rows=(
        Row("embedding.word.weight", ("transformer.wte.weight",)),
        Row("embedding.position.weight", ("transformer.wpe.weight",)),
        *_block_rows("attention_norm", "ln_1", is_transposed=False),
        *_block_rows("attention.qkv", "attn.c_attn", is_transposed=True),  # Conv1D: [in, out]
        *_block_rows("attention.out", "attn.c_proj", is_transposed=True),
        *_block_rows("mlp_norm", "ln_2", is_transposed=False),
        *_block_rows("mlp.up", "mlp.c_fc", is_transposed=True),
        *_block_rows("mlp.down", "mlp.c_proj", is_transposed=True),
        Row("head.norm.weight", ("transformer.ln_f.weight",)),
        Row("head.norm.bias", ("transformer.ln_f.bias",)),
        Row("head.output.weight", ("lm_head.weight",)),
    ),
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),  # causal masks
    prefix="transformer.",
    to_config=_to_hugging_face,
    from_config=_from_hugging_face,
)

GPT = ModelFamily(
    hugging_face=HUGGING_FACE,
    defaults=MappingProxyType({"norm_eps": 1e-5, "tied": True}),
    ffn=lambda hidden: 4 * hidden,
    attention=partial(grouped_attention, qkv_bias=True, out_bias=True),
    rope=None,
    norm="layer",
    activation="gelu",
    mlp_bias=True,
)
