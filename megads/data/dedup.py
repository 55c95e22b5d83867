"""Exact duplicates: which documents have the text of an earlier one, in bounded memory.

    keys of all documents      --by the head of the key-->  buckets       (key, number)
    each bucket, sorted        --all but the first of equal keys-->  numbers to drop
    numbers to drop            --by range of numbers-->  ranges           read again as documents pass by in order

A key is 16 bytes of BLAKE3: among 10^10 documents two different texts share one with probability 10^-19.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megads.data.bucket import Buckets, num_buckets

ENTRY = np.dtype([("head", "<u8"), ("tail", "<u8"), ("number", "<u8")])
BUCKET_BYTES = 48 << 20
RANGE = 1 << 24
"""Documents whose fate is in memory at once, one byte each."""


class Duplicates:
    """The documents to drop.

    Args:
        folder: for scratch files; the caller removes it.
        num_documents: how many there are in all.
    """

    def __init__(self, folder: Path, num_documents: int) -> None:
        self._folder = folder
        self._num_documents = num_documents
        self._loaded = -1
        self._is_dropped = np.zeros(0, dtype=np.bool_)

    def find(self, keys: Iterable[NDArray[np.uint64]]) -> int:
        """Find the duplicates; returns how many.

        Args:
            keys: of all documents in order, [num_documents, 2] in pieces.
        """
        count = num_buckets(self._num_documents * ENTRY.itemsize, BUCKET_BYTES)
        buckets = Buckets(self._folder / "keys", count)
        with buckets:
            number = 0
            for piece in keys:
                entries = np.empty(len(piece), dtype=ENTRY)
                entries["head"], entries["tail"] = piece[:, 0], piece[:, 1]
                entries["number"] = np.arange(number, number + len(piece))
                number += len(piece)
                _deal(buckets, entries, which=entries["head"] % np.uint64(count))
        num_dropped = 0
        with Buckets(self._folder / "dropped", -(-self._num_documents // RANGE)) as dropped:
            for bucket in range(count):
                if buckets.path(bucket).exists():
                    numbers = _repeated(np.frombuffer(buckets.path(bucket).read_bytes(), dtype=ENTRY))
                    num_dropped += numbers.size
                    _deal(dropped, numbers, which=numbers // np.uint64(RANGE))
                    buckets.path(bucket).unlink()
        return num_dropped

    def is_kept(self, start: int, count: int) -> NDArray[np.bool_]:
        """Whether each of the documents [start, start + count) stays; `start` never falls."""
        parts = []
        while count:
            first = start % RANGE
            size = min(count, RANGE - first)
            parts.append(~self._range(start // RANGE)[first : first + size])
            start, count = start + size, count - size
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)

    def _range(self, number: int) -> NDArray[np.bool_]:
        if number != self._loaded:
            path = Buckets(self._folder / "dropped", 0).path(number)
            self._is_dropped = np.zeros(RANGE, dtype=np.bool_)
            if path.exists():
                self._is_dropped[np.frombuffer(path.read_bytes(), dtype="<u8") % RANGE] = True
            self._loaded = number
        return self._is_dropped


def _deal(buckets: Buckets, entries: NDArray[np.generic], *, which: NDArray[np.uint64]) -> None:
    """Append each entry to its bucket, keeping their order."""
    if not entries.size:
        return
    order = np.argsort(which, kind="stable")
    entries, which = entries[order], which[order]
    found, starts = np.unique(which, return_index=True)
    for bucket, piece in zip(found.tolist(), np.split(entries, starts[1:]), strict=True):
        buckets.file(bucket).write(piece.tobytes())


def _repeated(entries: NDArray[np.void]) -> NDArray[np.uint64]:
    """Numbers of the entries whose key has a smaller number elsewhere; entries ascend by number."""
    order = np.lexsort((entries["tail"], entries["head"]))  # stable: equal keys stay in order of number
    head, tail = entries["head"][order], entries["tail"][order]
    repeats = np.zeros(order.size, dtype=np.bool_)
    repeats[1:] = (head[1:] == head[:-1]) & (tail[1:] == tail[:-1])
    return np.sort(entries["number"][order][repeats])
