"""The language-model loss on logits whose vocabulary is cut over ranks: a sum and a count, never a mean.

The one division, by the global token count, happens where the backward is seeded (`pipeline/executor.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.ops.cross_entropy import Columns, local_gradient, local_maximum, local_sums
from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Group, Mesh


class _CrossEntropy(torch.autograd.Function):
    """[tokens, vocab_local] logits -> [tokens] losses."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, columns: Columns, group: Group) -> Tensor:
        maximum = all_reduce_(local_maximum(logits, columns), group, op="max")
        parts = local_sums(logits, labels, maximum=maximum, columns=columns)
        sums = all_reduce_(torch.stack((parts.exponentials, parts.target)), group)
        lse = maximum + sums[0].log()
        ctx.save_for_backward(logits, labels, lse)
        ctx.columns = columns
        return lse - sums[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, lse = ctx.saved_tensors
        gradient = local_gradient(logits, labels, lse=lse, scale=gradients[0], columns=ctx.columns)
        return gradient, None, None, None


def token_losses(logits: Tensor, labels: Tensor, *, columns: Columns, group: Group) -> Tensor:
    """Cross entropy of each token, in nats.

    Args:
        logits: [tokens, vocab_local], this rank's columns.
        labels: [tokens] global ids.
        columns: which ids the columns are.
        group: ranks over which the vocabulary is cut.

    Returns:
        [tokens] float32 (float64 for float64 logits), the same on all ranks of the group.
    """
    return _CrossEntropy.apply(logits, labels, columns, group)  # type: ignore[no-any-return,no-untyped-call]


def masked_sum(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum of the losses that count: [tokens] and [tokens] bool -> scalar."""
    return torch.where(mask, losses, 0.0).sum()


def count_tokens(batch: Batch, mesh: Mesh) -> Tensor:
    """Tokens that count in the loss over all data-parallel ranks, float64 scalar."""
    count = batch.mask.sum().to(torch.float64)
    return all_reduce_(count, mesh.group("dp_cp"))
