"""The GPT-2 family (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied head."""

from __future__ import annotations

from megads.config.model import ModelConfig
from megads.model.decoder import DecoderSpec


def describe(config: ModelConfig, *, vocab: int, sequence_length: int) -> DecoderSpec:
    """A GPT-2 model of the sizes in `config`; what it leaves open is GPT-2's."""
    return DecoderSpec(
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        ffn=config.ffn or 4 * config.hidden,
        vocab=vocab,
        positions="learned",
        max_positions=config.max_positions or sequence_length,
        rope_theta=config.rope_theta,
        norm="layer",
        norm_eps=config.norm_eps or 1e-5,
        activation="gelu",
        has_bias=True,
        tied=True if config.tied is None else config.tied,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        init_std=config.init_std,
    )
