"""Engines: whole Arrow batches of text to token ids.

Lives here: the protocol, and the reference engine over a `Tokenizer`. Does not live here: the tokenizers themselves
(tokenizer), the fast engine (fast_engine), choosing and checking one (engine_choice).

Engines are safe to call from several threads at once, which then run in parallel.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from megads.data.documents import text_sizes
from megads.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import pyarrow

SLICE_BYTES = 1 << 19
"""Text that a reference engine sees at once: it needs about 120 bytes of memory for each byte."""
SLICE_TEXTS = 1024
LARGE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a batch of texts became."""

    ids: NDArray[np.integer]
    """Ids of all texts one after another, [sum of lengths]."""
    lengths: NDArray[np.int64]
    """Tokens of each text, [num_texts]."""

    def of(self, texts: NDArray[np.intp]) -> Tokens:
        """Those of some of the texts."""
        ends = np.cumsum(self.lengths)
        pieces = [self.ids[ends[i] - self.lengths[i] : ends[i]] for i in texts]
        return Tokens(np.concatenate([self.ids[:0], *pieces]), self.lengths[texts])


class Engine(Protocol):
    """Text to ids, a batch at a time."""

    @property
    def name(self) -> str:
        """The library and its version, e.g. `tokenizers 0.23.3`."""

    def encode(self, texts: pyarrow.LargeStringArray) -> Tokens:
        """Ids of all texts. Nothing is put before or after a text. The interpreter is free meanwhile."""


class ReferenceEngine:
    """The tokenizer's own library, in slices of bounded memory."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._one_large = threading.Lock()
        self.name = f"{tokenizer.library} {version(tokenizer.library)}"
        self._tokenizer = tokenizer

    def encode(self, texts: pyarrow.LargeStringArray) -> Tokens:
        encoded = [self._encode(part) for part in _slices(texts)]
        if not encoded:
            return Tokens(np.empty(0, np.int32), np.empty(0, np.int64))
        return Tokens(
            np.concatenate([ids for ids, _ in encoded]), np.concatenate([lengths for _, lengths in encoded])
        )

    def _encode(self, texts: pyarrow.LargeStringArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Large texts one at a time: several at once would take gigabytes."""
        is_large = int(text_sizes(texts).sum()) > LARGE_BYTES
        with self._one_large if is_large else nullcontext():
            return self._tokenizer.encode_batch(texts.to_pylist())


def first_different(found: Tokens, right: Tokens) -> int | None:
    """Index of the first text whose ids differ; None: all are equal."""
    ends = np.cumsum(right.lengths)
    candidates = []
    different = np.flatnonzero(found.lengths != right.lengths)
    if different.size:
        candidates.append(int(different[0]))
    stop = int(ends[candidates[0]] - right.lengths[candidates[0]]) if candidates else right.ids.size
    different = np.flatnonzero(found.ids[:stop] != right.ids[:stop])
    if different.size:
        candidates.append(int(np.searchsorted(ends, different[0], side="right")))
    return min(candidates, default=None)


def _slices(texts: pyarrow.LargeStringArray) -> Iterator[pyarrow.LargeStringArray]:
    """Consecutive texts, up to `SLICE_BYTES` or `SLICE_TEXTS` at once, at least one."""
    ends = np.cumsum(text_sizes(texts))
    start = done = 0
    while start < len(texts):
        by_size = int(np.searchsorted(ends, done + SLICE_BYTES, side="right"))
        stop = max(start + 1, min(by_size, start + SLICE_TEXTS))
        yield texts.slice(start, stop - start)
        start, done = stop, int(ends[stop - 1])
