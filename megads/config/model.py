"""Config section `model`: the family and its sizes. What a family makes of them lives in `megads/model`."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megads.config.section import section

LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3")
"""Those with latent attention."""
SIGMOID_FAMILIES = ("deepseek_v3",)
"""Those whose routers have sigmoid scores, where the config says nothing."""

Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


@section
class WeightConfig:
    """A weight that holds from a point of the run on."""

    tokens: NonNegativeInt
    """Tokens that were read before a step, over all ranks."""
    weight: PositiveFloat
    """What it is from there on."""


@section
class ModelConfig:
    """The model family and its sizes. `null` means: what the family does (written out in the saved config)."""

    family: Literal["gpt", "llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3"]
    """gpt: learned positions, LayerNorm, GELU, biases. llama: rotary positions, RMSNorm, SwiGLU, no biases. qwen2: as
    llama, with a bias on q, k and v. qwen3: as llama, with a norm over each head of q and k. qwen3_moe, mixtral: as
    qwen3 and llama, with experts. deepseek_v2, deepseek_v3: latent attention, with experts."""
    layers: PositiveInt
    """Number of transformer layers."""
    hidden: PositiveInt
    """Width of the residual stream."""
    heads: PositiveInt
    """Number of query heads; `model.hidden` must be a multiple of it, unless `model.head_dim` is given."""
    kv_heads: PositiveInt | None = None
    """Number of key/value heads (grouped-query attention); null: one for each query head."""
    head_dim: PositiveInt | None = None
    """Width of one attention head; null: `model.hidden` / `model.heads`. Latent attention has the four below."""
    q_lora: PositiveInt | None = None
    """Latent attention (deepseek_v2, deepseek_v3): width of the latent that queries are made of; null: they are made of
    the residual stream itself."""
    kv_lora: PositiveInt | None = None
    """Latent attention: width of the latent that keys and values are made of; null: 512."""
    nope_dim: PositiveInt | None = None
    """Latent attention: width of the part of a head's queries and keys that positions don't turn; null: 128."""
    rope_dim: PositiveInt | None = None
    """Latent attention: width of the part that they turn, of keys the same for all heads; null: 64."""
    v_dim: PositiveInt | None = None
    """Latent attention: width of a head's values; null: 128."""
    ffn: PositiveInt | None = None
    """Width of the feed-forward layer; null: 4 x hidden (gpt), 8/3 x hidden rounded up to a multiple of 256 (others).
    """
    vocab: PositiveInt | None = None
    """Number of token ids; null: the size of `data.tokenizer`. It need not be divisible by anything."""
    max_positions: PositiveInt | None = None
    """Longest sequence that learned positions can hold; null: `data.sequence_length`. Ignored by rotary families."""
    tied: bool | None = None
    """Whether the output head shares the embedding's weight; null: true for gpt, false for others."""
    norm_eps: PositiveFloat | None = None
    """Constant under the square root of the norms; null: 1e-5 (gpt, mixtral), 1e-6 (others)."""
    rope_theta: PositiveFloat | None = None
    """Base of the rotary frequencies (rotary families); null: 1e6 (qwen2, qwen3, qwen3_moe, mixtral), 10000
    (others)."""
    rope_scaling: Literal["none", "llama3", "yarn"] = "none"
    """How rotary frequencies are stretched for contexts longer than the first ones: as Llama 3.1, or as YaRN."""
    rope_factor: PositiveFloat = 1.0
    """By how much the slow pairs turn slower, with `model.rope_scaling`."""
    rope_original_positions: PositiveInt | None = None
    """Length of the context before it was stretched."""
    rope_few_turns: PositiveFloat | None = None
    """Pairs that turn fewer times than this over that length are stretched by the whole factor; null: 1."""
    rope_many_turns: PositiveFloat | None = None
    """Pairs that turn more often than this stay as they are; null: 4 (llama3), 32 (yarn)."""
    rope_mscale: PositiveFloat | None = None
    """YaRN of latent attention: 0.1 x this x ln(factor) + 1 multiplies what is turned, over the same of the next key;
    null: 1 of this, 0 of that."""
    rope_mscale_all_dim: PositiveFloat | None = None
    """YaRN of latent attention: (0.1 x this x ln(factor) + 1)^2 multiplies the scores; null: they stay as they are."""
    experts: PositiveInt | None = None
    """Number of experts of a layer (SwiGLU families); null: every layer is dense."""
    experts_per_token: PositiveInt = 2
    """Experts that each token goes to."""
    expert_ffn: PositiveInt | None = None
    """Width of one expert; null: `model.ffn`."""
    shared_experts: NonNegativeInt = 0
    """Experts that every token passes beside those it is routed to: one MLP of this many times `model.expert_ffn`."""
    dense_layers: NonNegativeInt | Annotated[tuple[NonNegativeInt, ...], MinLen(1)] = 0
    """Layers that have a dense feed-forward layer in place of experts: how many at the start, or a list of their
    numbers (the first is 0)."""
    router: Literal["softmax", "sigmoid"] | None = None
    """How a router's logits become scores; null: sigmoid for deepseek_v3, softmax for others."""
    renormalise: bool | None = None
    """Whether the gates of a token are divided by their sum; null: true for qwen3_moe, mixtral and
    deepseek_v3, false for others."""
    routed_scaling: PositiveFloat = 1.0
    """What gates are multiplied by."""
    expert_groups: PositiveInt = 1
    """Groups of neighbouring experts, of which a token may choose from `model.groups_per_token`."""
    groups_per_token: PositiveInt = 1
    """Groups that a token may choose experts from, the best by `model.group_score`."""
    group_score: Literal["max", "top2"] | None = None
    """What a group is worth: its best score, or the sum of its best two; null: max (softmax), top2 (sigmoid)."""
    balance: Literal["none", "sequence", "global", "bias"] = "none"
    """How experts are kept busy alike: a loss on the load in each sequence, a loss on the load of the whole batch of
    the step before, or a bias on the scores that each step moves."""
    balance_weight: NonNegativeFloat | None = None
    """Weight of the balance loss of each layer; with `bias` that of a sequence loss beside it. null: 0.001, with `bias`
    0."""
    bias_rate: PositiveFloat = 0.001
    """By how much a step moves an expert's bias, with `model.balance=bias`."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of each layer's mean squared log-sum-exp of the router's logits, which keeps them small."""
    capacity: PositiveFloat | None = None
    """Tokens of one sequence that an expert takes, in units of the mean; the rest, those of the smallest gates, it
    drops. null: it takes all."""
    mtp_layers: NonNegativeInt = 0
    """Depths of multi-token prediction: layers behind the head that learn to predict 2, 3, ... tokens ahead, for
    training alone; numbered after the others. 0: none."""
    mtp_weight: PositiveFloat | Annotated[tuple[WeightConfig, ...], MinLen(1)] = 0.3
    """Weight of the loss of multi-token prediction, the mean over its depths: a number, or a list of {tokens, weight},
    the first of 0 tokens (DeepSeek-V3: 0.3, from 10 T tokens on 0.1)."""
    dropout: Probability = 0.0
    """Dropout probability after the embedding and at each residual branch."""
    attention_dropout: Probability = 0.0
    """Dropout probability of attention weights; above 0 it selects the explicit-softmax attention."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it divided by
    sqrt(2 x layers).
    """
    mup_base_hidden: PositiveInt | None = None
    """muP: width of the base model, at which all is as without it; at others initial weights, learning rates, eps and
    logits are scaled so that the base model's best learning rate stays the best. null: no muP."""
    mup_base_head_dim: PositiveInt | None = None
    """muP: width of the base model's attention heads; null: `model.head_dim`, a wider model having more heads."""

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts, those of multi-token prediction among them."""
        if self.experts is None:
            return ()
        dense = range(self.dense_layers) if isinstance(self.dense_layers, int) else self.dense_layers
        return tuple(number for number in range(self.layers + self.mtp_layers) if number not in dense)
