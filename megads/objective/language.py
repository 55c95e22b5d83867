"""The language-model loss on logits whose vocabulary is cut over ranks: a sum and a count, never a mean.

    plain      lse - logit of the label                              what is reported, validated and evaluated
    trained    (1 - a) x plain + a x (lse - mean logit) + z x lse^2   a: label smoothing, z: z-loss

Label smoothing is torch's (Szegedy et al. 2016: a / V on every id, the label's own included) or NeMo's and Megatron's
(a / (V - 1) on every other id: a is a x V / (V - 1) above), where V counts the real vocabulary. The z-loss (PaLM,
Chowdhery et al. 2022, section 5) keeps lse, the logarithm of the softmax' denominator, near 0.

The one division, by the global token count, happens where the backward is seeded (`pipeline/executor.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.ops.cross_entropy import (
    PLAIN,
    Columns,
    LossWeights,
    local_gradient,
    local_maximum,
    local_sums,
)
from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Group, Mesh


@dataclass(frozen=True, slots=True)
class ObjectiveSpec:
    """What is trained on beside the plain cross entropy.

    Attributes:
        label_smoothing: share a of the target distribution that is spread over the vocabulary.
        smoothing_kind: over all ids (torch), or all but the label (nemo).
        z_loss: weight of lse^2.
    """

    label_smoothing: float = 0.0
    smoothing_kind: Literal["torch", "nemo"] = "torch"
    z_loss: float = 0.0

    def weights(self, vocab: int) -> LossWeights:
        """The weights of the sums over a vocabulary of `vocab` ids."""
        spread = self.label_smoothing
        if self.smoothing_kind == "nemo":
            spread *= vocab / (vocab - 1)
        return LossWeights(1.0 - spread, spread / vocab, self.z_loss)

    @property
    def is_plain(self) -> bool:
        """Whether that is nothing."""
        return (self.label_smoothing, self.z_loss) == (0.0, 0.0)


LANGUAGE = ObjectiveSpec()
"""The plain cross entropy."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Two losses of the same tokens, of each one or summed.

    Attributes:
        plain: cross entropy, in nats; without a gradient, unless it is what is trained on.
        trained: what is trained on; the same tensor if that is the plain one.
    """

    plain: Tensor
    trained: Tensor

    def sum(self, mask: Tensor) -> Losses:
        """Sums over the tokens that count: [tokens] bool."""
        trained = masked_sum(self.trained, mask)
        return Losses(trained if self.plain is self.trained else masked_sum(self.plain, mask), trained)


@dataclass(frozen=True, slots=True)
class TokenSums:
    """What a token's loss is made of, over the whole vocabulary: [tokens] each, the same on all ranks."""

    lse: Tensor
    losses: Losses


def token_sums(
    logits: Tensor, labels: Tensor, *, columns: Columns, group: Group, weights: LossWeights
) -> TokenSums:
    """Losses of local logits [tokens, vocab_local], by two reductions over the ranks. No gradient."""
    maximum = all_reduce_(local_maximum(logits, columns), group, op="max")
    has_shifted = weights.each != 0.0
    parts = local_sums(logits, labels, maximum=maximum, columns=columns, has_shifted=has_shifted)
    rows = [parts.exponentials, parts.target]
    if parts.shifted is not None:
        rows.append(parts.shifted)
    sums = all_reduce_(torch.stack(rows), group)
    lse = maximum + sums[0].log()
    plain = lse - sums[1]
    if weights.is_plain:
        return TokenSums(lse, Losses(plain, plain))
    trained = lse - weights.label * sums[1] + weights.square * lse.square()
    if has_shifted:  # sum of all logits = shifted + V x maximum, and each x V = 1 - label
        trained = trained - weights.each * sums[2] - (1.0 - weights.label) * maximum
    return TokenSums(lse, Losses(plain, trained))


class _CrossEntropy(torch.autograd.Function):
    """[tokens, vocab_local] logits -> [tokens] losses: trained, plain."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, columns: Columns, group: Group, weights: LossWeights
    ) -> tuple[Tensor, Tensor]:
        found = token_sums(logits, labels, columns=columns, group=group, weights=weights)
        ctx.save_for_backward(logits, labels, found.lse)
        ctx.columns, ctx.weights = columns, weights
        plain = found.losses.plain.detach()
        ctx.mark_non_differentiable(plain)
        return found.losses.trained, plain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        gradient = local_gradient(
            logits, labels, lse=lse, scale=gradients[0], columns=ctx.columns, weights=ctx.weights
        )
        return gradient, None, None, None, None


def token_losses(
    logits: Tensor,
    labels: Tensor,
    *,
    columns: Columns,
    group: Group,
    weights: LossWeights = PLAIN,
) -> Losses:
    """Losses of each token.

    Args:
        logits: [tokens, vocab_local], this rank's columns.
        labels: [tokens] global ids.
        columns: which ids the columns are.
        group: ranks over which the vocabulary is cut.
        weights: of what is trained on (`ObjectiveSpec.weights`).

    Returns:
        [tokens] float32 (float64 for float64 logits), the same on all ranks of the group.
    """
    trained, plain = _CrossEntropy.apply(logits, labels, columns, group, weights)  # type: ignore[no-untyped-call]
    return Losses(trained if weights.is_plain else plain, trained)


def masked_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum of the losses that count: [tokens] and [tokens] bool -> scalar."""
    return torch.where(mask, losses, 0.0).sum()


def count_tokens(batch: Batch, mesh: Mesh) -> Tensor:
    """Tokens that count in the loss over all data-parallel ranks, float64 scalar."""
    count = batch.mask.sum().to(torch.float64)
    return all_reduce_(count, mesh.group("dp_cp"))
