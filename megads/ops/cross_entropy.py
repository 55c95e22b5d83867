"""Cross entropy of logits whose vocabulary is cut over ranks: the local halves, without communication.

    maximum (local) -> max over ranks -> sums (local) -> sum over ranks -> lse = max + log(sum), loss = lse - target

A rank may hold fewer real columns than its tensor has (padding), even none: padded columns behave as logits of -inf.
Arithmetic is float32, or float64 for float64 logits. Padded columns get gradient 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Columns:
    """Which vocabulary ids the columns of a local tensor are: ids first .. first + count - 1, then padding."""

    first: int
    count: int

    def locate(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels -> (whether this rank holds them, their column, 0 if it does not)."""
        mine = (labels >= self.first) & (labels < self.first + self.count)
        return mine, torch.where(mine, labels - self.first, 0)


@dataclass(frozen=True, slots=True)
class LocalSums:
    """Per token: sum of exp(logit - maximum) over this rank's columns; the label's logit if it is here, else 0."""

    exponentials: Tensor  # [tokens]
    target: Tensor  # [tokens]


def wide(logits: Tensor) -> Tensor:
    """Logits in the dtype of the arithmetic."""
    return logits if logits.dtype == torch.float64 else logits.float()


def local_maximum(logits: Tensor, columns: Columns) -> Tensor:
    """Largest logit of each token over real columns: [tokens, vocab_local] -> [tokens]; -inf where there are none."""
    if columns.count == 0:
        return wide(logits).new_full(logits.shape[:1], float("-inf"))
    return wide(logits[:, : columns.count]).amax(dim=-1)


def local_sums(logits: Tensor, labels: Tensor, *, maximum: Tensor, columns: Columns) -> LocalSums:
    """This rank's part of the two sums over the vocabulary. labels, maximum: [tokens]."""
    real = wide(logits[:, : columns.count])
    mine, column = columns.locate(labels)
    exponentials = (real - maximum[:, None]).exp().sum(dim=-1)
    if columns.count == 0:
        return LocalSums(exponentials, torch.zeros_like(maximum))
    target = torch.where(mine, real.gather(1, column[:, None]).squeeze(1), 0.0)
    return LocalSums(exponentials, target)


def local_gradient(logits: Tensor, labels: Tensor, *, lse: Tensor, scale: Tensor, columns: Columns) -> Tensor:
    """Gradient with respect to the local logits: scale x (softmax - one hot), in the logits' dtype.

    Args:
        lse: [tokens] log-sum-exp over the whole vocabulary.
        scale: [tokens] gradient of each token's loss; 0 where masked.
    """
    gradient = torch.zeros(logits.shape, dtype=lse.dtype, device=logits.device)
    if columns.count:
        real = gradient[:, : columns.count]
        real.copy_((wide(logits[:, : columns.count]) - lse[:, None]).exp_())
        mine, column = columns.locate(labels)
        real.scatter_add_(1, column[:, None], -mine.to(lse.dtype)[:, None])
        real.mul_(scale[:, None])
    return gradient.to(logits.dtype)
