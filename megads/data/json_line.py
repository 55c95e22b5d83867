"""Blocks of JSON lines to documents: fast where Arrow reads the block, exact everywhere.

What a line means is what Python's `json` says, and one thing more: values that are not read may be nested to any
depth, and be numbers of any size, `Inf` or `-NaN`. Arrow is several times faster, but takes a whole block at a time
and does not say where a record stands, so its answer is taken only for blocks where it must be the same:

    every line that is not blank starts with { and ends with }   \\  so each of them holds an object or more, none
    as many rows as such lines                                   /   goes over a line end, and each holds just one
    the block is UTF-8                                               Arrow does not check
    Arrow has no complaint                                           broken, two values of a key, wrong type, ...

All other blocks go line by line through `json`, and what that refuses once more through Arrow, alone; so do single
lines where Arrow finds no text. (Arrow 26 crashes on a block that begins with `null`: the first rule is more than
that of speed.)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megads.data.documents import Found, Gatherer, Place, Span, Texts, is_utf8, joined, settle, too_large
from megads.data.field import RecordError
from megads.data.line import LineBlock
from megads.data.record import RecordOptions

if TYPE_CHECKING:
    import pyarrow

JSON_SPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class _Lines:
    """Where the lines of a block stand."""

    content: bytes
    starts: NDArray[np.int64]  # [num_lines]
    ends: NDArray[np.int64]  # [num_lines] without line feeds

    def __getitem__(self, number: int) -> bytes:
        return self.content[self.starts[number] : self.ends[number]]


@dataclass(frozen=True, slots=True)
class _Parsed:
    """What Arrow found in a block."""

    columns: tuple[pyarrow.LargeStringArray, ...]  # each [num_rows]
    numbers: NDArray[np.int64]  # [num_rows] the line of each row
    is_null: NDArray[np.bool_]  # [num_rows] a text is absent


class JsonLineReader:
    """Reads the blocks of one file, called with one after another."""

    def __init__(self, file: int, options: RecordOptions) -> None:
        self._file = file
        self._options = options
        self._schema = None if options.template else _schema(options.paths)
        # unread numbers may be of any size; json.loads would refuse ints of more than 4,300 digits
        self._decoder = json.JSONDecoder(parse_int=_zero)

    def read(self, block: LineBlock, first_record: int) -> Found:
        """The documents of a block whose first line is record `first_record` of the unit."""
        whys: dict[int, str] = {}
        if block.long_size:
            whys[0] = too_large("a line", block.long_size, limit=self._options.max_document_bytes)
            lines = _Lines(block.content, np.array([0]), np.array([len(block.content)]))
            texts = Gatherer(self._options).finish()
        else:
            lines = _split(block.content)
            texts = self._read_fast(lines, whys) or self._read_exact(lines, range(len(lines.starts)), whys)
        return settle(
            texts,
            whys,
            span=Span(self._file, first_record, len(lines.starts)),
            options=self._options,
            locate=lambda number: Place(block.offset + int(lines.starts[number]), lines[number]),
        )

    def _read_exact(self, lines: _Lines, numbers: Iterable[int], whys: dict[int, str]) -> Texts:
        """The documents of the lines `numbers`, by `json`; puts into `whys` what is bad about the others."""
        gatherer = Gatherer(self._options)
        for number in numbers:
            line = lines[number]
            if not line.strip(JSON_SPACE):
                continue
            try:
                if len(line) > self._options.max_document_bytes:
                    raise RecordError(too_large("a line", len(line), limit=self._options.max_document_bytes))
                self._add(gatherer, number, line=line)
            except RecordError as error:
                whys[number] = str(error)
        return gatherer.finish()

    def _add(self, gatherer: Gatherer, number: int, *, line: bytes) -> None:
        try:
            value = self._decoder.decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise RecordError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
        except (json.JSONDecodeError, RecursionError) as error:
            parsed = self._parse(_split(line))
            if parsed is not None and len(parsed.numbers) and not parsed.is_null.any():
                (text,) = joined(parsed.columns, self._options.separator)
                gatherer.add_text(number, text.as_buffer().to_pybytes())
            elif isinstance(error, RecursionError):
                raise RecordError("not JSON, or nested too deeply") from error
            else:
                why = error.msg.removesuffix(" at")
                raise RecordError(f"not JSON ({why} at column {error.colno})") from error
        else:
            gatherer.add(number, value)

    def _read_fast(self, lines: _Lines, whys: dict[int, str]) -> Texts | None:
        """The documents of a block by Arrow, or None where it might differ from `json`."""
        parsed = self._parse(lines)
        if parsed is None:
            return None
        columns, numbers = parsed.columns, parsed.numbers
        if parsed.is_null.any():
            exact = self._read_exact(lines, map(int, numbers[parsed.is_null]), whys)
            if len(exact.records):
                whys.clear()
                return None
            kept = np.flatnonzero(~parsed.is_null)
            columns, numbers = tuple(column.take(kept) for column in columns), numbers[kept]
        return Texts(joined(columns, self._options.separator), numbers)

    def _parse(self, lines: _Lines) -> _Parsed | None:
        import pyarrow
        import pyarrow.json

        if self._schema is None or (lines.ends - lines.starts).max() > self._options.max_document_bytes:
            return None
        numbers = _object_lines(lines)
        content = lines.content
        if numbers is None or not is_utf8(content):
            return None
        try:
            table = pyarrow.json.read_json(
                pyarrow.BufferReader(content if content.endswith(b"\n") else content + b"\n"),
                read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(content) + 1),
                parse_options=pyarrow.json.ParseOptions(
                    explicit_schema=self._schema, unexpected_field_behavior="ignore"
                ),
            )
        except pyarrow.ArrowException:
            return None
        if table.num_rows != len(numbers):
            return None
        columns = tuple(_column(table, path) for path in self._options.paths)
        is_null = np.zeros(len(numbers), dtype=np.bool_)
        for column in columns:
            if column.null_count:
                is_null |= column.is_null().to_numpy(zero_copy_only=False)
        return _Parsed(columns, numbers, is_null)


def _split(content: bytes) -> _Lines:
    ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
    if not content.endswith(b"\n"):
        ends = np.append(ends, len(content))
    return _Lines(content, np.concatenate(([0], ends[:-1] + 1)), ends)


def _object_lines(lines: _Lines) -> NDArray[np.int64] | None:
    """The numbers of the lines that are not blank, or None where one of them is not `{...}`."""
    characters = np.frombuffer(lines.content, dtype=np.uint8)
    ends = lines.ends - (characters[lines.ends - 1] == ord("\r"))
    is_object = (characters[lines.starts] == ord("{")) & (characters[ends - 1] == ord("}"))
    for number in map(int, np.flatnonzero(~is_object)):
        line = lines[number].strip(JSON_SPACE)
        if line.startswith(b"{") and line.endswith(b"}"):
            is_object[number] = True
        elif line:
            return None
    return np.flatnonzero(is_object)


def _schema(paths: Sequence[Sequence[str]]) -> pyarrow.Schema:
    """Text at the end of each path."""
    import pyarrow

    def fields(inside: Sequence[Sequence[str]]) -> list[pyarrow.Field]:
        return [
            pyarrow.field(
                name,
                pyarrow.large_string()
                if any(path == (name,) for path in inside)
                else pyarrow.struct(fields([path[1:] for path in inside if path[0] == name])),
            )
            for name in dict.fromkeys(path[0] for path in inside)
        ]

    return pyarrow.schema(fields(paths))


def _column(table: pyarrow.Table, path: Sequence[str]) -> pyarrow.LargeStringArray:
    """[num_rows] the texts at `path`; null where anything on the way is."""
    chunks = table.column(path[0])
    array = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()
    for name in path[1:]:
        array = array.flatten()[array.type.get_field_index(name)]
    return array


def _zero(_: str) -> int:
    return 0
