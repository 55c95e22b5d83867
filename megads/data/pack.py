"""Best-fit packing without cutting documents: PREFIX.pack-L, rows of at most L tokens, made offline.

Lives here: which documents share a row, the file, and reading rows back. Does not live here: the order of rows in
training (order, stream) and what a row looks like (sequence).

A document of n tokens is n - 1 inputs, each with the token behind it as its label; the last token is no input, so no
label crosses into another document. One of more than L inputs is cut every L, and its remainder is packed. Pieces are
placed longest first, each in the row with the least room that it fits (best-fit decreasing; Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", section 3), `WINDOW` of them at a time, so memory does not grow with the corpus.
Equal pieces and rows of equal room are handled at once: a corpus takes about the time of sorting it.

    PREFIX.pack-L        0   magic b"MGDSPACK"
                         8   length u64, num_rows u64, num_pieces u64
                         32  num_pieces x (start u64, count u64)     tokens of PREFIX.bin, row after row
                             (num_rows + 1) x u64                    first piece of each row
    PREFIX.pack-L.json   counts, fill, fingerprint of the corpus, hash; written last: without it there is no pack
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.corpus import Corpus, fingerprint, write_durably
from megads.data.fixed_file import FixedFile
from megads.data.indexed import IndexedReader, bin_path, idx_path, sync_file
from megads.errors import DataError

FORMAT = "megads-pack-1"
MAGIC = b"MGDSPACK"
HEADER = struct.Struct("<8sQQQ")
PIECE = np.dtype([("start", "<u8"), ("count", "<u8")])
WINDOW = 1 << 20
"""Pieces that are packed together."""
BLOCK = 1 << 18
"""Documents or pieces that are read at once."""


def pack_path(prefix: str | Path, length: int) -> Path:
    """PREFIX.pack-L."""
    return Path(f"{prefix}.pack-{length}")


@dataclass(frozen=True, slots=True)
class PackManifest:
    """What PREFIX.pack-L.json says."""

    format: str
    length: int
    rows: int
    pieces: int
    documents: int
    num_cut: int
    """Documents longer than a row."""
    num_skipped: int
    """Documents of one token: there is nothing to predict in them."""
    tokens: int
    """Inputs of all rows."""
    fingerprint: str
    """Of the corpus."""
    hash: str
    """BLAKE3 of PREFIX.pack-L."""

    @property
    def fill(self) -> float:
        """Share of the places of all rows that hold a token."""
        return self.tokens / (self.rows * self.length)


@dataclass(frozen=True, slots=True)
class Piece:
    """Inputs [start, start + count) of a corpus, from place `column` of a row on."""

    row: int
    column: int
    start: int
    count: int


def best_fit(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece by best-fit decreasing: [num_pieces] int64, rows numbered as they are opened.

    Args:
        sizes: [num_pieces], each in 1..capacity.
    """
    order = np.argsort(-sizes, kind="stable")
    row_of = np.empty(sizes.size, dtype=np.int64)
    rooms = _Rooms(capacity)
    edges = np.flatnonzero(np.diff(sizes[order])) + 1
    for pieces in np.split(order, edges) if sizes.size else []:
        size = int(sizes[pieces[0]])
        while pieces.size:
            room, rows = rooms.take(size, most=pieces.size)
            each = room // size
            filled = min(pieces.size // each, rows.size)
            row_of[pieces[: filled * each]] = np.repeat(rows[:filled], each)
            rooms.put(room - each * size, rows[:filled])
            pieces, rows = pieces[filled * each :], rows[filled:]
            if pieces.size and rows.size:  # too few for a whole row
                row_of[pieces] = rows[0]
                rooms.put(room - pieces.size * size, rows[:1])
                pieces, rows = pieces[:0], rows[1:]
            rooms.put(room, rows)
    return row_of


class _Rooms:
    """Open rows by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: dict[int, list[NDArray[np.int64]]] = {}
        self._bits = 0  # bit r: there are rows with room r
        self._num_rows = 0

    def take(self, size: int, *, most: int) -> tuple[int, NDArray[np.int64]]:
        """The least room that holds `size`, with all rows that have it; else new rows, enough for `most` pieces."""
        fitting = self._bits >> size
        if not fitting:
            first = self._num_rows
            self._num_rows += -(-most // (self._capacity // size))
            return self._capacity, np.arange(first, self._num_rows, dtype=np.int64)
        room = size + (fitting & -fitting).bit_length() - 1
        self._bits ^= 1 << room
        return room, np.concatenate(self._rows.pop(room))

    def put(self, room: int, rows: NDArray[np.int64]) -> None:
        if room and rows.size:
            self._rows.setdefault(room, []).append(rows)
            self._bits |= 1 << room


def write_pack(prefix: str | Path, length: int) -> PackManifest:
    """Pack the corpus PREFIX into rows of `length` tokens: PREFIX.pack-L and its manifest.

    Raises:
        DataError: the corpus cannot be read, or holds nothing to predict.
    """
    reader = IndexedReader(prefix)
    path = pack_path(prefix, length)
    manifest_path = Path(f"{path}.json")
    manifest_path.unlink(missing_ok=True)
    scratch, scratch_rows = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".rows.tmp")
    count = _Count()
    try:
        with open(scratch, "w+b") as file, open(scratch_rows, "w+b") as firsts:
            file.write(bytes(HEADER.size))
            for window in _windows(_pieces(reader, length, count=count)):
                row_of = best_fit(window["count"].astype(np.int64), length)
                order = np.argsort(row_of, kind="stable")
                begins = np.flatnonzero(np.diff(row_of[order], prepend=-1)) + count.pieces
                file.write(window[order].tobytes())
                firsts.write(begins.astype("<u8").tobytes())
                count.rows += begins.size
                count.pieces += window.size
            firsts.write(np.array([count.pieces], dtype="<u8").tobytes())
            firsts.seek(0)
            while content := firsts.read(8 * BLOCK):
                file.write(content)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, length, count.rows, count.pieces))
            sync_file(file)
        if not count.rows:
            raise DataError(f"{prefix}: nothing to pack", found="documents of one token", allowed="2 or more")
        manifest = PackManifest(
            format=FORMAT,
            length=length,
            rows=count.rows,
            pieces=count.pieces,
            documents=reader.num_documents,
            num_cut=count.cut,
            num_skipped=count.skipped,
            tokens=count.tokens,
            fingerprint=fingerprint(bin_path(prefix), idx_path(prefix)),
            hash=blake3(max_threads=1).update_mmap(scratch).hexdigest(),
        )
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
        scratch_rows.unlink(missing_ok=True)
    write_durably(manifest_path, json.dumps(asdict(manifest) | {"fill": manifest.fill}, indent=2).encode())
    return manifest


@dataclass(slots=True)
class _Count:
    """What was packed so far."""

    rows: int = 0
    pieces: int = 0
    cut: int = 0
    skipped: int = 0
    tokens: int = 0


def _pieces(reader: IndexedReader, length: int, *, count: _Count) -> Iterator[NDArray[np.void]]:
    """The pieces of all documents in the order of the corpus, a block of documents at a time."""
    for first in range(0, reader.num_documents, BLOCK):
        offsets = reader.document_offsets(first, min(first + BLOCK, reader.num_documents))
        inputs = np.maximum(np.diff(offsets) - 1, 0)  # [documents]
        num_pieces = -(-inputs // length)
        owners = np.repeat(np.arange(inputs.size), num_pieces)  # [pieces] document in the block
        within = np.arange(owners.size) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        pieces = np.empty(owners.size, dtype=PIECE)
        pieces["start"] = offsets[owners] + within * length
        pieces["count"] = np.minimum(inputs[owners] - within * length, length)
        count.cut += int(np.count_nonzero(num_pieces > 1))
        count.skipped += int(np.count_nonzero(num_pieces == 0))
        count.tokens += int(inputs.sum())
        yield pieces


def _windows(blocks: Iterator[NDArray[np.void]]) -> Iterator[NDArray[np.void]]:
    """The same pieces, exactly `WINDOW` at a time."""
    waiting = np.empty(0, dtype=PIECE)
    for block in blocks:
        waiting = np.concatenate((waiting, block))
        while waiting.size >= WINDOW:
            yield waiting[:WINDOW]
            waiting = waiting[WINDOW:]
    if waiting.size:
        yield waiting


class Pack:
    """The rows of a corpus, open for reading.

    Raises:
        DataError: there is no PREFIX.pack-L, it is damaged, or it is not of this corpus.
    """

    def __init__(self, corpus: Corpus, length: int) -> None:
        self.length = length
        self._path = pack_path(corpus.path, length)
        self.manifest = _read_manifest(self._path, corpus=corpus)
        self.num_rows = self.manifest.rows
        self._file = FixedFile(self._path)
        expected = HEADER.pack(MAGIC, length, self.num_rows, self.manifest.pieces)
        size = HEADER.size + PIECE.itemsize * self.manifest.pieces + 8 * (self.num_rows + 1)
        if self._file.size != size or self._file.read(0, HEADER.size) != expected:
            raise self._damaged("other counts or another size than the manifest says")

    def pieces(self, row: int) -> list[tuple[int, int]]:
        """(first token, number of tokens) of each piece of a row, in order."""
        first, last = self._firsts(row, 2).tolist()
        pieces = self._pieces(first, last)
        if not pieces.size or int(pieces["count"].sum()) > self.length:
            raise self._damaged(f"row {row} holds {int(pieces['count'].sum())} tokens")
        return list(zip(pieces["start"].tolist(), pieces["count"].tolist(), strict=True))

    def find(self, start: int, stop: int) -> Iterator[Piece]:
        """The parts of rows that are tokens of [start, stop); reads the whole file."""
        for first in range(0, self.manifest.pieces, BLOCK):
            pieces = self._pieces(first, min(first + BLOCK, self.manifest.pieces))
            begins = pieces["start"].astype(np.int64)
            ends = begins + pieces["count"].astype(np.int64)
            for number in np.flatnonzero((begins < stop) & (ends > start)).tolist():
                row = self._row_of(first + number)
                before = self._pieces(int(self._firsts(row, 1)[0]), first + number)
                begin, end = max(start, int(begins[number])), min(stop, int(ends[number]))
                column = int(before["count"].sum()) + begin - int(begins[number])
                yield Piece(row, column, begin, end - begin)

    def _row_of(self, piece: int) -> int:
        low, high = 0, self.num_rows - 1
        while low < high:
            middle = (low + high + 1) // 2
            if int(self._firsts(middle, 1)[0]) <= piece:
                low = middle
            else:
                high = middle - 1
        return low

    def _pieces(self, first: int, last: int) -> NDArray[np.void]:
        size = PIECE.itemsize
        return np.frombuffer(self._file.read(HEADER.size + size * first, size * (last - first)), dtype=PIECE)

    def _firsts(self, row: int, count: int) -> NDArray[np.uint64]:
        offset = HEADER.size + PIECE.itemsize * self.manifest.pieces + 8 * row
        return np.frombuffer(self._file.read(offset, 8 * count), dtype="<u8")

    def _damaged(self, found: object) -> DataError:
        return DataError(f"{self._path}: damaged", found=found, do=_again(self.length))


def _again(length: int) -> str:
    return f"pack the corpus with tools/preprocess_data.py --pack {length}"


def _read_manifest(path: Path, *, corpus: Corpus) -> PackManifest:
    manifest_path = Path(f"{path}.json")
    length = int(path.name.rpartition("-")[2])
    try:
        content: Any = json.loads(manifest_path.read_bytes())
        values = {field.name: content[field.name] for field in fields(PackManifest)}
    except FileNotFoundError as error:
        raise DataError(
            f"{corpus.path}: not packed for rows of {length} tokens",
            found=f"no {manifest_path.name}",
            allowed=f"{path.name} and {manifest_path.name}, which data.packing best_fit trains on",
            do=_again(length),
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{manifest_path}: not readable", found=repr(error), do=_again(length)) from error
    manifest = PackManifest(**values)
    for name, expected in (("format", FORMAT), ("length", length), ("fingerprint", corpus.fingerprint)):
        if getattr(manifest, name) != expected:
            raise DataError(
                f"{manifest_path}: not of this corpus",
                found=f"{name} {getattr(manifest, name)}",
                allowed=f"{name} {expected}",
                do=_again(length),
            )
    if not all(type(number) is int and number >= 1 for number in (manifest.rows, manifest.pieces)):
        raise DataError(f"{manifest_path}: impossible counts", found=manifest, do=_again(length))
    return manifest
