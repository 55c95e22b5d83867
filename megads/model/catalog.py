"""Family name -> what the family makes of a config, and what Hugging Face calls it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from megads.checkpoint.hf import Family
from megads.config.model import ModelConfig
from megads.model import gpt, llama
from megads.model.decoder import DecoderSpec

FAMILIES: Mapping[str, Callable[..., DecoderSpec]] = MappingProxyType(
    {"gpt": gpt.describe, "llama": llama.describe}
)

HUGGING_FACE: Mapping[str, Family] = MappingProxyType({"gpt": gpt.HUGGING_FACE, "llama": llama.HUGGING_FACE})


def describe(config: ModelConfig, *, vocab: int, sequence_length: int) -> DecoderSpec:
    """The model that `config` means, nothing left open.

    Args:
        vocab: token ids of the tokenizer; used where the config names no size.
        sequence_length: tokens of one sample; used for learned positions where the config names no number.
    """
    return FAMILIES[config.family](config, vocab=config.vocab or vocab, sequence_length=sequence_length)
