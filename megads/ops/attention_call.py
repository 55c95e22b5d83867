"""What the forward and the backward of one attention call share, and what its implementations ask about it.

A call is a block of the scores of whole rows: which columns of the row its queries are, and which its keys. Two kinds
are enough for every way to cut a sequence over ranks, and the same two are all that fast kernels know:

    causal   keys are the queries' own columns (which need not be neighbours): a query sees no later key
    full     every key comes before every query: a query sees all

With documents a query sees only keys of its own. Documents are contiguous, so what is seen falls into rectangles, each
of the kind of the call:

    ids 1 1 2 2 | 2 2 3       causal, queries 0..3        full, keys 0..3, queries 4..6
                              q0 x . . .                  q4 . . x x
                              q1 x x . .                  q5 . . x x
                              q2 . . x .                  q6 . . . .
                              q3 . . x x
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Columns = tuple[range, ...]
"""Places in a row, as ascending ranges."""


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of attention weights.

    `keep(queries, keys)` gives the [batch, heads, queries, keys] bool mask of these columns, the same at each call.
    """

    probability: float
    keep: Callable[[Columns, Columns], Tensor]


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Queries and keys of one call, as indices into its tensors, of which all pairs its kind allows are seen."""

    rows: slice
    queries: slice
    keys: slice

    @property
    def of_queries(self) -> tuple[slice, ...]:
        """Index into [batch, heads, queries, ...]."""
        return self.rows, slice(None), self.queries

    @property
    def of_keys(self) -> tuple[slice, ...]:
        """Index into [batch, heads, keys, ...]."""
        return self.rows, slice(None), self.keys


@dataclass(frozen=True)
class Call:
    """One attention call, causal or full, within documents if there are any.

    Attributes:
        scale: of the scores.
        queries, keys: their columns, as many as the tensors have.
        documents: [batch, row] ids of whole rows, ascending in a row; equal ids in two rows are two documents. Where
            documents begin is read on the host.
        dropout: of the weights.

    Raises:
        ValueError: the columns are neither the same nor all keys before all queries.
    """

    scale: float
    queries: Columns
    keys: Columns
    documents: Tensor | None = None
    dropout: Dropout | None = None

    def __post_init__(self) -> None:
        if not self.is_causal and self.keys[-1].stop > self.queries[0].start:
            raise ValueError(f"neither causal nor full: queries {self.queries}, keys {self.keys}")

    @property
    def is_causal(self) -> bool:
        """Whether keys are the queries' own columns, so that later ones are hidden."""
        return self.queries == self.keys

    @functools.cached_property
    def query_ids(self) -> Tensor | None:
        """[batch, queries] document ids on the host."""
        return None if self.documents is None else _select(self.documents, self.queries)

    @functools.cached_property
    def key_ids(self) -> Tensor | None:
        """[batch, keys] document ids on the host."""
        return None if self.documents is None else _select(self.documents, self.keys)

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """First query of each document, rows laid end to end; then the number of queries. Of a call with documents."""
        if self.query_ids is None:
            raise ValueError("a call without documents has no bounds")
        begins = torch.ones(self.query_ids.shape, dtype=torch.bool)
        begins[:, 1:] = self.query_ids[:, 1:] != self.query_ids[:, :-1]
        return (*torch.nonzero(begins.flatten()).flatten().tolist(), self.query_ids.numel())

    @functools.cached_property
    def rectangles(self) -> tuple[Rectangle, ...]:
        """What is seen with documents: each of them on the diagonal; below it, in each row, the one that goes on."""
        if self.query_ids is None or self.key_ids is None:
            raise ValueError("a call without documents has no rectangles")
        batch, num_queries = self.query_ids.shape
        if self.is_causal:
            spans = ((start // num_queries, start, stop) for start, stop in itertools.pairwise(self.bounds))
            found = []
            for row, start, stop in spans:
                part = slice(start - row * num_queries, stop - row * num_queries)
                found.append(Rectangle(slice(row, row + 1), part, part))
            return tuple(found)
        last = self.key_ids[:, -1:]
        going_on = (
            (self.query_ids == last).sum(1).tolist()
        )  # leading queries, of documents that hold the last key
        tail = (self.key_ids == last).sum(1).tolist()
        num_keys = self.key_ids.shape[1]
        return tuple(
            Rectangle(slice(row, row + 1), slice(0, going_on[row]), slice(num_keys - tail[row], num_keys))
            for row in range(batch)
            if going_on[row]
        )

    @functools.cached_property
    def is_dense(self) -> bool:
        """Whether documents hide nothing."""
        if self.query_ids is None or self.key_ids is None:
            return True
        if self.is_causal:
            return len(self.bounds) - 1 == self.query_ids.shape[0]
        return bool((self.query_ids[:, -1] == self.key_ids[:, 0]).all())

    @property
    def is_empty(self) -> bool:
        """Whether documents hide everything."""
        return not self.is_dense and not self.rectangles

    @property
    def longest(self) -> int:
        """Queries of the longest document."""
        return max(stop - start for start, stop in itertools.pairwise(self.bounds))

    def visible(self, device: torch.device) -> Tensor:
        """[1 or batch, 1, queries, keys] bool, which keys a query sees."""
        shape = (sum(map(len, self.queries)), sum(map(len, self.keys)))
        mask = torch.ones(1, 1, *shape, dtype=torch.bool, device=device)
        if self.is_causal:
            mask = mask.tril()
        if self.query_ids is not None and self.key_ids is not None:
            mask = mask & (self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :]).to(device)
        return mask


def whole(seq: int) -> Columns:
    """All columns of a row of `seq` tokens."""
    return (range(seq),)


def _select(ids: Tensor, columns: Columns) -> Tensor:
    ids = ids.cpu()
    return torch.cat([ids[:, part.start : part.stop] for part in columns], dim=1)


def expand(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads so that there is one for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def collapse(gradient: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads that share a key/value head: the transpose of `expand`."""
    if gradient.shape[1] == kv_heads:
        return gradient
    batch, heads, seq, dim = gradient.shape
    return gradient.view(batch, kv_heads, heads // kv_heads, seq, dim).sum(2)
