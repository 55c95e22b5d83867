"""Family name -> the family; from a config to the model that it means."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megads.checkpoint.hf_names import Family
from megads.config.model import ModelConfig
from megads.model import deepseek, gpt, llama, mixtral, qwen
from megads.model.family import ModelFamily
from megads.model.spec import DecoderSpec

FAMILIES: Mapping[str, ModelFamily] = MappingProxyType(
    {
        "gpt": gpt.GPT,
        "llama": llama.LLAMA,
        "qwen2": qwen.QWEN2,
        "qwen3": qwen.QWEN3,
        "qwen3_moe": qwen.QWEN3_MOE,
        "mixtral": mixtral.MIXTRAL,
        "deepseek_v2": deepseek.DEEPSEEK_V2,
        "deepseek_v3": deepseek.DEEPSEEK_V3,
    }
)

HUGGING_FACE: Mapping[str, Family] = MappingProxyType(
    {name: family.hugging_face for name, family in FAMILIES.items()}
)


def complete(
    config: ModelConfig,
    *,
    vocab: int,
    sequence_length: int,
    families: Mapping[str, ModelFamily] = FAMILIES,
) -> ModelConfig:
    """The config with every key that it leaves open written out as its family has it.

    Args:
        vocab: token ids of the tokenizer; used where the config names no size.
        sequence_length: tokens of one sample; used for learned positions where the config names no number.
    """
    return families[config.family].complete(config, vocab=vocab, sequence_length=sequence_length)


def describe(
    config: ModelConfig,
    *,
    vocab: int,
    sequence_length: int,
    families: Mapping[str, ModelFamily] = FAMILIES,
) -> DecoderSpec:
    """The model that `config` means, nothing left open; arguments as of `complete`."""
    whole = complete(config, vocab=vocab, sequence_length=sequence_length, families=families)
    return families[config.family].describe(whole)
