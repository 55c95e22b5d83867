"""Documents to frames: encode, compare samples with the reference, lay the end-of-document token in, hash.

Lives here: what is done with one batch; called from several threads. Does not live here: engines (engine), where
batches come from and go to (part).

    texts     | prefix | question | middle | answer | suffix |      a chat document: texts by the template are parsed
    ids       | p p p  | q q q q  |  m m   |  a a a |  s s   | eod
    mask      | 0 0 0  | 0 0 0 0  |  0 0   |  1 1 1 |  1 1   |  1     eod counts where the text before it does
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.corpus import SOURCE_DTYPE
from megads.data.documents import text_sizes
from megads.data.engine import Tokens, first_different
from megads.data.engine_choice import Choice
from megads.data.frame import KEY_SIZE, Frame
from megads.data.record import HEAD_BYTES, BadRecord, Documents, Unit
from megads.data.tokenizer import Tokenizer, encode_parsed

if TYPE_CHECKING:
    import pyarrow

CHECKED_EVERY = 10_000
"""Records of which one is compared with the reference engine."""
CHECKED_BYTES = 1 << 20
"""Of larger texts a quarter as many characters are compared: the reference needs 120 bytes of memory for each."""


class WrongIdsError(Exception):
    """The engine gave other ids than the reference."""

    def __init__(self, record: int) -> None:
        super().__init__(record)
        self.record = record
        """The document's record within its unit."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """A batch of documents, and what is not in the frame."""

    frame: Frame
    bad: tuple[BadRecord, ...]
    num_empty: int
    """Documents without a token."""
    num_filtered: int
    read_bytes: int
    num_records: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """Encodes batches of one job.

    Args:
        tokenizer: for the ids of templates.
        choice: the engine and the reference that it is compared with.
        eod: id put after each document, or None.
        dtype: of the ids in the corpus.
        has_keys: whether documents need the hash of their text.
        forbidden: texts that no document may hold.
    """

    tokenizer: Tokenizer
    choice: Choice
    eod: int | None
    dtype: np.dtype[np.generic]
    has_keys: bool
    forbidden: tuple[str, ...] = ()

    def __call__(self, unit: Unit, documents: Documents) -> EncodedBatch:
        """Encode some documents of a unit.

        Raises:
            WrongIdsError: the engine and the reference differ on a sampled document.
        """
        documents = self._without_forbidden(unit, documents)
        tokens = self._encode(documents)
        num_texts, lengths = documents.num_texts, tokens.lengths
        sizes = text_sizes(documents.texts)
        mask = None
        if documents.is_counted is not None:
            mask = np.repeat(documents.is_counted, lengths).astype(np.uint8)
        if num_texts is not None:
            lengths, sizes = _sums(lengths, num_texts), _sums(sizes, num_texts)
        full = lengths > 0
        sources = np.empty(lengths.size, dtype=SOURCE_DTYPE)
        sources["file"], sources["record"] = unit.file, documents.records
        keys = self._keys(documents, sizes) if self.has_keys else None
        frame = Frame(
            ids=self._with_eod(tokens.ids, lengths[full]),
            lengths=(lengths[full] + (self.eod is not None)).astype(np.uint32),
            sizes=sizes[full].astype(np.uint32),
            sources=sources[full],
            keys=None if keys is None else keys[full],
            mask=None if mask is None else self._mask_with_eod(mask, lengths[full]),
        )
        return EncodedBatch(
            frame,
            bad=documents.bad,
            num_empty=int((~full).sum()),
            num_filtered=documents.num_filtered,
            read_bytes=documents.read_bytes,
            num_records=documents.num_records,
        )

    def _encode(self, documents: Documents) -> Tokens:
        """Ids of all texts, those of the template parsed."""
        texts, is_template = documents.texts, documents.is_template
        if is_template is None or not is_template.any():
            tokens = self.choice.engine.encode(texts)
            self._compare(documents, tokens, np.arange(len(texts)))
            return tokens
        plain = np.flatnonzero(~is_template)
        tokens = self.choice.engine.encode(texts.take(plain))
        self._compare(documents, tokens, plain)
        values, which = _distinct(texts.take(np.flatnonzero(is_template)))
        parsed = [encode_parsed(self.tokenizer, value) for value in values]
        lengths = np.empty(len(texts), dtype=np.int64)
        lengths[plain] = tokens.lengths
        lengths[is_template] = np.array([ids.size for ids in parsed])[which]
        ids = np.empty(int(lengths.sum()), dtype=np.int64)
        of_template = np.repeat(is_template, lengths)
        ids[~of_template] = tokens.ids
        ids[of_template] = np.concatenate([parsed[i] for i in which])
        return Tokens(ids, lengths)

    def _compare(self, documents: Documents, tokens: Tokens, plain: NDArray[np.intp]) -> None:
        """Compare sampled documents with the reference; `plain` are the texts that `tokens` are of."""
        if self.choice.is_reference:
            return
        records = documents.records
        if documents.num_texts is not None:
            records = np.repeat(records, documents.num_texts)
        records = records[plain]
        is_small = text_sizes(documents.texts)[plain] <= CHECKED_BYTES
        is_chosen = records % CHECKED_EVERY == 0
        if (chosen := np.flatnonzero(is_chosen & is_small)).size:
            texts = _few(documents.texts, plain[chosen])
            self._check(tokens.of(chosen), texts, records=records[chosen])
        if (chosen := np.flatnonzero(is_chosen & ~is_small)).size:  # by their beginnings, encoded once more
            texts = _few(documents.texts, plain[chosen], num_characters=CHECKED_BYTES // 4)
            self._check(self.choice.engine.encode(texts), texts, records=records[chosen])

    def _check(self, found: Tokens, texts: pyarrow.LargeStringArray, *, records: NDArray[np.int64]) -> None:
        at = first_different(found, self.choice.reference.encode(texts))
        if at is not None:
            raise WrongIdsError(int(records[at]))

    def _with_eod(self, ids: NDArray[np.integer], lengths: NDArray[np.int64]) -> NDArray[np.integer]:
        if self.eod is None:
            return ids.astype(self.dtype, copy=False)
        result = np.empty(ids.size + lengths.size, dtype=self.dtype)
        ends = np.cumsum(lengths + 1) - 1
        is_id = np.ones(result.size, dtype=np.bool_)
        is_id[ends] = False
        result[is_id] = ids
        result[ends] = self.eod
        return result

    def _mask_with_eod(self, mask: NDArray[np.uint8], lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
        if self.eod is None:
            return mask
        ends = np.cumsum(lengths)
        return np.insert(mask, ends, mask[ends - 1])

    def _keys(self, documents: Documents, sizes: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The first 16 bytes of BLAKE3 of each document's text, [num_documents, 2]."""
        content = _content(documents.texts)
        ends = np.cumsum(sizes)
        spans = zip((ends - sizes).tolist(), ends.tolist(), strict=True)
        digests = b"".join(blake3(content[start:end]).digest(KEY_SIZE) for start, end in spans)
        return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)

    def _without_forbidden(self, unit: Unit, documents: Documents) -> Documents:
        """Documents that hold special text are made bad records."""
        if not self.forbidden or not len(documents.texts):
            return documents
        import pyarrow.compute

        pattern = "|".join(map(re.escape, self.forbidden))
        holds = pyarrow.compute.match_substring_regex(documents.texts, pattern).to_numpy(zero_copy_only=False)
        if documents.is_template is not None:
            holds &= ~documents.is_template
        if not holds.any():
            return documents
        num_texts = documents.num_texts
        owner = np.arange(len(holds))
        if num_texts is not None:
            owner = np.repeat(np.arange(num_texts.size), num_texts)
        bad = {}
        for i in np.flatnonzero(holds)[::-1]:
            record = int(documents.records[owner[i]])
            file = unit.file + (record if unit.num_files > 1 else 0)
            bad[int(owner[i])] = self._bad(file, record, text=documents.texts[int(i)].as_py())
        kept = np.ones(documents.records.size, dtype=np.bool_)
        kept[list(bad)] = False
        of_texts = kept[owner]
        return replace(
            documents,
            texts=documents.texts.take(np.flatnonzero(of_texts)),
            num_texts=None if num_texts is None else num_texts[kept],
            is_counted=None if documents.is_counted is None else documents.is_counted[of_texts],
            is_template=None if documents.is_template is None else documents.is_template[of_texts],
            records=documents.records[kept],
            bad=tuple(sorted((*documents.bad, *bad.values()), key=lambda record: record.record)),
        )

    def _bad(self, file: int, record: int, *, text: str) -> BadRecord:
        at, special = min((text.find(token), token) for token in self.forbidden if token in text)
        head = text[at : at + HEAD_BYTES].encode("utf-8")[:HEAD_BYTES]
        return BadRecord(file, record, None, f"the text holds the special token {special!r}", head)


def _sums(values: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of consecutive `counts` values; every count is at least 1."""
    if not counts.size:
        return np.empty(0, dtype=np.int64)
    return np.add.reduceat(values, np.cumsum(counts) - counts)


def _few(
    texts: pyarrow.LargeStringArray, chosen: NDArray[np.intp], *, num_characters: int | None = None
) -> pyarrow.LargeStringArray:
    """A few of the texts, up to a length; `take` would load Arrow's whole library of functions."""
    import pyarrow

    return pyarrow.array(
        [texts[int(i)].as_py()[:num_characters] for i in chosen], type=pyarrow.large_string()
    )


def _distinct(texts: pyarrow.LargeStringArray) -> tuple[list[str], NDArray[np.int64]]:
    """The different texts, and which of them each text is."""
    encoded: Any = texts.dictionary_encode()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy(zero_copy_only=False)


def _content(texts: pyarrow.LargeStringArray) -> memoryview:
    """The bytes of all texts, one after another."""
    _, offsets, data = texts.buffers()
    if not len(texts) or data is None:
        return memoryview(b"")
    ends = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])]
