"""What a decoder is: sizes and parts with nothing left open, what they cost, and the terms of its loss.

    config --complete, describe (catalog.py)--> DecoderSpec --make_blocks (decoder.py)--> modules

Families differ in what they put here (family.py). No modules here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megads.layers.attention import AttentionSpec
from megads.layers.mla import MLASpec
from megads.layers.router import MoESpec
from megads.objective.language import LANGUAGE, ObjectiveSpec
from megads.ops.rope import RopeSpec
from megads.pipeline.stage import Term

TIED_NAME = "embedding.word.weight"
"""What the weight of the word embedding is called wherever it is used."""


@dataclass(frozen=True, slots=True)
class MTPSpec:
    """Multi-token prediction (mtp.py).

    Attributes:
        depth: layers of it, each of which looks a token further.
        weights: of the mean of their losses: (tokens read before a step, weight from there on), the first of 0 tokens.
    """

    depth: int
    weights: tuple[tuple[int, float], ...]

    def term_weight(self, tokens: int) -> float:
        """Weight of one depth's loss in a step before which `tokens` were read."""
        return [weight for start, weight in self.weights if start <= tokens][-1] / self.depth


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Everything that defines a decoder-only transformer; sizes are global, nothing is left open.

    Attributes:
        rope: how positions turn queries and keys; None: a learned embedding of `max_positions` is added.
        ffn: width of a dense feed-forward layer.
        mlp_bias: whether its projections add a bias.
        expert_layers: numbers of the layers that have experts; empty without `moe`. Those of multi-token prediction are
            numbered after the trunk's.
        objective: what is trained on beside the plain language loss.
        mtp: multi-token prediction; None: none.
        width: in widths of its muP base (`parallel/width.py`); logits are divided by it.
    """

    layers: int
    hidden: int
    vocab: int
    attention: AttentionSpec | MLASpec
    rope: RopeSpec | None
    max_positions: int
    ffn: int
    activation: Literal["gelu", "swiglu"]
    mlp_bias: bool
    norm: Literal["layer", "rms"]
    norm_eps: float
    tied: bool
    dropout: float
    attention_dropout: float
    init_std: float
    moe: MoESpec | None = None
    expert_layers: tuple[int, ...] = ()
    objective: ObjectiveSpec = LANGUAGE
    mtp: MTPSpec | None = None
    width: float = 1.0

    @property
    def num_blocks(self) -> int:
        """Blocks that a pipeline can deal: embedding, layers, head (with multi-token prediction behind it)."""
        return self.layers + 2

    @property
    def mtp_depth(self) -> int:
        """Layers of multi-token prediction."""
        return 0 if self.mtp is None else self.mtp.depth

    @property
    def word_tie(self) -> str | None:
        """What ties the word embedding to its other uses; None: there are none."""
        return TIED_NAME if self.tied or self.mtp_depth else None

    @property
    def block_costs(self) -> tuple[float, ...]:
        """Multiply-adds of one token in the matrix products of each block, the weights' part; of experts those it
        goes to, and the sum of what they make.
        """
        projections = self.attention.projection_cost(self.hidden)
        dense = self.hidden * self.ffn * (3 if self.activation == "swiglu" else 2)
        moe, routed = self.moe, 0
        if moe is not None:
            routed = self.hidden * (
                3 * (moe.per_token * moe.ffn + moe.shared_ffn) + moe.experts + moe.per_token
            )
        layers = [
            float(projections + (routed if number in self.expert_layers else dense))
            for number in range(self.layers + self.mtp_depth)
        ]
        head = float(self.vocab * self.hidden)
        ahead = sum(layers[self.layers :]) + self.mtp_depth * (2.0 * self.hidden**2 + head)
        return (0.0, *layers[: self.layers], head + ahead)

    @property
    def terms(self) -> tuple[Term, ...]:
        """What the loss is a sum of; first the plain language loss, which weighs 0 where another one is trained on."""
        found = [Term("loss", float(self.objective.is_plain), "label", num_sources=1, is_cut=False)]
        if not self.objective.is_plain:
            found.append(Term("trained_loss", 1.0, "label", num_sources=1, is_cut=False))
        if self.mtp is not None:
            weight, depth = self.mtp.term_weight(0), self.mtp.depth
            found.append(Term("mtp_loss", weight, "label", num_sources=depth, is_cut=False))
        if self.moe is not None:
            weights = {"balance_loss": self.moe.balance_weight * self.moe.has_balance_loss}
            weights["z_loss"] = self.moe.z_weight
            num_layers = len(self.expert_layers)
            found += [
                Term(name, weight, "position", num_sources=num_layers, is_cut=True)
                for name, weight in weights.items()
                if weight
            ]
        return tuple(found)

    def weights_at(self, tokens: int) -> dict[str, float]:
        """Term -> its weight in a step before which `tokens` were read, of those that have a schedule."""
        return {} if self.mtp is None else {"mtp_loss": self.mtp.term_weight(tokens)}

    def flops(self, tokens: float, *, pairs: float) -> float:
        """Model flops of forward and backward: of the weights' products and of attention, nothing computed twice.

        Two a multiply-add, three times: forward, and the gradients of both factors (Narayanan et al. 2021, eq. 3).

        Args:
            tokens: how many there are.
            pairs: of a query and a key that it sees, in one layer: `causal_pairs` of the documents' lengths.
        """
        num_layers = self.layers + self.mtp_depth
        return 6.0 * (tokens * sum(self.block_costs) + pairs * num_layers * self.attention.pair_cost)

    def flops_per_token(self, sequence_length: int) -> float:
        """Model flops of forward and backward for one token of a whole sequence."""
        return self.flops(1.0, pairs=causal_pairs([sequence_length]) / sequence_length)


def causal_pairs(lengths: Iterable[int]) -> int:
    """Pairs of a query and a key at or before it, in documents of these lengths that do not see each other."""
    return sum(length * (length + 1) // 2 for length in lengths)
