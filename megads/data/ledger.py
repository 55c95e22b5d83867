"""The ledger: which documents a step read, and which steps read a document.

Lives here: readings cut at the edges of documents, with the source of each. Does not live here: the arithmetic
(sampler) and the command line (train/ledger). Nothing is recorded while training: both questions are answered from the
corpora, the seed and the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megads.data.corpus import Corpus, DocumentSource
from megads.data.origin import Origins, has_origins
from megads.data.sampler import Reading, Sampler
from megads.data.segment import Segment
from megads.data.stream import TokenRange
from megads.errors import DataError


@dataclass(frozen=True, slots=True)
class Entry:
    """Tokens [start, stop) of a document, counted from its first, as inputs of one row of a step."""

    step: int
    sample: int
    column: int
    """Place in the row of the first of them."""
    corpus: str
    """PREFIX of the corpus."""
    document: int
    start: int
    stop: int
    num_tokens: int
    """Of the whole document."""
    source: DocumentSource | None
    """None for a corpus without PREFIX.src."""


class Ledger:
    """Answers about the steps of a history.

    Args:
        corpora, history, seed: as for a `Sampler`.
    """

    def __init__(self, corpora: Sequence[Corpus], history: Sequence[Segment], *, seed: int) -> None:
        self._sampler = Sampler(corpora, history, seed=seed)

    def step(self, step: int) -> Iterator[Entry]:
        """What all ranks read in a step, row after row, document after document."""
        for reading in self._sampler.readings(step):
            yield from self._entries(reading)

    def document(self, corpus: Corpus, document: int, *, last_step: int) -> list[Entry]:
        """All readings of a document by the steps up to `last_step`, in order. Raises DataError: there is no such."""
        if not 0 <= document < corpus.num_documents:
            raise DataError(
                f"{corpus.path}: no such document",
                found=document,
                allowed=f"0..{corpus.num_documents - 1}, or FILE:RECORD",
            )
        start, stop = corpus.tokens.document_range(document)
        tokens = TokenRange(corpus.fingerprint, start, stop)
        readings = self._sampler.readings_of(tokens, last_step=last_step)
        return [entry for reading in readings for entry in self._entries(reading)]

    def _entries(self, reading: Reading) -> Iterator[Entry]:
        """A reading, document by document."""
        corpus = self._sampler.corpora[reading.corpus]
        start = reading.start
        while start < reading.stop:
            document = corpus.tokens.document_at(start)
            first, last = corpus.tokens.document_range(document)
            stop = min(reading.stop, last)
            yield Entry(
                reading.step,
                reading.sample,
                reading.column + start - reading.start,
                corpus.path,
                document,
                start - first,
                stop - first,
                last - first,
                corpus.source(document),
            )
            start = stop


def documents_named(corpora: Sequence[Corpus], name: str) -> list[tuple[Corpus, int]]:
    """The documents that FILE:RECORD, or a number counted in each corpus, names.

    Raises:
        DataError: it is neither, or no corpus has such a document.
    """
    file, _, record = name.rpartition(":")
    if name.isdecimal():
        found = [(corpus, int(name)) for corpus in corpora if int(name) < corpus.num_documents]
        allowed = "; ".join(f"{corpus.path}: 0..{corpus.num_documents - 1}" for corpus in corpora)
    elif not file or not record.isdecimal():
        raise DataError("not a document", found=name, allowed="a number from 0, or FILE:RECORD")
    else:
        origins = [(corpus, Origins(corpus)) for corpus in corpora if has_origins(corpus)]
        found = [
            (corpus, document)
            for corpus, origin in origins
            for document in origin.documents(file, int(record))
        ]
        allowed = "; ".join(origin.described for _, origin in origins) or "numbers: no corpus has a .src"
    if not found:
        raise DataError(
            f"no document {name} in the corpora of this config",
            allowed=allowed,
            do="look in the other part of a split; empty, filtered and duplicate records are in no corpus",
        )
    return found
