"""From texts and their records to `Documents`: gathering them one by one, length limits and filters.

texts      [num_texts]      t0 t1 t2 | t3 t4 | t5 t6 t7        num_texts per document: 3 2 3
sizes      [num_documents]      s0       s1       s2           bytes of all texts of a document
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megads.data.chat import Segment, conversation
from megads.data.field import RecordError, json_type, text_of, value_at
from megads.data.record import HEAD_BYTES, BadRecord, RecordOptions

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True)
class Texts:
    """Documents of a block, as in `Documents`."""

    texts: pyarrow.LargeStringArray
    records: NDArray[np.int64]
    num_texts: NDArray[np.int64] | None = None
    is_counted: NDArray[np.bool_] | None = None
    is_template: NDArray[np.bool_] | None = None

    @property
    def sizes(self) -> NDArray[np.int64]:
        """[num_documents] bytes of each document."""
        sizes = text_sizes(self.texts)
        if self.num_texts is None or not len(sizes):
            return sizes
        return np.add.reduceat(sizes, np.cumsum(self.num_texts) - self.num_texts)

    def select(self, mask: NDArray[np.bool_]) -> Texts:
        """The documents where `mask` [num_documents] is true."""
        if mask.all():
            return self
        of_texts = mask if self.num_texts is None else np.repeat(mask, self.num_texts)
        return Texts(
            self.texts.take(np.flatnonzero(of_texts)),
            self.records[mask],
            None if self.num_texts is None else self.num_texts[mask],
            None if self.is_counted is None else self.is_counted[of_texts],
            None if self.is_template is None else self.is_template[of_texts],
        )


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive records of a unit."""

    file: int
    first_record: int
    num_records: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands and how it looks."""

    offset: int | None
    """As in `BadRecord`."""
    content: bytes
    """Its first bytes at least."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a span of records held."""

    texts: Texts
    bad: tuple[BadRecord, ...]
    num_filtered: int
    num_records: int


class Gatherer:
    """Documents that come one by one as decoded records.

    {"meta": {"body": "..."}}      --key meta.body          a dot steps into an object
    {"title": "a", "body": "b"}    --columns title,body     "a\\n\\nb"
    {"messages": [...]}            --chat-template chatml   segments
    """

    def __init__(self, options: RecordOptions) -> None:
        self._options = options
        self._paths = options.paths
        self._separator = options.separator.encode("utf-8")
        self._texts: list[bytes] = []
        self._records: list[int] = []
        self._segments: list[Sequence[Segment]] = []

    def add(self, record: int, value: object) -> None:
        """Add the document inside `value`.

        Raises:
            RecordError: there is none.
        """
        if not isinstance(value, Mapping):
            raise RecordError(f"{json_type(value)}, not an object")
        found = [value_at(value, path) for path in self._paths]
        if self._options.template is not None:
            self._segments.append(conversation(found[0], self._options))
            self._records.append(record)
        else:
            self.add_text(record, self._separator.join(map(self._text, found, self._paths)))

    def add_text(self, record: int, text: bytes) -> None:
        """Add a plain document in valid UTF-8."""
        self._texts.append(text)
        self._records.append(record)

    def _text(self, value: object, path: Sequence[str]) -> bytes:
        return text_of(value, f"the value of {'.'.join(path)!r}")

    def finish(self) -> Texts:
        """All of them in the order of coming."""
        records = np.array(self._records, dtype=np.int64)
        if self._options.template is None:
            return Texts(string_array(self._texts), records)
        flat = [segment for segments in self._segments for segment in segments]
        return Texts(
            string_array([segment.text for segment in flat]),
            records,
            num_texts=np.array([len(segments) for segments in self._segments], dtype=np.int64),
            is_counted=np.array([segment.is_counted for segment in flat], dtype=np.bool_),
            is_template=np.array([segment.is_template for segment in flat], dtype=np.bool_),
        )


def settle(
    texts: Texts,
    whys: Mapping[int, str],
    *,
    span: Span,
    options: RecordOptions,
    locate: Callable[[int], Place],
) -> Found:
    """Apply limit and filters, and make bad records of what is bad.

    Records of `texts`, the keys of `whys` and the argument of `locate` count from the first of the span.
    """
    sizes = texts.sizes
    fits = sizes <= options.max_document_bytes
    passes = sizes >= options.min_bytes
    if options.max_bytes is not None:
        passes &= sizes <= options.max_bytes
    all_whys = dict(whys)
    for i in np.flatnonzero(~fits):
        what = too_large("a document", int(sizes[i]), limit=options.max_document_bytes)
        all_whys[int(texts.records[i])] = what
    bad = []
    for record in sorted(all_whys):
        place = locate(record)
        head = place.content[:HEAD_BYTES]
        number = span.first_record + record
        bad.append(BadRecord(span.file, number, place.offset, all_whys[record], head))
    kept = texts.select(fits & passes)
    return Found(
        replace(kept, records=kept.records + span.first_record),
        tuple(bad),
        num_filtered=int((fits & ~passes).sum()),
        num_records=span.num_records,
    )


def too_large(what: str, size: int, *, limit: int) -> str:
    """Why a document or line above the limit is bad."""
    return f"{what} of {size} bytes, above the limit of {limit} (cut it, or raise --max-document-bytes)"


def string_array(texts: Sequence[bytes]) -> pyarrow.LargeStringArray:
    """[num_texts] from valid UTF-8."""
    import pyarrow

    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    return pyarrow.LargeStringArray.from_buffers(
        len(texts), pyarrow.py_buffer(offsets), pyarrow.py_buffer(b"".join(texts))
    )


def joined(columns: Sequence[pyarrow.LargeStringArray], separator: str) -> pyarrow.LargeStringArray:
    """[num_rows] the texts of all columns, `separator` between them."""
    if len(columns) == 1:
        return columns[0]
    import pyarrow
    import pyarrow.compute

    return pyarrow.compute.binary_join_element_wise(
        *columns, pyarrow.scalar(separator, pyarrow.large_string())
    )


def text_sizes(texts: pyarrow.LargeStringArray) -> NDArray[np.int64]:
    """[num_texts] bytes of each text."""
    offsets = np.frombuffer(texts.buffers()[1] or b"", dtype=np.int64)
    return np.diff(offsets[texts.offset : texts.offset + len(texts) + 1])


def is_utf8(content: bytes) -> bool:
    """Whether all of it is valid UTF-8; lets other threads run meanwhile."""
    import pyarrow

    offsets = np.array([0, len(content)], dtype=np.int64)
    whole = pyarrow.LargeStringArray.from_buffers(1, pyarrow.py_buffer(offsets), pyarrow.py_buffer(content))
    try:
        whole.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True
