"""From (history, step, row) to the tokens of corpora, and from a place in a corpus to the steps that read it.

Lives here: the way through segment, blend and stream in both directions. Does not live here: reading the tokens
(loader) and names for people (ledger).

    step, row --segment--> sample --blend--> corpus, index --segment--> stretches --stream--> ranges of tokens
                                                                                  every arrow has its inverse
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megads.data.corpus import Corpus
from megads.data.segment import CorpusShare, Segment, Stretch, segment_at
from megads.data.stream import CorpusStream, TokenRange, open_stream
from megads.errors import DataError


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens [start, stop) of a corpus (its fingerprint) as the inputs from `column` on of a row of a step's batch."""

    step: int
    sample: int
    column: int
    corpus: str
    start: int
    stop: int


class Sampler:
    """What every step of a history reads.

    Args:
        corpora: every corpus that the last segment names with a weight.
        history: the run's segments, the first at step 1.
        seed: chooses the order of pages.

    Raises:
        DataError: a corpus of the last segment is not among `corpora`, is shorter than a page, or was not packed.
    """

    def __init__(self, corpora: Sequence[Corpus], history: Sequence[Segment], *, seed: int) -> None:
        self.history = tuple(history)
        self.corpora = {corpus.fingerprint: corpus for corpus in corpora}
        read = {share.fingerprint for segment in history for share in segment.corpora if share.weight > 0}
        self.streams: dict[str, CorpusStream] = {
            name: open_stream(corpus, self.history[-1], seed=seed)
            for name, corpus in self.corpora.items()
            if name in read
        }
        self._check_present(self.history[-1])

    def ranges(self, step: int, *, start: int, stop: int) -> list[list[TokenRange]]:
        """The inputs of rows start..stop-1 of a step's global batch, in the order of each row."""
        segment = segment_at(self.history, step)
        self._check_present(segment)
        assignment = segment.assign(segment.samples(step, start=start, stop=stop))
        rows: list[list[TokenRange]] = [[] for _ in range(stop - start)]
        for number, share in enumerate(segment.corpora):
            chosen = np.flatnonzero(assignment.corpus == number)
            if not chosen.size:
                continue
            stretches: list[list[Stretch]] = [
                share.stretches(index, segment.sequence_length) for index in assignment.index[chosen].tolist()
            ]
            found = self.streams[share.fingerprint].ranges(stretches)
            for row, ranges in zip(chosen.tolist(), found, strict=True):
                rows[row] = ranges
        return rows

    def readings(self, step: int) -> Iterator[Reading]:
        """What all ranks read in a step, row after row."""
        rows = self.ranges(step, start=0, stop=segment_at(self.history, step).batch_size)
        for sample, row in enumerate(rows):
            column = 0
            for part in row:
                yield Reading(step, sample, column, part.corpus, part.start, part.stop)
                column += part.stop - part.start

    def readings_of(self, tokens: TokenRange, *, last_step: int) -> list[Reading]:
        """Every reading of tokens of a range as inputs by the steps up to `last_step`, in order: see `readings`."""
        if tokens.corpus not in self.streams:
            return []
        stream = self.streams[tokens.corpus]
        last = segment_at(self.history, last_step).shares(last_step + 1)
        cursor = max((share.cursor for share in last if share.fingerprint == tokens.corpus), default=0)
        found = []
        for placed in stream.places(tokens.start, tokens.stop, num_epochs=-(-cursor // stream.epoch)):
            shift = placed.start - placed.place
            for number, segment in enumerate(self.history):
                following = self.history[number + 1 : number + 2]
                stop = min(last_step, following[0].first_step - 1 if following else last_step)
                for corpus, share in enumerate(segment.corpora):
                    if share.fingerprint == tokens.corpus and share.weight > 0:
                        found += [
                            Reading(step, sample, column, tokens.corpus, first + shift, end + shift)
                            for step, sample, column, (first, end) in _rows_of(
                                segment, corpus, stretch=(placed.place, placed.place + placed.count)
                            )
                            if step <= stop
                        ]
        return sorted(found, key=lambda reading: (reading.step, reading.sample, reading.column))

    def _check_present(self, segment: Segment) -> None:
        for share in segment.corpora:
            if share.weight > 0 and share.fingerprint not in self.streams:
                raise DataError(
                    f"{share.path}: the history of this run needs a corpus that is not given",
                    found=", ".join(corpus.path for corpus in self.corpora.values()),
                    allowed=f"the corpus with fingerprint {share.fingerprint[:16]} among data.train",
                )


def _rows_of(segment: Segment, corpus: int, *, stretch: Stretch) -> Iterator[tuple[int, int, int, Stretch]]:
    """(step, row, column, part of the stretch) for all that a segment without end reads of a stretch of a stream."""
    share, length = segment.corpora[corpus], segment.sequence_length
    token, stop = stretch
    while token < stop:
        index = share.index(token, length)
        if index is None:
            token = _next_edge(share, token, stop=stop)
            continue
        column = 0
        for first, last in share.stretches(index, length):
            if first <= token < last:
                break
            column += last - first
        end = min(stop, last)
        place = segment.place(segment.sample(corpus, index))
        if place is not None:
            yield (*place, column + token - first, (token, end))
        token = end


def _next_edge(share: CorpusShare, token: int, *, stop: int) -> int:
    """Where, behind a token that this share does not read, something else begins."""
    edges = [edge for rest in share.rests for edge in rest]
    return min([edge for edge in (*edges, share.cursor) if edge > token], default=stop)
