"""Rows of Parquet files to documents.

Lives here: row groups, the types of columns that hold text, and batches of bounded size. Does not live here: which
row groups make a unit (source).

A column of text is of any string or binary type, dictionary-encoded or not, or lies in a struct (`a.b`); bytes must
be UTF-8. Chat data is a list of structs. Memory is that of one page and one block; a writer that puts gigabytes
into a single value makes a page as large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megads.data.documents import Found, Gatherer, Place, Span, Texts, is_utf8, joined, settle
from megads.data.field import RecordError
from megads.data.record import HEAD_BYTES, RecordOptions
from megads.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

MAX_ROWS = 256
"""Rows that are decoded at once: more are not faster, and one entry of a dictionary may fill them all."""
BUFFER_BYTES = 1 << 20


# names of the type predicates of pyarrow.types
TEXT_TYPES = (
    "is_string", "is_large_string", "is_string_view",
    "is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary",
)  # fmt: skip


class DamagedRowGroupError(Exception):
    """The rest of the row groups of a unit cannot be read."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Its shape."""

    num_rows: int
    num_bytes: int
    """Uncompressed, of all columns."""


@dataclass(frozen=True, slots=True)
class FoundRows:
    """What a span of rows held."""

    found: Found
    share: float
    """Of the rows that were asked for, how many are done: 0 to 1."""


def row_groups(path: Path) -> tuple[RowGroup, ...]:
    """The row groups of a file, from its footer.

    Raises:
        DataError: it is no complete Parquet file.
    """
    with _open(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        return tuple(RowGroup(group.num_rows, group.total_byte_size) for group in groups)


def check_columns(path: Path, options: RecordOptions) -> None:
    """Whether the columns that `options` wants can be read.

    Raises:
        DataError: one is absent or holds something else.
    """
    with _open(path) as file:
        _check_schema(path, file.schema_arrow, options=options)


def read_row_groups(path: Path, groups: range, *, file: int, options: RecordOptions) -> Iterator[FoundRows]:
    """The rows of consecutive row groups, in order, in spans of about `block_bytes`.

    Raises:
        DataError: a column is absent or of no usable type.
        DamagedRowGroupError: from here on the rows cannot be decoded.
    """
    num_rows = 0
    with _open(path) as parquet:
        _check_schema(path, parquet.schema_arrow, options=options)
        total = sum(parquet.metadata.row_group(i).num_rows for i in groups)
        batches = _batches(parquet, groups, options=options)
        for block in (_text_blocks if options.template is None else _conversation_blocks)(batches, options):
            span = Span(file, num_rows, block.num_rows)
            found = settle(block.texts, block.whys, span=span, options=options, locate=block.place)
            num_rows += block.num_rows
            yield FoundRows(found, num_rows / total)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that were decoded together."""

    num_rows: int
    texts: Texts
    whys: Mapping[int, str]
    heads: Mapping[int, bytes]
    """The first bytes of the bad rows in `whys`."""

    def place(self, row: int) -> Place:
        if row in self.whys:
            return Place(None, self.heads[row])
        document = int(np.searchsorted(self.texts.records, row))  # above the limit
        num_texts = self.texts.num_texts
        return Place(
            None, _head(self.texts.texts[document if num_texts is None else int(num_texts[:document].sum())])
        )


def _batches(
    file: pyarrow.parquet.ParquetFile, groups: range, *, options: RecordOptions
) -> Iterator[pyarrow.RecordBatch]:
    """Some rows at a time, fewer where they are large."""
    names = [".".join(path) for path in options.paths]
    num_rows, num_bytes = 0, 0
    for group in map(file.metadata.row_group, groups):
        num_rows += group.num_rows
        for column in map(group.column, range(group.num_columns)):
            if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in names):
                num_bytes += column.total_uncompressed_size
    batch_size = min(MAX_ROWS, max(1, options.block_bytes * num_rows // max(1, num_bytes)))
    with _damage():
        yield from file.iter_batches(batch_size, row_groups=groups, columns=names, use_threads=False)


@contextmanager
def _damage() -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk, not the decoder
            raise
        raise DamagedRowGroupError(str(error)) from error


def _text_blocks(batches: Iterable[pyarrow.RecordBatch], options: RecordOptions) -> Iterator[_Block]:
    """Batches put together to about `block_bytes`; those before a damage first."""
    pending: list[list[pyarrow.LargeBinaryArray]] = []
    num_bytes = 0
    try:
        for batch in batches:
            pending.append([_bytes_at(batch, path) for path in options.paths])
            num_bytes += sum(column.nbytes for column in pending[-1])
            if num_bytes >= options.block_bytes:
                yield _text_block(pending, options)
                pending, num_bytes = [], 0
    except DamagedRowGroupError:
        if pending:
            yield _text_block(pending, options)
        raise
    if pending:
        yield _text_block(pending, options)


def _text_block(parts: Sequence[Sequence[pyarrow.LargeBinaryArray]], options: RecordOptions) -> _Block:
    import pyarrow

    columns = [pyarrow.concat_arrays(column) for column in zip(*parts, strict=True)]
    whys: dict[int, str] = {}
    heads: dict[int, bytes] = {}
    for path, column in zip(options.paths, columns, strict=True):
        for row in _unusable(column):
            if row not in whys:
                what = f"column {'.'.join(path)!r}"
                is_null = not column[row].is_valid
                whys[row] = f"{what} is null, not text" if is_null else f"{what} is not UTF-8"
                heads[row] = _head(column[row])
    num_rows = len(columns[0])
    kept = np.setdiff1d(np.arange(num_rows), list(whys))
    if whys:
        columns = [column.take(kept) for column in columns]
    texts = joined([_as_text(column) for column in columns], options.separator)
    return _Block(num_rows, Texts(texts, kept), whys, heads)


def _conversation_blocks(batches: Iterable[pyarrow.RecordBatch], options: RecordOptions) -> Iterator[_Block]:
    for batch in batches:
        yield _conversation_block(batch, options)


def _conversation_block(batch: pyarrow.RecordBatch, options: RecordOptions) -> _Block:
    gatherer = Gatherer(options)
    whys: dict[int, str] = {}
    heads: dict[int, bytes] = {}
    for row in range(batch.num_rows):
        try:
            (value,) = batch.slice(row, 1).to_pylist()
            gatherer.add(row, value)
        except UnicodeDecodeError:
            whys[row], heads[row] = f"column {options.messages_key!r} is not UTF-8", b""
        except RecordError as error:
            whys[row], heads[row] = str(error), repr(value).encode("utf-8", "replace")[:HEAD_BYTES]
    return _Block(batch.num_rows, gatherer.finish(), whys, heads)


def _bytes_at(batch: pyarrow.RecordBatch, path: Sequence[str]) -> pyarrow.LargeBinaryArray:
    """[num_rows] the bytes at `path`; null where anything on the way is."""
    import pyarrow

    array = batch.column(path[0])
    for name in path[1:]:
        array = array.flatten()[array.type.get_field_index(name)]
    return array.cast(pyarrow.large_binary())


def _unusable(column: pyarrow.LargeBinaryArray) -> list[int]:
    """The rows that are null or not UTF-8."""
    import pyarrow

    try:
        _as_text(column).validate(full=True)
    except pyarrow.ArrowInvalid:
        return [row for row, value in enumerate(column) if not value.is_valid or not is_utf8(value.as_py())]
    if not column.null_count:
        return []
    return [int(row) for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))]


def _as_text(column: pyarrow.LargeBinaryArray) -> pyarrow.LargeStringArray:
    """The same memory, said to be text."""
    import pyarrow

    validity, offsets, content = column.buffers()
    return pyarrow.LargeStringArray.from_buffers(
        len(column), offsets, content, validity, column.null_count, column.offset
    )


def _head(value: pyarrow.Scalar) -> bytes:
    return b"null" if not value.is_valid else bytes(memoryview(value.as_buffer())[:HEAD_BYTES])


@contextmanager
def _open(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        )
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(
            f"{path}: not a complete Parquet file",
            found=f"{path.stat().st_size} bytes ({error})",
            do="copy it again, or leave it out",
        ) from error
    with file:
        yield file


def _check_schema(path: Path, schema: pyarrow.Schema, *, options: RecordOptions) -> None:
    for names in options.paths:
        kind = _type_at(path, schema, names=names)
        if options.template is None and not _is_text(kind):
            raise DataError(
                f"{path}: column {'.'.join(names)!r} holds no text",
                found=kind,
                allowed="a string or binary type, dictionary-encoded or not",
                do="--key a.b for a text inside a struct, --chat-template for conversations",
            )


def _type_at(path: Path, schema: pyarrow.Schema, *, names: Sequence[str]) -> pyarrow.DataType:
    import pyarrow

    fields = list(schema)
    kind = pyarrow.null()
    for depth, name in enumerate(names):
        kind = next((field.type for field in fields if field.name == name), None)
        if kind is None:
            where = f" in {'.'.join(names[:depth])!r}" if depth else ""
            raise DataError(
                f"{path}: no column {name!r}{where}",
                found=", ".join(field.name for field in fields) or "none",
                allowed="a name of these for --key, --columns or --messages-key",
                do="a dot in a name is written \\."
                if len(names) > 1 and ".".join(names) in schema.names
                else None,
            )
        is_struct = pyarrow.types.is_struct(kind)
        fields = [kind.field(i) for i in range(kind.num_fields)] if is_struct else []
    return kind


def _is_text(kind: pyarrow.DataType) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return any(getattr(pyarrow.types, name)(kind) for name in TEXT_TYPES)
