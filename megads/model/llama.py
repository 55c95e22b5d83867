"""The Llama family (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases, untied head, grouped
queries.
"""

from __future__ import annotations

from megads.config.model import ModelConfig
from megads.model.decoder import DecoderSpec

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
    )
