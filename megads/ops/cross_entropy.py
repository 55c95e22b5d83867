"""Cross entropy of logits whose vocabulary is cut over ranks: the local halves, without communication.

    maximum (local) -> max over ranks -> sums (local) -> sum over ranks -> lse = max + log(sum), loss = lse - target

A rank may hold fewer real columns than its tensor has (padding), even none: padded columns behave as logits of -inf.
Padded columns get gradient 0. Label smoothing and z-loss are other weights of the same sums (`LossWeights`). Arithmetic
is float32, or float64 for float64 logits, on a few rows at a time, so that low-precision logits are never widened as a
whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WIDE = 1 << 26  # elements in the dtype of the arithmetic at a time


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
class LossWeights:
    """loss = lse - label x (the label's logit) - each x (sum of all logits) + square x lse^2.

    Over a vocabulary of V ids label + V x each = 1: what the loss compares with is a distribution. The defaults are the
    plain cross entropy.
    """

    label: float = 1.0
    each: float = 0.0
    square: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether this is the plain cross entropy."""
        return (self.each, self.square) == (0.0, 0.0)


PLAIN = LossWeights()


@dataclass(frozen=True, slots=True)
class LocalSums:
    """Per token: sum of exp(logit - maximum) over this rank's columns; the label's logit if it is here, else 0; where
    asked for, the sum of (logit - maximum).
    """

    exponentials: Tensor  # [tokens]
    target: Tensor  # [tokens]
    shifted: Tensor | None = None  # [tokens]


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _slices(logits: Tensor) -> Iterator[slice]:
    """Rows to work on at a time: [tokens, vocab_local] cut along the tokens."""
    tokens, width = logits.shape
    step = max(1, MAX_WIDE // max(width, 1))
    return (slice(start, start + step) for start in range(0, tokens, step))


def local_maximum(logits: Tensor, columns: Columns) -> Tensor:
    """Largest logit of each token over real columns: [tokens, vocab_local] -> [tokens]; -inf where there are none."""
    dtype = wide_dtype(logits)
    if columns.count == 0:
        return logits.new_full(logits.shape[:1], float("-inf"), dtype=dtype)
    return logits[:, : columns.count].amax(dim=-1).to(dtype)


def local_sums(
    logits: Tensor, labels: Tensor, *, maximum: Tensor, columns: Columns, has_shifted: bool = False
) -> LocalSums:
    """This rank's part of the sums over the vocabulary. labels, maximum: [tokens].

    Args:
        has_shifted: whether `shifted` is asked for.
    """
    real = logits[:, : columns.count]
    exponentials = torch.zeros_like(maximum)
    sums = torch.zeros_like(maximum) if has_shifted else None
    if columns.count == 0:
        return LocalSums(exponentials, torch.zeros_like(maximum), sums)
    for rows in _slices(real):
        shifted = real[rows].to(maximum.dtype) - maximum[rows, None]
        if sums is not None:
            sums[rows] = shifted.sum(dim=-1)
        exponentials[rows] = shifted.exp_().sum(dim=-1)
    mine, column = columns.locate(labels)
    label_logit = real.gather(1, column[:, None]).squeeze(1).to(maximum.dtype)
    return LocalSums(exponentials, torch.where(mine, label_logit, 0.0), sums)


def local_gradient(
    logits: Tensor,
    labels: Tensor,
    *,
    lse: Tensor,
    scale: Tensor,
    columns: Columns,
    weights: LossWeights = PLAIN,
) -> Tensor:
    """Gradient with respect to the local logits, in the logits' dtype.

    scale x ((1 + 2 x square x lse) x softmax - label x one hot - each); scale x (softmax - one hot) for the plain loss.

    Args:
        lse: [tokens] log-sum-exp over the whole vocabulary.
        scale: [tokens] gradient of each token's loss; 0 where masked.
        weights: of the loss.
    """
    gradient = torch.empty_like(logits)
    gradient[:, columns.count :] = 0.0
    if columns.count:
        mine, column = columns.locate(labels)
        at_label = -weights.label * mine.to(lse.dtype)[:, None]
        for rows in _slices(logits):
            real = (logits[rows, : columns.count].to(lse.dtype) - lse[rows, None]).exp_()
            if weights.square:
                real.mul_(1.0 + 2.0 * weights.square * lse[rows, None])
            if weights.each:
                real.sub_(weights.each)
            real.scatter_add_(1, column[rows, None], at_label[rows])
            gradient[rows, : columns.count] = real.mul_(scale[rows, None])
    return gradient
