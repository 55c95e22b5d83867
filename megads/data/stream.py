"""Corpus streams: from places on the endless line of a corpus' tokens to the tokens themselves, and back.

Lives here: the two ways in which pages are made of a corpus, behind one pair of methods. Does not live here: which
places a step reads (segment) and what a row looks like (sequence).

    cut         a page is `page` tokens of the corpus in a row        page p = tokens [p * page, (p + 1) * page)
    best_fit    a page is a row of whole documents, prepared offline  page p = the pieces of row p of PREFIX.pack-L

    stream      page 7 | page 2 | page 9 | ...      epoch after epoch, each a permutation of all pages
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megads.data.corpus import Corpus
from megads.data.order import PageStream
from megads.data.pack import Pack
from megads.data.segment import Segment, Stretch


@dataclass(frozen=True, slots=True)
class TokenRange:
    """Tokens [start, stop) of a corpus (its fingerprint), read as inputs by one sample."""

    corpus: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Placed:
    """One stretch of a document on the stream: token `start` of the corpus is token `place` of the stream."""

    place: int
    start: int
    count: int


class CorpusStream(Protocol):
    """The pages of one corpus in training order."""

    @property
    def epoch(self) -> int:
        """Tokens of the stream that one epoch has."""

    def ranges(self, rows: Sequence[Sequence[Stretch]]) -> list[list[TokenRange]]:
        """The corpus tokens behind the stretches of each row, in their order."""

    def places(self, start: int, stop: int, *, num_epochs: int) -> Iterator[Placed]:
        """Where tokens [start, stop) of the corpus stand as inputs in the first epochs: the inverse of `ranges`."""


class CutStream:
    """Pages that follow one another in the corpus."""

    def __init__(self, corpus: Corpus, page: int, *, seed: int) -> None:
        self._name = corpus.fingerprint
        self._page = page
        self._pages = PageStream(corpus.num_pages(page), seed, self._name)

    @property
    def epoch(self) -> int:
        return self._pages.num_pages * self._page

    def ranges(self, rows: Sequence[Sequence[Stretch]]) -> list[list[TokenRange]]:
        """Neighbours in a row that are neighbours in the corpus too are joined, so no document is cut there."""
        page = self._page
        edges = np.array([stretch for row in rows for stretch in row], dtype=np.int64).reshape(-1, 2)
        first, last = edges[:, 0] // page, (edges[:, 1] - 1) // page
        counts = last - first + 1
        offsets = np.cumsum(counts) - counts
        numbers = np.arange(int(counts.sum())) + np.repeat(first - offsets, counts)
        where = self._pages.pages(numbers) * page  # [pages] first token of each
        begins = where + np.maximum(np.repeat(edges[:, 0], counts) - numbers * page, 0)
        ends = where + np.minimum(np.repeat(edges[:, 1], counts) - numbers * page, page)
        found = zip(begins.tolist(), ends.tolist(), strict=True)
        pages_of = iter(counts.tolist())
        made = []
        for row in rows:
            ranges: list[TokenRange] = []
            for _ in range(sum(next(pages_of) for _ in row)):
                start, stop = next(found)
                if ranges and ranges[-1].stop == start:
                    ranges[-1] = TokenRange(self._name, ranges[-1].start, stop)
                else:
                    ranges.append(TokenRange(self._name, start, stop))
            made.append(ranges)
        return made

    def places(self, start: int, stop: int, *, num_epochs: int) -> Iterator[Placed]:
        page = self._page
        for number in range(start // page, min(-(-stop // page), self._pages.num_pages)):
            first, last = max(start, number * page), min(stop, (number + 1) * page)
            for place in self._pages.places(number, num_epochs=num_epochs).tolist():
                yield Placed(place * page + first - number * page, first, last - first)


class RowStream:
    """Rows of whole documents."""

    def __init__(self, corpus: Corpus, page: int, *, seed: int) -> None:
        self._name = corpus.fingerprint
        self._pack = Pack(corpus, page)
        self._rows = PageStream(self._pack.num_rows, seed, f"{self._name}/pack-{page}")

    @property
    def epoch(self) -> int:
        return self._rows.num_pages * self._pack.length

    def ranges(self, rows: Sequence[Sequence[Stretch]]) -> list[list[TokenRange]]:
        """A stretch is always one whole row."""
        length = self._pack.length
        numbers = np.array([start // length for ((start, _),) in rows], dtype=np.int64)
        return [
            [TokenRange(self._name, start, start + count) for start, count in self._pack.pieces(row)]
            for row in self._rows.pages(numbers).tolist()
        ]

    def places(self, start: int, stop: int, *, num_epochs: int) -> Iterator[Placed]:
        for piece in self._pack.find(start, stop):
            for place in self._rows.places(piece.row, num_epochs=num_epochs).tolist():
                yield Placed(place * self._pack.length + piece.column, piece.start, piece.count)


def open_stream(corpus: Corpus, segment: Segment, *, seed: int) -> CorpusStream:
    """The stream of a corpus in the history that `segment` belongs to.

    Raises:
        DataError: the corpus is shorter than a page, or was not packed for rows of this length.
    """
    kind = RowStream if segment.packing == "best_fit" else CutStream
    return kind(corpus, segment.page, seed=seed)
