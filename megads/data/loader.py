"""Loaders: (corpora, seed, history, step) -> this data-parallel rank's rows of the step's batch.

Lives here: following a sample from its number to bytes on disk, for training and for held-out data. Does not
live here: the arithmetic (sampler) and the look of a row (sequence).

    step --sampler--> ranges of tokens of corpora --pread--> spans --pack--> Batch

    rank d of D gets the rows [d * G / D, (d + 1) * G / D) of the G rows of the batch, so the batch itself
    does not depend on D. There is no state: any step can be asked for at any time, and resuming is asking for
    the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from megads.data.corpus import Corpus, check_ids
from megads.data.pack import Pack
from megads.data.sampler import Sampler
from megads.data.segment import PackingKind, Segment, segment_at
from megads.data.sequence import Batch, Packing, Span, pack
from megads.data.stream import TokenRange
from megads.errors import DataError, LayoutError

logger = logging.getLogger("megads.data")


class Loader:
    """Training batches.

    Args:
        corpora: every corpus that the history names with a weight.
        history: the run's segments, the first at step 1.
        seed: chooses the order of pages.
        packing: how rows are made.
        dp_rank, dp_size: which part of each batch is this rank's.
        reads_tokens: whether tokens and labels are read; else they are 0, and what remains of a batch is right:
            positions, documents, and the mask.

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
        reads_tokens: bool = True,
    ) -> None:
        self._packing = packing
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self.reads_tokens = reads_tokens or packing.eod_mask_loss  # the mask depends on the tokens
        self._sampler = Sampler(corpora, history, seed=seed)
        self._check_rows(history[-1])

    def batch(self, step: int) -> Batch:
        """This rank's rows of the batch of `step` (from 1).

        Raises:
            DataError: unreadable data; names corpus, sample and step.
        """
        segment = segment_at(self._sampler.history, step)
        self._check_rows(segment)
        num_rows = segment.batch_size // self._dp_size
        first = self._dp_rank * num_rows
        ranges = self._sampler.ranges(step, start=first, stop=first + num_rows)
        rows = [self._read(row, sample=first + number, step=step) for number, row in enumerate(ranges)]
        return pack(
            rows, self._packing, sequence_length=segment.sequence_length, first_sample=first, step=step
        )

    def _read(self, row: Sequence[TokenRange], *, sample: int, step: int) -> list[Span]:
        try:
            return [
                read_span(
                    self._sampler.corpora[part.corpus],
                    start=part.start,
                    stop=part.stop,
                    packing=self._packing,
                    reads_tokens=self.reads_tokens,
                )
                for part in row
            ]
        except DataError as error:
            raise DataError(f"sample {sample} of step {step}: {error}") from error

    def _check_rows(self, segment: Segment) -> None:
        if segment.batch_size % self._dp_size:
            raise LayoutError(
                "batch.global cannot be divided among the data-parallel ranks",
                found=f"batch.global {segment.batch_size}, {self._dp_size} data-parallel ranks",
                allowed=f"a multiple of {self._dp_size}",
            )


class ValidLoader:
    """Held-out data, in order: every token of a corpus but the first is a label exactly once, if it counts as one.

    Windows of `sequence_length` follow one another, each read afresh (no context from the window before); the
    last is padded with mask False. Every rank has the same number of batches, the last filled up with rows of
    mask False. With `Packing.eod_mask_loss` the first token of a document isn't counted: leave it off for
    bits per byte. With rows of `best_fit` every window is a row of PREFIX.pack-L instead: documents are whole, and
    the first token of none is a label.
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
        rows: PackingKind = "cut",
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
        self._rows = Pack(corpus, sequence_length) if rows == "best_fit" else None
        self.num_labels = self._rows.manifest.tokens if self._rows else corpus.num_tokens - 1
        self.num_windows = self._rows.num_rows if self._rows else -(-self.num_labels // sequence_length)
        self.num_batches = -(-self.num_windows // batch_size)
        self._packing = packing
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._num_rows = batch_size // dp_size
        self._first_row = dp_rank * self._num_rows

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the whole corpus' text, for bits per byte; None where no manifest tells, or only part of the
        text is predicted."""
        return None if self.corpus.has_mask or self._rows else self.corpus.text_bytes

    def batch(self, number: int) -> Batch:
        """This rank's rows of batch `number` (0..num_batches-1); its `step` is number + 1."""
        first = number * self._batch_size + self._first_row
        rows = [
            [
                read_span(self.corpus, start=start, stop=stop, packing=self._packing)
                for start, stop in self._window(window)
            ]
            for window in range(first, first + self._num_rows)
        ]
        return pack(
            rows,
            self._packing,
            sequence_length=self._sequence_length,
            first_sample=self._first_row,
            step=number + 1,
        )

    def _window(self, window: int) -> list[tuple[int, int]]:
        """The inputs [start, stop) of a window, none behind the last."""
        if window >= self.num_windows:
            return []
        if self._rows:
            return [(start, start + count) for start, count in self._rows.pieces(window)]
        start = window * self._sequence_length
        return [(start, min(start + self._sequence_length, self.num_labels))]

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(number) for number in range(self.num_batches))

    def __len__(self) -> int:
        return self.num_batches


def read_span(corpus: Corpus, *, start: int, stop: int, packing: Packing, reads_tokens: bool = True) -> Span:
    """Inputs [start, stop) of a corpus and their labels. Raises DataError for ids outside the vocabulary."""
    if reads_tokens:
        tokens = corpus.tokens.read(start, stop - start + 1)
        check_ids(corpus, tokens, vocab_size=packing.vocab_size, start=start)
    else:
        tokens = np.zeros(stop - start + 1, dtype=np.uint16)
    counts = corpus.read_mask(start + 1, stop - start).view(np.bool_) if corpus.has_mask else None
    starts = np.empty(0, dtype=np.int64)
    if packing.document_mask or packing.depth:
        starts = corpus.tokens.document_starts(start, stop) - start
    return Span(tokens, starts, counts)


def check_epochs(
    history: Sequence[Segment],
    corpora: Sequence[Corpus],
    *,
    last_step: int,
    max_epochs: Mapping[str, float],
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
    shares = segment_at(history, last_step).shares(last_step + 1)
    needed = {share.fingerprint: share.cursor - share.num_resting for share in shares}
    streams = Sampler(corpora, history, seed=0).streams
    for corpus in corpora:
        if corpus.fingerprint not in streams:
            continue
        limit = max_epochs.get(corpus.path)
        epoch = streams[corpus.fingerprint].epoch
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
