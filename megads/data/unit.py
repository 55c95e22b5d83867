"""Inputs cut into units, and units read: the one place that knows every reader.

    data.jsonl      |----unit----|----unit----|--unit--|     ranges of bytes; a line belongs to where it starts
    data.parquet    |group group|group group|group|          whole row groups
    data.jsonl.gz   |---------------unit---------------|     cannot be entered in the middle
    a.py b.py c.py  |--------unit--------|--unit--|          small text files together

The units are a function of the inputs and `unit_bytes`; they may be read in any order, by anyone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from megads.data.archive import Archive, DamagedArchiveError
from megads.data.documents import Found, Gatherer, Place, Span, settle
from megads.data.json_line import JsonLineReader
from megads.data.line import line_blocks
from megads.data.parquet import DamagedRowGroupError, check_columns, read_row_groups, row_groups
from megads.data.record import STDIN, BadRecord, Documents, Inputs, RecordOptions, Unit
from megads.data.text import TextError, read_text
from megads.errors import DataError

MAX_TEXT_FILES = 1024
"""Text files in one unit at most."""
MIN_UNIT_BYTES = 4
"""A byte order mark and the start of the line after it are in one unit."""
COUNT_BYTES = 1 << 22


def check_inputs(inputs: Inputs, options: RecordOptions) -> None:
    """Find out at once what is known without reading records: the columns of all Parquet files.

    Raises:
        DataError: a column is absent or holds no text, or a file is truncated.
    """
    for path, kind in zip(inputs.files, inputs.kinds, strict=True):
        if kind.format == "parquet":
            with _told_as_unreadable(path):
                check_columns(path, options)


def plan_units(inputs: Inputs, *, unit_bytes: int) -> tuple[Unit, ...]:
    """Units of about `unit_bytes`, in reading order; their sizes add up to those of the inputs.

    Raises:
        DataError: a Parquet file is truncated or cannot be read, or `unit_bytes` is below 4.
    """
    if unit_bytes < MIN_UNIT_BYTES:
        raise DataError("--unit-bytes: out of range", found=unit_bytes, allowed=f"{MIN_UNIT_BYTES} or more")
    units: list[Unit] = []
    for number, (path, size, kind) in enumerate(zip(inputs.files, inputs.sizes, inputs.kinds, strict=True)):
        if kind.format == "parquet":
            with _told_as_unreadable(path):
                units.extend(_row_group_units(path, number, size=size, unit_bytes=unit_bytes))
        elif kind.compression or path == STDIN:
            units.append(Unit(number, 0, 1, size))
        elif kind.format == "text":
            last = units[-1] if units else None
            if last and _takes_text(last, inputs, number=number, unit_bytes=unit_bytes):
                units[-1] = replace(last, size=last.size + size, num_files=last.num_files + 1)
            else:
                units.append(Unit(number, 0, 1, size))
        else:
            starts = range(0, size, unit_bytes)
            units.extend(
                Unit(number, start, min(start + unit_bytes, size), min(unit_bytes, size - start))
                for start in starts
            )
    return tuple(units)


def read_unit(inputs: Inputs, unit: Unit, *, options: RecordOptions) -> Iterator[Documents]:
    """The documents and bad records of a unit, in order, in bounded memory; safe in several threads.

    Raises:
        DataError: a file cannot be read at all, or a Parquet file has no column of text of that name.
    """
    kind = inputs.kinds[unit.file]
    read = {"jsonl": _read_lines, "parquet": _read_rows, "text": _read_texts}[kind.format]
    num_records = 0
    with _told_as_unreadable(inputs.files[unit.file]):
        for step in read(inputs, unit, options=options):
            num_records += step.found.num_records
            texts = step.found.texts
            yield Documents(
                texts=texts.texts,
                num_texts=texts.num_texts,
                is_counted=texts.is_counted,
                is_template=texts.is_template,
                records=texts.records,
                bad=step.found.bad,
                num_filtered=step.found.num_filtered,
                read_bytes=step.read_bytes,
                num_records=num_records,
            )


def count_records_before(inputs: Inputs, unit: Unit) -> int:
    """Lines or rows of the unit's file that stand before it: what makes its record numbers those of the file.

    Reads the file up to the unit: for messages.
    """
    path, kind = inputs.files[unit.file], inputs.kinds[unit.file]
    if unit.start == 0:
        return 0
    with _told_as_unreadable(path):
        if kind.format == "parquet":
            return sum(group.num_rows for group in row_groups(path)[: unit.start])
        num_lines, remaining = 0, unit.start
        with open(path, "rb") as file:
            while remaining and (chunk := file.read(min(COUNT_BYTES, remaining))):
                num_lines += chunk.count(b"\n")
                remaining -= len(chunk)
            file.seek(unit.start - 1)
            return num_lines + (file.read(1) != b"\n")


def place_of(inputs: Inputs, bad: BadRecord, *, num_before: int) -> str:
    """`file:line (byte offset)` of a bad record, for messages; `num_before` from `count_records_before`."""
    kind = inputs.kinds[bad.file]
    path = "standard input" if inputs.files[bad.file] == STDIN else inputs.files[bad.file]
    if kind.format == "text":
        return str(path)
    place = f"{path}:{num_before + bad.record + 1}"
    if bad.offset is None:
        return place
    return f"{place} (byte {bad.offset}{' uncompressed' if kind.compression else ''})"


@dataclass(frozen=True, slots=True)
class _Step:
    """A part of a unit that was read, and how far that went."""

    found: Found
    read_bytes: int


def _read_lines(inputs: Inputs, unit: Unit, *, options: RecordOptions) -> Iterator[_Step]:
    is_range = not inputs.kinds[unit.file].compression and inputs.files[unit.file] != STDIN
    reader = JsonLineReader(unit.file, options)
    num_records = 0
    with _stream(inputs, unit.file) as stream:
        if is_range and unit.start and not isinstance(stream, Archive):
            stream.seek(unit.start - 1)
        blocks = line_blocks(
            stream,
            start=unit.start,
            stop=unit.stop if is_range else None,
            limit=options.max_document_bytes,
            block_bytes=options.block_bytes,
        )
        try:
            for block in blocks:
                found = reader.read(block, num_records)
                num_records += found.num_records
                done = block.offset + max(len(block.content), block.long_size) - unit.start
                if isinstance(stream, Archive):
                    done = stream.read_bytes
                yield _Step(found, min(done, unit.size) if is_range else done)
        except DamagedArchiveError as error:
            why = f"the archive is damaged here ({error}): all that follows is lost"
            yield _damage(unit, num_records, why=why, options=options, offset=stream.tell())


def _read_rows(inputs: Inputs, unit: Unit, *, options: RecordOptions) -> Iterator[_Step]:
    num_records = 0
    groups = range(unit.start, unit.stop)
    try:
        for rows in read_row_groups(inputs.files[unit.file], groups, file=unit.file, options=options):
            num_records += rows.found.num_records
            yield _Step(rows.found, int(unit.size * rows.share))
    except DamagedRowGroupError as error:
        why = f"the Parquet file is damaged here ({error}): the rest of these row groups is lost"
        yield _damage(unit, num_records, why=why, options=options, offset=None)


def _read_texts(inputs: Inputs, unit: Unit, *, options: RecordOptions) -> Iterator[_Step]:
    """The files of a unit, in spans of about `block_bytes`."""
    if options.template is not None:
        raise DataError(
            f"{inputs.files[unit.file]}: a text file holds no conversations",
            allowed="JSON lines or Parquet",
            do="leave --chat-template or this file out, or say what it holds with --input-format",
        )
    done, read_bytes = 0, 0
    while done < unit.num_files:
        found = _found_texts(inputs, unit, done=done, options=options)
        read_bytes += sum(inputs.sizes[unit.file + done : unit.file + done + found.num_records])
        done += found.num_records
        yield _Step(found, read_bytes)


def _found_texts(inputs: Inputs, unit: Unit, *, done: int, options: RecordOptions) -> Found:
    """The next files of a unit, until there are `block_bytes`."""
    gatherer = Gatherer(options)
    bad: dict[int, TextError] = {}
    number, num_bytes = 0, 0
    while done + number < unit.num_files and num_bytes < options.block_bytes:
        try:
            text = _read_file(inputs, unit.file + done + number, limit=options.max_document_bytes)
            gatherer.add_text(number, text)
            num_bytes += len(text)
        except TextError as error:
            bad[number] = error
        number += 1
    found = settle(
        gatherer.finish(),
        {number: str(error) for number, error in bad.items()},
        span=Span(unit.file, done, number),
        options=options,
        locate=lambda number: Place(0, bad[number].head),
    )
    # a record of text is a file
    return replace(found, bad=tuple(replace(record, file=unit.file + record.record) for record in found.bad))


def _read_file(inputs: Inputs, file: int, *, limit: int) -> bytes:
    with _told_as_unreadable(inputs.files[file]), _stream(inputs, file) as stream:
        try:
            return read_text(stream, limit=limit)
        except DamagedArchiveError as error:
            raise TextError(f"the archive is damaged ({error}): the document is lost", b"") from error


def _damage(unit: Unit, num_records: int, *, why: str, options: RecordOptions, offset: int | None) -> _Step:
    """The last step of a unit that cannot be read to its end."""
    bad = BadRecord(unit.file, num_records, offset, why, b"", is_fatal=True)
    return _Step(Found(Gatherer(options).finish(), (bad,), num_filtered=0, num_records=1), unit.size)


def _stream(inputs: Inputs, file: int) -> AbstractContextManager[BinaryIO | Archive]:
    path, compression = inputs.files[file], inputs.kinds[file].compression
    if path == STDIN:
        return nullcontext(sys.stdin.buffer)
    return Archive(path, compression) if compression else open(path, "rb")


@contextmanager
def _told_as_unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read", found=error.strerror or error) from error


def _takes_text(last: Unit, inputs: Inputs, *, number: int, unit_bytes: int) -> bool:
    """Whether text file `number` may join the unit before it."""
    is_plain_text = inputs.kinds[last.file].format == "text" and not inputs.kinds[last.file].compression
    return (
        is_plain_text
        and inputs.files[last.file] != STDIN
        and last.file + last.num_files == number
        and last.num_files < MAX_TEXT_FILES
        and last.size + inputs.sizes[number] <= unit_bytes
    )


def _row_group_units(path: Path, number: int, *, size: int, unit_bytes: int) -> Iterator[Unit]:
    """Consecutive row groups of about `unit_bytes` of the file; the last ends where the file does."""
    groups = row_groups(path)
    total = max(1, sum(group.num_bytes for group in groups))
    start, first_byte, num_bytes = 0, 0, 0
    for stop, group in enumerate(groups, 1):
        num_bytes += group.num_bytes
        end = size * num_bytes // total
        if end - first_byte >= unit_bytes or stop == len(groups):
            yield Unit(number, start, stop, end - first_byte)
            start, first_byte = stop, end
