"""The engine gigatoken (extra `fast`): the same ids, 10 to 20 times faster, its memory bounded here.

Lives here: handing a tokenizer file to gigatoken with the wanted treatment of special text, and Arrow batches to and
from it. `gigatoken` is imported here and nowhere else. Does not live here: whether its ids can be trusted
(engine_choice, encode).

gigatoken always reads the special tokens it knows out of text. So where they stay text it is not told of them.

One of its tokenizers works for one thread at a time (it holds a lock), and keeps every word it has seen for ever. So
there is one for each thread that calls, and one that made the process too large is replaced by a new one.
"""

from __future__ import annotations

import json
import os
import queue
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megads.data.engine import Tokens

if TYPE_CHECKING:
    import gigatoken
    import pyarrow

PROCESS_BYTES = 560 << 20
"""Resident memory of the process above which a tokenizer that has seen `MIN_AGE` bytes is replaced."""
BYTES_PER_TOKENIZER = 64 << 20
"""What each tokenizer beyond the second adds to `PROCESS_BYTES`."""
MIN_AGE = 16 << 20
"""A new tokenizer costs 0.1 s, which is the work on as many bytes."""
MAX_AGE = 256 << 20
"""Replaced after as many bytes where the process cannot tell its memory."""


class UnsuitableTokenizerError(Exception):
    """gigatoken cannot read this tokenizer."""


@dataclass(slots=True)
class _Worker:
    """One tokenizer of gigatoken, used by one thread at a time."""

    tokenizer: gigatoken.Tokenizer
    seen_bytes: int = 0


class GigatokenEngine:
    """A `tokenizer.json` or SentencePiece `.model` through gigatoken.

    Args:
        file: the tokenizer.
        parse_special_tokens: read special tokens out of text, or keep them as text.

    Raises:
        UnsuitableTokenizerError: a kind that gigatoken does not know, such as Unigram.
    """

    def __init__(self, file: Path, *, parse_special_tokens: bool) -> None:
        self.name = f"gigatoken {version('gigatoken')}"
        self._json = _tokenizer_json(file, parse_special_tokens=parse_special_tokens)
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._num_workers = 1
        self._idle.put(_Worker(self._new_tokenizer()))

    def encode(self, texts: pyarrow.LargeStringArray) -> Tokens:
        import awkward

        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = _Worker(self._new_tokenizer())
            self._num_workers += 1
        array: Any = worker.tokenizer.encode_batch(awkward.from_arrow(texts), parallel=False)
        offsets = np.asarray(array.layout.offsets.data)
        ids = np.asarray(array.layout.content.data)[offsets[0] : offsets[-1]]
        worker.seen_bytes += texts.nbytes
        if self._is_too_large(worker):
            worker = _Worker(self._new_tokenizer())
        self._idle.put(worker)
        return Tokens(ids, np.diff(offsets))

    def _new_tokenizer(self) -> gigatoken.Tokenizer:
        import gigatoken

        try:
            return gigatoken.Tokenizer.from_json(self._json)
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise UnsuitableTokenizerError(f"it cannot read the tokenizer: {error}") from error

    def _is_too_large(self, worker: _Worker) -> bool:
        if worker.seen_bytes < MIN_AGE:
            return False
        resident = _resident_bytes()
        if resident is None:
            return worker.seen_bytes > MAX_AGE
        return resident > PROCESS_BYTES + BYTES_PER_TOKENIZER * max(0, self._num_workers - 2)


def _tokenizer_json(file: Path, *, parse_special_tokens: bool) -> str:
    """The tokenizer for gigatoken, without its special tokens where they are not read out of text."""
    content = file.read_bytes()
    if file.suffix == ".model":
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        try:
            text = sentencepiece_to_tokenizer_json(content)
        except ValueError as error:
            raise UnsuitableTokenizerError(str(error)) from error
    else:
        text = content.decode("utf-8")
    if parse_special_tokens:
        return text
    return _without_special_tokens(text)


def _without_special_tokens(text: str) -> str:
    """A tokenizer.json with only the added tokens that are not special."""
    lists = list(re.finditer(r'"added_tokens"\s*:\s*(?=\[)', text))
    if len(lists) == 1:  # the rest, which is large, need not be parsed; a vocabulary holds numbers, no lists
        start = lists[0].end()
        added, stop = json.JSONDecoder().raw_decode(text, start)
        return text[:start] + json.dumps(_ordinary(added)) + text[stop:]
    tree = json.loads(text)
    tree["added_tokens"] = _ordinary(tree.get("added_tokens") or ())
    return json.dumps(tree)


def _ordinary(added: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [token for token in added if not token.get("special")]


def _resident_bytes() -> int | None:
    """Memory of this process; None where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
