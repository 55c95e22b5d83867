"""Frames: documents as tokens, in blocks that follow one another in a file.

Lives here: the block and its bytes. Does not live here: the files made of them (part, dedup, shuffle).

    0    magic b"MGFR"
    4    num_documents u32, num_ids u64, has_keys u8, has_mask u8, zero u16
    20   lengths       u32 x num_documents     tokens of each document
         sizes         u32 x num_documents     bytes of text of each document
         sources       (file u64, record u64) x num_documents
         keys          (u64, u64) x num_documents, if has_keys
         ids           num_ids, in the dtype of the corpus
         mask          u8 x num_ids, if has_mask
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from megads.data.corpus import SOURCE_DTYPE
from megads.errors import DataError

MAGIC = b"MGFR"
HEADER = struct.Struct("<4sIQBBH")
KEY_SIZE = 16


class Stream(Protocol):
    """What frames are read from."""

    @property
    def name(self) -> Any:
        """For messages."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; fewer only at the end."""

    def tell(self) -> int:
        """Bytes from the start."""


class Sink(Protocol):
    """What bytes are written to."""

    def write(self, content: bytes | memoryview, /) -> object:
        """Append `content`."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Some documents, none of them without tokens."""

    ids: NDArray[np.integer]
    """[sum of lengths]"""
    lengths: NDArray[np.uint32]
    """[num_documents] tokens of each"""
    sizes: NDArray[np.uint32]
    """[num_documents] bytes of text of each"""
    sources: NDArray[np.void]
    """[num_documents] `SOURCE_DTYPE`; in a part the record counts from 0 in its unit, elsewhere from 1 in its file"""
    keys: NDArray[np.uint64] | None = None
    """[num_documents, 2]; in a part the hash of the text, in a shuffle the place"""
    mask: NDArray[np.uint8] | None = None
    """[sum of lengths] chat data: 1 where the token counts as a label"""

    @property
    def num_documents(self) -> int:
        """Documents in the frame."""
        return int(self.lengths.size)

    def take(self, order: NDArray[np.intp]) -> Frame:
        """The documents `order`, in that order."""
        lengths = self.lengths[order]
        starts = (np.cumsum(self.lengths, dtype=np.int64) - self.lengths)[order]
        ends = np.cumsum(lengths, dtype=np.int64)
        # token i of the result stands in the source where it does in its document, from that document's start
        at = np.arange(ends[-1] if ends.size else 0) + np.repeat(starts - (ends - lengths), lengths)
        return Frame(
            ids=self.ids[at],
            lengths=lengths,
            sizes=self.sizes[order],
            sources=self.sources[order],
            keys=None if self.keys is None else self.keys[order],
            mask=None if self.mask is None else self.mask[at],
        )

    def select(self, kept: NDArray[np.bool_]) -> Frame:
        """The documents where `kept` [num_documents] is true."""
        if kept.all():
            return self
        of_ids = np.repeat(kept, self.lengths)
        return Frame(
            ids=self.ids[of_ids],
            lengths=self.lengths[kept],
            sizes=self.sizes[kept],
            sources=self.sources[kept],
            keys=None if self.keys is None else self.keys[kept],
            mask=None if self.mask is None else self.mask[of_ids],
        )

    def slice(self, start: int, stop: int) -> Frame:
        """Documents [start, stop), as views."""
        ends = np.cumsum(self.lengths[:stop], dtype=np.int64)
        first = int(ends[start - 1]) if start else 0
        last = int(ends[-1]) if stop else 0
        return Frame(
            ids=self.ids[first:last],
            lengths=self.lengths[start:stop],
            sizes=self.sizes[start:stop],
            sources=self.sources[start:stop],
            keys=None if self.keys is None else self.keys[start:stop],
            mask=None if self.mask is None else self.mask[first:last],
        )


def join_frames(frames: list[Frame]) -> Frame:
    """One frame of all documents in order; there is at least one frame, and all have the same columns."""
    keys = [frame.keys for frame in frames if frame.keys is not None]
    masks = [frame.mask for frame in frames if frame.mask is not None]
    return Frame(
        ids=np.concatenate([frame.ids for frame in frames]),
        lengths=np.concatenate([frame.lengths for frame in frames]),
        sizes=np.concatenate([frame.sizes for frame in frames]),
        sources=np.concatenate([frame.sources for frame in frames]),
        keys=np.concatenate(keys) if keys else None,
        mask=np.concatenate(masks) if masks else None,
    )


def write_frame(file: Sink, frame: Frame) -> None:
    """Append a frame."""
    has_keys, has_mask = frame.keys is not None, frame.mask is not None
    file.write(HEADER.pack(MAGIC, frame.num_documents, frame.ids.size, has_keys, has_mask, 0))
    columns: list[NDArray[np.generic]] = [frame.lengths, frame.sizes, frame.sources]
    columns += [column for column in (frame.keys, frame.ids, frame.mask) if column is not None]
    for column in columns:
        file.write(column_bytes(column))


def column_bytes(column: NDArray[np.generic]) -> memoryview:
    """The bytes of an array, not copied where it is contiguous."""
    return np.ascontiguousarray(column).reshape(-1).view(np.uint8).data


def read_frames(file: Stream, dtype: np.dtype[np.generic], *, stop: int) -> Iterator[Frame]:
    """The frames from where `file` stands up to byte `stop`.

    Raises:
        DataError: there is something else.
    """
    while file.tell() < stop:
        num_documents, num_ids, has_keys, has_mask = _read_header(file)
        yield Frame(
            lengths=_read(file, np.dtype("<u4"), num_documents),
            sizes=_read(file, np.dtype("<u4"), num_documents),
            sources=_read(file, SOURCE_DTYPE, num_documents),
            keys=_read(file, np.dtype("<u8"), 2 * num_documents).reshape(-1, 2) if has_keys else None,
            ids=_read(file, dtype, num_ids),
            mask=_read(file, np.dtype(np.uint8), num_ids) if has_mask else None,
        )


def read_keys(file: BinaryIO, dtype: np.dtype[np.generic], *, stop: int) -> Iterator[NDArray[np.uint64]]:
    """The keys of each frame, [num_documents, 2], passing over all else."""
    while file.tell() < stop:
        num_documents, num_ids, has_keys, has_mask = _read_header(file)
        file.seek((8 + SOURCE_DTYPE.itemsize) * num_documents, 1)
        yield _read(file, np.dtype("<u8"), 2 * num_documents * has_keys).reshape(-1, 2)
        file.seek(num_ids * (dtype.itemsize + has_mask), 1)


def _read_header(file: Stream) -> tuple[int, ...]:
    content = file.read(HEADER.size)
    if len(content) < HEADER.size or not content.startswith(MAGIC):
        raise _damaged(file)
    _, num_documents, num_ids, has_keys, has_mask, _ = HEADER.unpack(content)
    return num_documents, num_ids, has_keys, has_mask


def _read(file: Stream, dtype: np.dtype[np.generic], count: int) -> NDArray[Any]:
    content = file.read(count * dtype.itemsize)
    if len(content) != count * dtype.itemsize:
        raise _damaged(file)
    return np.frombuffer(content, dtype=dtype)


def _damaged(file: Stream) -> DataError:
    return DataError(
        f"{file.name}: damaged near byte {file.tell()}", do="remove it and run the same command again"
    )
