"""The one Batch, and how it is packed: spans of tokens -> rows of tokens, labels, mask, positions.

Lives here: what a row looks like. Does not live here: which tokens stand in it (blend, order, loader).

    span          t0 t1 t2 t3 | t4      `count` inputs, and one token more that is only a label
    tokens        t0 t1 t2 t3           spans of a row follow one another
    labels        t1 t2 t3 t4           the token that truly follows in the corpus, also at a span's end
    mask          1  1  1  1            0: padding, labels that PREFIX.mask leaves out, and with eod_mask_loss where
                                        the input is end-of-document
    positions     0  1  2  3            with document_mask again from 0 where a document or a span begins
    document_ids  0  0  1  1            with document_mask: which part of the row; attention stays inside

Context parallelism cuts rows into 2 P chunks, of which rank r has r and 2P - 1 - r, so that all ranks have the same
causal work. A row of 8 tokens over 2 ranks:

    rank 0        t0 t1 .  .  .  .  t6 t7
    rank 1        .  .  t2 t3 t4 t5 .  .

Multi-token prediction asks at depth k for the token k places later, and for its label. Both are looked up in whole rows
and never beyond the document or the span of the column; what is not there is token 0, and its label does not count:

    depth 1       t1 t2 t3 .  .  .      a span t0 t1 t2 t3, and a document that begins in the next one
    its labels    t2 t3 t4 .  .  .      each with the mask of the column that it is the label of
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megads.errors import DataError, LayoutError


def context_columns(rank: int, *, size: int, length: int) -> tuple[range, ...]:
    """The columns of a row of `length` tokens that context-parallel rank `rank` of `size` has, ascending.

    Raises:
        LayoutError: the row cannot be cut into 2 x size equal chunks.
    """
    if size == 1:
        return (range(length),)
    chunk, rest = divmod(length, 2 * size)
    if rest or not chunk:
        raise LayoutError(
            f"a row cannot be cut for {size} context-parallel ranks",
            found=f"{length} tokens",
            allowed=f"a multiple of 2 x {size}",
        )
    return tuple(range(c * chunk, (c + 1) * chunk) for c in (rank, 2 * size - 1 - rank))


@dataclass(frozen=True, slots=True)
class Ahead:
    """What stands `k` places after each column of a row, for k = 1 .. depth: all are [batch, depth, seq]."""

    tokens: Tensor
    """int64; 0 where the column's document or span ends before"""
    labels: Tensor
    """int64, the labels of those tokens"""
    mask: Tensor
    """bool, True where such a label is there and counts in the loss"""

    def map(self, change: Callable[[Tensor], Tensor]) -> Ahead:
        """With every tensor changed."""
        return Ahead(change(self.tokens), change(self.labels), change(self.mask))


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one optimizer step; the same frozen object on every floor."""

    tokens: Tensor
    """[batch, seq] int64"""
    labels: Tensor
    """[batch, seq] int64"""
    mask: Tensor
    """[batch, seq] bool, True where the label counts in the loss"""
    positions: Tensor
    """[batch, seq] int64"""
    document_ids: Tensor | None
    """[batch, row] int64, ascending in a row from 0; None: attention may cross documents. Always of whole rows and in
    host memory: where a document begins and ends decides which kernels run"""
    samples: Tensor
    """[batch] int64, index of the row in this step's global batch"""
    step: int
    """Optimizer step, from 1"""
    columns: Tensor | None = None
    """[seq] int64, place in the row of each token that is here; None: the rows are whole"""
    ahead: Ahead | None = None
    """Later tokens for multi-token prediction; None: nobody asks for them"""

    @property
    def places(self) -> Tensor:
        """[seq] int64, `columns` also where the rows are whole."""
        if self.columns is not None:
            return self.columns
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def look_ahead(self, parts: Tensor, *, depth: int) -> Batch:
        """These whole rows with what stands up to `depth` places after each column.

        Args:
            parts: [batch, seq], equal for columns of a row that belong to one text.
        """
        rows, seq = self.tokens.shape
        sources = (self.tokens, self.labels, self.mask)
        later = [x.new_zeros(rows, depth, seq) for x in sources]
        for places in range(1, min(depth + 1, seq)):
            is_same = parts[:, places:] == parts[:, :-places]
            for found, x in zip(later, sources, strict=True):
                found[:, places - 1, :-places] = x[:, places:] * is_same
        return replace(self, ahead=Ahead(*later))

    def at_depth(self, depth: int) -> Batch:
        """The batch of multi-token prediction at a depth, from 1: tokens, labels and mask of `depth` places later.

        Raises:
            DataError: nobody looked so far ahead when the batch was made.
        """
        if self.ahead is None or depth > self.ahead.tokens.shape[1]:
            raise DataError(
                "the batch holds no tokens for multi-token prediction",
                found="none" if self.ahead is None else f"{self.ahead.tokens.shape[1]} places ahead",
                allowed=f"{depth} places ahead (Packing.depth)",
            )
        later = self.ahead.map(lambda x: x[:, depth - 1])
        return replace(self, tokens=later.tokens, labels=later.labels, mask=later.mask, ahead=None)

    def context_part(self, rank: int, size: int) -> Batch:
        """What context-parallel rank `rank` of `size` has of these whole rows.

        Raises:
            LayoutError: rows cannot be cut into 2 x size equal chunks, or were cut before.
        """
        if self.columns is not None:
            raise LayoutError("rows are cut for context parallelism twice", found=self.columns.tolist()[:4])
        if size == 1:
            return self
        parts = context_columns(rank, size=size, length=self.tokens.shape[1])

        def cut(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[..., part.start : part.stop] for part in parts], dim=-1)

        columns = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        return replace(
            self,
            tokens=cut(self.tokens),
            labels=cut(self.labels),
            mask=cut(self.mask),
            positions=cut(self.positions),
            columns=columns.to(self.tokens.device),
            ahead=None if self.ahead is None else self.ahead.map(cut),
        )

    def rows(self, start: int, stop: int) -> Batch:
        """Rows start..stop-1: a micro-batch (views, no copies)."""
        ids = None if self.document_ids is None else self.document_ids[start:stop]
        return replace(self._map(lambda tensor: tensor[start:stop]), document_ids=ids)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        columns = None if self.columns is None else self.columns.to(device, non_blocking=True)
        return replace(moved, columns=columns)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a copy to a GPU runs beside the host."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """With every tensor that has one entry or row a sample changed, `document_ids` aside."""
        return replace(
            self,
            tokens=change(self.tokens),
            labels=change(self.labels),
            mask=change(self.mask),
            positions=change(self.positions),
            samples=change(self.samples),
            ahead=None if self.ahead is None else self.ahead.map(change),
        )


@dataclass(frozen=True, slots=True)
class Packing:
    """How rows are made of tokens; the same for a whole run."""

    vocab_size: int
    """Ids at or above it are refused"""
    eod: int | None = None
    """End-of-document id; only eod_mask_loss needs it"""
    document_mask: bool = False
    """Attention stays inside a document, positions restart with it"""
    eod_mask_loss: bool = False
    """What follows an end-of-document token is not counted in the loss"""
    depth: int = 0
    """How many places ahead multi-token prediction looks"""

    def __post_init__(self) -> None:
        if self.eod_mask_loss and self.eod is None:
            raise DataError(
                "data.eod_mask_loss needs an end-of-document token",
                found="a tokenizer without one",
                do="set it to false",
            )


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of a corpus inside a row."""

    tokens: NDArray[np.integer]
    """[count + 1]; the last is only a label"""
    starts: NDArray[np.int64]
    """Places in 0..count-1 where a document begins; only document_mask and depth need it"""
    counts: NDArray[np.bool_] | None = None
    """[count] whether the label at a place counts in the loss; None: all do"""


def pack(
    rows: Sequence[Sequence[Span]], packing: Packing, *, sequence_length: int, first_sample: int, step: int
) -> Batch:
    """Make a batch of `rows`; a row shorter than `sequence_length` is padded with token 0 and mask False.

    Rows get the samples first_sample, first_sample + 1, ...
    """
    shape = (len(rows), sequence_length)
    tokens = np.zeros(shape, dtype=np.int64)  # [batch, seq]
    labels = np.zeros(shape, dtype=np.int64)  # [batch, seq]
    mask = np.zeros(shape, dtype=np.bool_)  # [batch, seq]
    begins = np.zeros(shape, dtype=np.bool_)  # [batch, seq], True where a part of the row begins
    for row, spans in enumerate(rows):
        end = 0
        for span in spans:
            start, end = end, end + span.tokens.size - 1
            tokens[row, start:end] = span.tokens[:-1]
            labels[row, start:end] = span.tokens[1:]
            mask[row, start:end] = True if span.counts is None else span.counts
            begins[row, start] = True
            begins[row, start + span.starts] = True
        if end < sequence_length:
            begins[row, end] = True
    if packing.eod_mask_loss:
        mask &= tokens != packing.eod
    places = np.arange(sequence_length, dtype=np.int64)
    parts = torch.from_numpy(np.cumsum(begins, axis=1, dtype=np.int64) - 1)
    if packing.document_mask:
        document_ids = parts
        positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    else:
        document_ids = None
        positions = np.tile(places, (len(rows), 1))
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy(positions),
        document_ids=document_ids,
        samples=torch.arange(first_sample, first_sample + len(rows), dtype=torch.int64),
        step=step,
    )
    return batch.look_ahead(parts, depth=packing.depth) if packing.depth else batch
