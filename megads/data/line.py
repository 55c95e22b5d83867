"""A stream of bytes cut into blocks of whole lines, with bounded memory.

Lives here: which lines belong to a byte range, lines that straddle reads, lines above the limit. Does not live
here: what a line means (json_line).

    bytes of the file   ....abc\\n|de.fgh\\n.......\\n......\\n...
    range                        start          stop
    lines of the range           |de.fgh\\n.......\\n|           those whose first byte lies in [start, stop)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from megads.data.record import HEAD_BYTES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class ByteStream(Protocol):
    """What blocks are read from."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none only at the end."""


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines, or the head of one line that is above the limit."""

    content: bytes
    """Each line ends with a line feed, but perhaps the last one of the file."""
    offset: int
    """Of its first byte in the stream."""
    long_size: int = 0
    """Above 0: the bytes of one line too long to be kept; `content` is its head."""


def line_blocks(
    stream: ByteStream, *, start: int = 0, stop: int | None = None, limit: int, block_bytes: int
) -> Iterator[LineBlock]:
    """Blocks of about `block_bytes` with the lines whose first byte is in [start, stop); None: to the end.

    `stream` stands at `max(0, start - 1)`. Memory stays below `limit + 2 * block_bytes`. A byte order mark at the
    start of the stream is left out.
    """
    pending, offset = b"", start  # bytes from `offset` on that are read but given to nobody yet
    if start > 0:
        rest = _skip_line(stream, block_bytes)
        pending, offset = rest.content, start - 1 + rest.skipped
    is_first = start == 0
    while stop is None or offset < stop:
        chunk = stream.read(block_bytes)
        data = pending + chunk
        if is_first and data.startswith(BYTE_ORDER_MARK):
            data, offset = data.removeprefix(BYTE_ORDER_MARK), offset + len(BYTE_ORDER_MARK)
        is_first = False
        end = -1 if stop is None else data.find(b"\n", max(0, stop - 1 - offset))
        is_last = end >= 0 or not chunk
        if end < 0:
            end = data.rfind(b"\n") if chunk else len(data) - 1
        content, pending = data[: end + 1], data[end + 1 :]
        if content:
            yield LineBlock(content, offset)
            offset += len(content)
        if is_last:
            return
        if len(pending) > limit:
            rest = _skip_line(stream, block_bytes)
            size = len(pending) + rest.skipped
            yield LineBlock(pending[:HEAD_BYTES], offset, long_size=size - rest.has_line_feed)
            pending, offset = rest.content, offset + size


@dataclass(frozen=True, slots=True)
class _Rest:
    """What follows a line that was skipped."""

    content: bytes
    skipped: int
    has_line_feed: bool


def _skip_line(stream: ByteStream, block_bytes: int) -> _Rest:
    skipped = 0
    while chunk := stream.read(block_bytes):
        end = chunk.find(b"\n")
        if end >= 0:
            return _Rest(chunk[end + 1 :], skipped + end + 1, has_line_feed=True)
        skipped += len(chunk)
    return _Rest(b"", skipped, has_line_feed=False)
