"""PREFIX.src the other way round: from a file and record to documents, and whether documents stand file by file.

Lives here: looking things up in PREFIX.src. Does not live here: its format and the source of one document (corpus).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megads.data.corpus import SOURCE_DTYPE, SOURCE_HEADER, SOURCE_MAGIC, Corpus
from megads.data.fixed_file import FixedFile
from megads.errors import DataError

BLOCK = 1 << 18
"""Documents that are looked at together."""
NUM_SAMPLES = 256
"""Documents by which an order is judged."""


class Origins:
    """The sources of all documents of a corpus.

    Raises:
        DataError: the corpus has no PREFIX.src, or it is damaged.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._path = Path(f"{corpus.path}.src")
        self._file = FixedFile(self._path)
        header = self._file.read(0, SOURCE_HEADER.size)
        magic, self._num_documents, num_files = SOURCE_HEADER.unpack(header)
        if magic != SOURCE_MAGIC or self._num_documents != corpus.num_documents:
            raise DataError(
                f"{self._path}: damaged or not of this corpus",
                found=f"{self._num_documents} documents",
                allowed=corpus.num_documents,
                do="copy all files of the corpus again",
            )
        self._num_files = num_files

    def documents(self, name: str, record: int) -> list[int]:
        """Documents made of record `record` of a file, which is named in full or by the end of its path."""
        names = self._names()
        wanted = [number for number, known in enumerate(names) if f"/{known}".endswith(f"/{name}")]
        if not wanted:
            return []
        found: list[int] = []
        for first in range(0, self._num_documents, BLOCK):
            entries = self._entries(first, min(BLOCK, self._num_documents - first))
            mine = np.isin(entries["file"], wanted) & (entries["record"] == record)
            found += (np.flatnonzero(mine) + first).tolist()
        return found

    @property
    def described(self) -> str:
        """The first files that documents came from, for messages."""
        names = self._names()
        return f"{self._path}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}"

    @property
    def is_sorted(self) -> bool:
        """Whether the documents of several files seem to stand file by file."""
        last = self._num_documents - 1
        places = sorted({number * last // (NUM_SAMPLES - 1) for number in range(NUM_SAMPLES)})
        files = [int(self._entries(place, 1)["file"][0]) for place in places]
        return len(set(files)) > 1 and files == sorted(files)

    def _entries(self, first: int, count: int) -> np.ndarray:
        size = SOURCE_DTYPE.itemsize
        content = self._file.read(SOURCE_HEADER.size + first * size, count * size)
        return np.frombuffer(content, dtype=SOURCE_DTYPE)

    def _names(self) -> Sequence[str]:
        offset = SOURCE_HEADER.size + self._num_documents * SOURCE_DTYPE.itemsize
        names = []
        for _ in range(self._num_files):
            size = int.from_bytes(self._file.read(offset, 8), "little")
            names.append(self._file.read(offset + 8, size).decode("utf-8", "surrogateescape"))
            offset += 8 + size
        return names


def has_origins(corpus: Corpus) -> bool:
    """Whether a corpus says where its documents came from; one made by Megatron's tool does not."""
    return Path(f"{corpus.path}.src").is_file()


def warning_of_order(corpus: Corpus) -> str | None:
    """What to tell of a corpus whose documents were not shuffled and stand file by file; None: nothing."""
    if corpus.manifest is None or corpus.manifest.shuffle_seed is not None:
        return None
    if not has_origins(corpus) or not Origins(corpus).is_sorted:
        return None
    return (
        f"{corpus.path}: documents were not shuffled and stand file by file, so neighbours in a sample are alike; "
        "make the corpus with --shuffle-seed N"
    )
