"""Plain text and source files to documents: a file is a document."""

from __future__ import annotations

from megads.data.documents import is_utf8, too_large
from megads.data.field import RecordError
from megads.data.line import BYTE_ORDER_MARK, ByteStream

READ_BYTES = 1 << 20


class TextError(RecordError):
    """Why a file is no document, and its first bytes."""

    def __init__(self, why: str, head: bytes) -> None:
        super().__init__(why)
        self.head = head


def read_text(stream: ByteStream, *, limit: int) -> bytes:
    """All of a stream without its byte order mark; valid UTF-8 without NUL. Memory stays below about 3 * limit.

    Raises:
        TextError: it is something else, or has more than `limit` bytes.
    """
    content = bytearray()
    size = 0
    while chunk := stream.read(READ_BYTES):
        size += len(chunk)
        if size <= limit + len(BYTE_ORDER_MARK):
            content += chunk
    text = bytes(content.removeprefix(BYTE_ORDER_MARK))
    size -= len(content) - len(text)
    if size > limit:
        raise TextError(too_large("a document", size, limit=limit), text)
    if not is_utf8(text) or b"\0" in text:
        raise TextError("not UTF-8 text", text)
    return text
