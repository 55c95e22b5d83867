"""What a family is: data. Defaults of the config, the few traits that no key says, and Hugging Face's names.

    ModelConfig, keys left open --complete--> ModelConfig, none left open --describe--> DecoderSpec

The trunk is written once (decoder.py), and so is the way from a config to it; a family's file fills a `ModelFamily`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from megads.checkpoint.hf_names import Family
from megads.config.model import ModelConfig
from megads.layers.attention import AttentionSpec
from megads.layers.mla import MLASpec
from megads.model.expert import complete_experts, describe_experts
from megads.model.spec import DecoderSpec, MTPSpec
from megads.ops.rope import Llama3Scaling, RopeSpec, YarnScaling, yarn_magnitude

T = TypeVar("T")


def grouped_attention(
    config: ModelConfig, *, qkv_bias: bool = False, out_bias: bool = False, qk_norm: bool = False
) -> AttentionSpec:
    """Grouped-query attention of the sizes in a complete config; its head norms have the eps of the others."""
    return AttentionSpec(
        heads=config.heads,
        kv_heads=known(config.kv_heads),
        head_dim=known(config.head_dim),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        qk_norm_eps=config.norm_eps if qk_norm else None,
        base_head_dim=config.mup_base_head_dim,
    )


def rotary_positions(config: ModelConfig, *, is_interleaved: bool = False) -> RopeSpec:
    """Rotary positions of a complete config, half-split or interleaved."""
    return RopeSpec(known(config.rope_theta), _scaling(config), is_interleaved)


def _scaling(config: ModelConfig) -> Llama3Scaling | YarnScaling | None:
    original = config.rope_original_positions
    if config.rope_scaling == "none" or original is None:
        return None
    factor, few, many = config.rope_factor, known(config.rope_few_turns), known(config.rope_many_turns)
    if config.rope_scaling == "llama3":
        return Llama3Scaling(factor, original, few_turns=few, many_turns=many)
    magnitude = yarn_magnitude(factor, 1.0 if config.rope_mscale is None else config.rope_mscale)
    if config.rope_mscale_all_dim is not None:
        magnitude /= yarn_magnitude(factor, config.rope_mscale_all_dim)
    return YarnScaling(factor, original, many_turns=many, few_turns=few, magnitude=magnitude)


def known(value: T | None) -> T:
    """A value of a complete config."""
    if value is None:
        raise ValueError("the config is not complete: catalog.complete")
    return value


def _mtp(config: ModelConfig) -> MTPSpec | None:
    """Multi-token prediction; None: there is none."""
    if not config.mtp_layers:
        return None
    if isinstance(config.mtp_weight, tuple):
        return MTPSpec(config.mtp_layers, tuple((point.tokens, point.weight) for point in config.mtp_weight))
    return MTPSpec(config.mtp_layers, ((0, config.mtp_weight),))


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A model family.

    Attributes:
        hugging_face: its names there.
        defaults: keys of section `model` that a config leaves null -> values; what is the same in all families (one
            key/value head a query head, ...) need not stand here.
        ffn: hidden -> width of a dense feed-forward layer where the config names none.
        attention: a complete config -> its attention.
        rope: a complete config -> how positions turn queries and keys; None: positions are learned.
        norm, activation, mlp_bias: as in `DecoderSpec`.
    """

    hugging_face: Family
    ffn: Callable[[int], int]
    defaults: Mapping[str, object]
    attention: Callable[[ModelConfig], AttentionSpec | MLASpec] = grouped_attention
    rope: Callable[[ModelConfig], RopeSpec] | None = rotary_positions
    norm: Literal["layer", "rms"] = "rms"
    activation: Literal["gelu", "swiglu"] = "swiglu"
    mlp_bias: bool = False

    def complete(self, config: ModelConfig, *, vocab: int, sequence_length: int) -> ModelConfig:
        """The config with every key that it leaves open written out.

        Args:
            vocab: token ids of the tokenizer; used where the config names no size.
            sequence_length: tokens of one sample; used for learned positions where the config names no number.
        """
        general: dict[str, Any] = {
            "kv_heads": config.heads,
            "head_dim": config.hidden // config.heads,
            "ffn": self.ffn(config.hidden),
            "vocab": vocab,
            "max_positions": sequence_length,
            "router": "softmax",
        }
        unread = ("router", "renormalise") if config.experts is None else ()
        if config.rope_scaling != "none":
            general |= {
                "rope_few_turns": 1.0,
                "rope_many_turns": 4.0 if config.rope_scaling == "llama3" else 32.0,
            }
        found = {**general, **self.defaults}
        is_open = {k: v for k, v in found.items() if k not in unread and getattr(config, k) is None}
        return complete_experts(replace(config, **is_open))

    def describe(self, config: ModelConfig) -> DecoderSpec:
        """The model that a complete config means."""
        return DecoderSpec(
            layers=config.layers,
            hidden=config.hidden,
            vocab=known(config.vocab),
            attention=self.attention(config),
            rope=None if self.rope is None else self.rope(config),
            max_positions=known(config.max_positions),
            ffn=known(config.ffn),
            activation=self.activation,
            mlp_bias=self.mlp_bias,
            norm=self.norm,
            norm_eps=known(config.norm_eps),
            tied=known(config.tied),
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            init_std=config.init_std,
            moe=describe_experts(config),
            expert_layers=config.expert_layers,
            mtp=_mtp(config),
            width=config.hidden / (config.mup_base_hidden or config.hidden),
        )
