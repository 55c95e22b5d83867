"""What the forward and the backward of one attention call share, and what its implementations ask about it.

ids of two rows   1 1 2 2 | 3 3 3 4      bounds  0 2 4 7 8     spans  (0, 0:2) (0, 2:4) (1, 0:3) (1, 3:4)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of attention weights: `keep()` gives the [batch, heads, seq, seq] bool mask, the same at each call."""

    probability: float
    keep: Callable[[], Tensor]


@dataclass(frozen=True)
class Documents:
    """Which document each token belongs to.

    Where documents begin is read on the host at the first question, once: one object serves all layers of a batch.

    Attributes:
        ids: [batch, seq], constant within a document; equal ids in two rows are two documents.
    """

    ids: Tensor

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """First token of each document, rows laid end to end; then the number of tokens."""
        ids = self.ids.cpu()
        begins = torch.ones(ids.shape, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return (*torch.nonzero(begins.flatten()).flatten().tolist(), ids.numel())

    @functools.cached_property
    def device_bounds(self) -> Tensor:
        """`bounds` as int32 beside the ids."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.ids.device)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(stop - start for start, stop in itertools.pairwise(self.bounds))

    @property
    def is_one_a_row(self) -> bool:
        """Whether no row holds more than one document, so that plain causal attention is right."""
        return len(self.bounds) - 1 == self.ids.shape[0]


@dataclass(frozen=True, slots=True)
class Call:
    """One attention call: causal, within documents if there are any."""

    scale: float
    documents: Documents | None
    dropout: Dropout | None

    @property
    def is_plain_causal(self) -> bool:
        """Whether every query sees all earlier keys of its row."""
        return self.documents is None or self.documents.is_one_a_row

    def blocks(self, batch: int, seq: int) -> Iterator[tuple[slice, slice, slice]]:
        """(rows, all heads, positions) of the parts that are plainly causal: all rows at once, or each document."""
        if self.documents is None or self.is_plain_causal:
            yield slice(0, batch), slice(None), slice(0, seq)
            return
        bounds = self.documents.bounds
        for start, stop in itertools.pairwise(bounds):
            row = start // seq
            yield slice(row, row + 1), slice(None), slice(start - row * seq, stop - row * seq)


def expand(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads so that there is one for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def collapse(gradient: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads that share a key/value head: the transpose of `expand`."""
    if gradient.shape[1] == kv_heads:
        return gradient
    batch, heads, seq, dim = gradient.shape
    return gradient.view(batch, kv_heads, heads // kv_heads, seq, dim).sum(2)
