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
    offset = start  # of the first byte that is given to nobody yet
    if start > 0:
        rest = _skip_line(stream, block_bytes, most=None if stop is None else stop - start)
        ahead, offset = rest.content, start - 1 + rest.skipped
    else:
        ahead = stream.read(len(BYTE_ORDER_MARK))
        if ahead == BYTE_ORDER_MARK:
            ahead, offset = b"", len(BYTE_ORDER_MARK)
    pending = b""  # a line that goes on in the next chunk
    while stop is None or offset < stop:
        chunk = ahead or stream.read(block_bytes)
        ahead = b""
        if not chunk:
            if pending:
                yield LineBlock(pending, offset)
            return
        end = -1 if stop is None else chunk.find(b"\n", max(0, stop - 1 - offset - len(pending)))
        is_last = end >= 0
        if not is_last:
            end = chunk.rfind(b"\n")
        if end >= 0:
            content = b"".join((pending, memoryview(chunk)[: end + 1]))
            yield LineBlock(content, offset)
            offset += len(content)
            pending = b""
        if is_last:
            return
        pending += chunk[end + 1 :]
        if len(pending) > limit:
            rest = _skip_line(stream, block_bytes)
            size = len(pending) + rest.skipped
            yield LineBlock(pending[:HEAD_BYTES], offset, long_size=size - rest.has_line_feed)
            ahead, pending, offset = rest.content, b"", offset + size


@dataclass(frozen=True, slots=True)
class _Rest:
    """What follows a line that was skipped."""

    content: bytes
    skipped: int
    has_line_feed: bool


def _skip_line(stream: ByteStream, block_bytes: int, *, most: int | None = None) -> _Rest:
    """Read past the next line feed, but not on once `most` bytes without one were read."""
    skipped = 0
    while chunk := stream.read(block_bytes):
        end = chunk.find(b"\n")
        if end >= 0:
            return _Rest(chunk[end + 1 :], skipped + end + 1, has_line_feed=True)
        skipped += len(chunk)
        if most is not None and skipped > most:
            break
    return _Rest(b"", skipped, has_line_feed=False)
