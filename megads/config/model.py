"""Config section `model`: the family and its sizes. What a family makes of them lives in `megads/model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megads.config.section import section

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


@section
class ModelConfig:
    """The model family and its sizes. `null` means: what the family does (written out in the saved config)."""

    family: Literal["gpt", "llama"]
    """gpt: learned positions, LayerNorm, GELU, biases. llama: rotary positions, RMSNorm, SwiGLU, no biases."""
    layers: PositiveInt
    """Number of transformer layers."""
    hidden: PositiveInt
    """Width of the residual stream."""
    heads: PositiveInt
    """Number of query heads; `model.hidden` must be a multiple of it."""
    kv_heads: PositiveInt | None = None
    """Number of key/value heads (grouped-query attention); null: one for each query head."""
    ffn: PositiveInt | None = None
    """Width of the feed-forward layer; null: 4 x hidden (gpt), 8/3 x hidden rounded up to a multiple of 256 (llama)."""
    vocab: PositiveInt | None = None
    """Number of token ids; null: the size of `data.tokenizer`. It need not be divisible by anything."""
    max_positions: PositiveInt | None = None
    """Longest sequence that learned positions can hold; null: `data.sequence_length`. Ignored by rotary families."""
    tied: bool | None = None
    """Whether the output head shares the embedding's weight; null: true for gpt, false for llama."""
    norm_eps: PositiveFloat | None = None
    """Constant under the square root of the norms; null: 1e-5 (gpt), 1e-6 (llama)."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies (rotary families)."""
    dropout: Probability = 0.0
    """Dropout probability after the embedding and at each residual branch."""
    attention_dropout: Probability = 0.0
    """Dropout probability of attention weights; above 0 it selects the explicit-softmax attention."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it divided by
    sqrt(2 x layers).
    """
