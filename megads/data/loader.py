"""Loaders: (corpora, seed, history, step) -> this data-parallel rank's rows of the step's batch.

Lives here: following a sample from its number to bytes on disk, for training and for held-out data. Does not
live here: the arithmetic (blend, order) and the look of a row (sequence).

    step --history--> segment --blend--> corpus, place in its page stream
                              --order--> pages of the corpus --pread--> spans --pack--> Batch

    rank d of D gets the rows [d * G / D, (d + 1) * G / D) of the G rows of the batch, so the batch itself
    does not depend on D. There is no state: any step can be asked for at any time, and resuming is asking for
    the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megads.data.blend import Segment, segment_at
from megads.data.corpus import Corpus, DocumentSource, check_ids
from megads.data.order import PageStream
from megads.data.sequence import Batch, Packing, Span, pack
from megads.errors import DataError, LayoutError

logger = logging.getLogger("megads.data")


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens [start, stop) of a corpus, read as inputs by one sample."""

    corpus: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SampleOrigin:
    """Where one stretch of a sample came from."""

    sample: int
    tokens: TokenRange
    first_document: int
    last_document: int
    source: DocumentSource | None
    """File and record of the first document, where the corpus has a PREFIX.src."""


class Loader:
    """Training batches.

    Args:
        corpora: every corpus that the history names with a weight.
        history: the run's segments, the first at step 1.
        seed: chooses the order of pages.
        packing: how rows are made.
        dp_rank, dp_size: which part of each batch is this rank's.

    Raises:
        DataError: a corpus of the history is not among `corpora`, or is shorter than a page.
        LayoutError: the batch of the last segment cannot be divided among the ranks.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        history: Sequence[Segment],
        *,
        seed: int,
        packing: Packing,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self._history = tuple(history)
        self._packing = packing
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._corpora: Mapping[str, Corpus] = {corpus.fingerprint: corpus for corpus in corpora}
        self._streams: dict[str, PageStream] = {}
        for segment in self._history:
            for share in segment.corpora:
                if share.weight > 0 and share.fingerprint in self._corpora:
                    num_pages = self._corpora[share.fingerprint].num_pages(segment.page)
                    self._streams[share.fingerprint] = PageStream(num_pages, seed, share.fingerprint)
        self._check_rows(self._history[-1])
        self._check_present(self._history[-1])

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch of `step` (from 1). Raises DataError for unreadable data."""
        segment = segment_at(self._history, step)
        self._check_rows(segment)
        num_rows = segment.batch_size // self._dp_size
        first = self._dp_rank * num_rows
        rows = [
            [self._read(token_range) for token_range in row]
            for row in self._ranges(segment, step, first, first + num_rows)
        ]
        return pack(
            rows, self._packing, sequence_length=segment.sequence_length, first_sample=first, step=step
        )

    def documents(self, step: int) -> tuple[SampleOrigin, ...]:
        """Which documents all ranks read in `step`, stretch by stretch."""
        segment = segment_at(self._history, step)
        origins: list[SampleOrigin] = []
        for sample, row in enumerate(self._ranges(segment, step, 0, segment.batch_size)):
            for token_range in row:
                corpus = self._corpora[token_range.corpus]
                first = corpus.tokens.document_at(token_range.start)
                last = corpus.tokens.document_at(token_range.stop - 1)
                named = TokenRange(corpus.path, token_range.start, token_range.stop)
                origins.append(SampleOrigin(sample, named, first, last, corpus.source(first)))
        return tuple(origins)

    def _ranges(self, segment: Segment, step: int, start: int, stop: int) -> list[list[TokenRange]]:
        """Token ranges of rows start..stop-1 of the step's global batch."""
        self._check_present(segment)
        assignment = segment.blend().assign(segment.samples(step, start=start, stop=stop))
        rows: list[list[TokenRange]] = [[] for _ in range(stop - start)]
        for number, share in enumerate(segment.corpora):
            chosen = np.flatnonzero(assignment.corpus == number)
            if not chosen.size:
                continue
            begins = share.cursor + assignment.index[chosen] * segment.sequence_length  # [rows of corpus]
            found = stream_ranges(
                self._streams[share.fingerprint],
                begins,
                corpus=share.fingerprint,
                page=segment.page,
                length=segment.sequence_length,
            )
            for row, ranges in zip(chosen.tolist(), found, strict=True):
                rows[row] = ranges
        return rows

    def _read(self, token_range: TokenRange) -> Span:
        corpus = self._corpora[token_range.corpus]
        return read_span(corpus, start=token_range.start, stop=token_range.stop, packing=self._packing)

    def _check_rows(self, segment: Segment) -> None:
        if segment.batch_size % self._dp_size:
            raise LayoutError(
                "batch.global cannot be divided among the data-parallel ranks",
                found=f"batch.global {segment.batch_size}, {self._dp_size} data-parallel ranks",
                allowed=f"a multiple of {self._dp_size}",
            )

    def _check_present(self, segment: Segment) -> None:
        for share in segment.corpora:
            if share.weight > 0 and share.fingerprint not in self._streams:
                raise DataError(
                    f"{share.path}: the history of this run needs a corpus that is not given",
                    found=", ".join(corpus.path for corpus in self._corpora.values()),
                    allowed=f"the corpus with fingerprint {share.fingerprint[:16]} among data.train",
                )


class ValidLoader:
    """Held-out data, in order: every token of a corpus but the first is a label exactly once.

    Windows of `sequence_length` follow one another, each read afresh (no context from the window before); the
    last is padded with mask False. Every rank has the same number of batches, the last filled up with rows of
    mask False. With `Packing.eod_mask_loss` the first token of a document isn't counted: leave it off for
    bits per byte.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        packing: Packing,
        sequence_length: int,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        if batch_size % dp_size:
            raise LayoutError(
                "the validation batch cannot be divided among the data-parallel ranks",
                found=f"batch {batch_size}, {dp_size} data-parallel ranks",
                allowed=f"a multiple of {dp_size}",
            )
        if corpus.num_tokens < 2:
            raise DataError(
                f"{corpus.path}: nothing to predict", found=f"{corpus.num_tokens} token", allowed="2 or more"
            )
        self.corpus = corpus
        self.num_labels = corpus.num_tokens - 1
        self.num_windows = -(-self.num_labels // sequence_length)
        self.num_batches = -(-self.num_windows // batch_size)
        self._packing = packing
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._num_rows = batch_size // dp_size
        self._first_row = dp_rank * self._num_rows

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the whole corpus' text, for bits per byte; None without a manifest."""
        return self.corpus.text_bytes

    def batch(self, number: int) -> Batch:
        """This rank's rows of batch `number` (0..num_batches-1); its `step` is number + 1."""
        length = self._sequence_length
        rows: list[list[Span]] = []
        for row in range(self._first_row, self._first_row + self._num_rows):
            window = number * self._batch_size + row
            start, stop = window * length, min((window + 1) * length, self.num_labels)
            rows.append(
                [read_span(self.corpus, start=start, stop=stop, packing=self._packing)]
                if start < stop
                else []
            )
        return pack(
            rows, self._packing, sequence_length=length, first_sample=self._first_row, step=number + 1
        )

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(number) for number in range(self.num_batches))

    def __len__(self) -> int:
        return self.num_batches


def read_span(corpus: Corpus, *, start: int, stop: int, packing: Packing) -> Span:
    """Inputs [start, stop) of a corpus and their labels. Raises DataError for ids outside the vocabulary."""
    tokens = corpus.tokens.read(start, stop - start + 1)
    check_ids(corpus, tokens, vocab_size=packing.vocab_size, start=start)
    if not packing.document_mask:
        return Span(tokens, starts=np.empty(0, dtype=np.int64))
    return Span(tokens, starts=corpus.tokens.document_starts(start, stop) - start)


def stream_ranges(
    stream: PageStream, begins: NDArray[np.int64], *, corpus: str, page: int, length: int
) -> list[list[TokenRange]]:
    """The corpus tokens behind [begin, begin + length) of a page stream, for each begin; split at page edges.

    Neighbours in the stream that are neighbours in the corpus too are joined, so no document is cut there.
    """
    first, last = begins // page, (begins + length - 1) // page
    counts = last - first + 1
    offsets = np.cumsum(counts) - counts
    numbers = np.arange(int(counts.sum())) + np.repeat(first - offsets, counts)
    placed = stream.pages(numbers)
    rows: list[list[TokenRange]] = []
    for begin, offset, count in zip(begins.tolist(), offsets.tolist(), counts.tolist(), strict=True):
        ranges: list[TokenRange] = []
        for number, where in zip(
            numbers[offset : offset + count].tolist(), placed[offset : offset + count].tolist(), strict=True
        ):
            edge = number * page
            start = where * page + max(begin - edge, 0)
            stop = where * page + min(begin + length - edge, page)
            if ranges and ranges[-1].stop == start:
                ranges[-1] = TokenRange(corpus, ranges[-1].start, stop)
            else:
                ranges.append(TokenRange(corpus, start, stop))
        rows.append(ranges)
    return rows


def check_epochs(
    history: Sequence[Segment], corpora: Sequence[Corpus], *, last_step: int, max_epochs: Mapping[str, float]
) -> None:
    """Refuse a run that would read a corpus too often, before it starts.

    Args:
        history: its last segment is taken to hold to the end.
        corpora: those of the run.
        last_step: the last step of the run.
        max_epochs: the limit for each corpus that has one, by path.

    Raises:
        DataError: naming the corpus, what the run would need and what there is.
    """
    segment = segment_at(history, last_step)
    cursors = segment.cursors(last_step + 1)
    needed = {share.fingerprint: cursor for share, cursor in zip(segment.corpora, cursors, strict=True)}
    for corpus in corpora:
        limit = max_epochs.get(corpus.path)
        epoch = corpus.num_pages(segment.page) * segment.page
        tokens = needed.get(corpus.fingerprint, 0)
        if tokens > epoch:
            logger.info("%s: %.2f epochs by step %d", corpus.path, tokens / epoch, last_step)
        if limit is not None and tokens > limit * epoch:
            raise DataError(
                f"{corpus.path}: the run would read the corpus more often than max_epochs",
                found=f"{tokens} tokens by step {last_step} = {tokens / epoch:.2f} epochs of {epoch} tokens",
                allowed=f"{limit:g} epochs = {int(limit * epoch)} tokens",
                do="fewer run.steps, a smaller weight, a larger max_epochs or more data",
            )
