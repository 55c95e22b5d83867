"""Compressed files as streams of bytes: gzip with several members, zstd with several frames.

Lives here: decompressing, and getting everything out of a damaged file that stands before the damage. Does not
live here: what the bytes mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

from megads.data.record import Compression

if TYPE_CHECKING:
    import pyarrow

READ_BYTES = 1 << 20


class DamagedArchiveError(Exception):
    """The rest of a compressed file cannot be read."""


class Archive:
    """The uncompressed content of a file, read once from start to end."""

    def __init__(self, path: Path, compression: Compression) -> None:
        self._path = path
        self._compression = compression
        self._delivered = 0
        self._damage = ""
        self._open()

    @property
    def read_bytes(self) -> int:
        """Bytes of the compressed file consumed so far."""
        return int(self._file.tell())

    def tell(self) -> int:
        """Uncompressed bytes given out so far."""
        return self._delivered

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none only at the end.

        Raises:
            DamagedArchiveError: the file is truncated or corrupt here; all bytes before that were given out.
        """
        content = bytearray()
        while len(content) < size and not self._damage:
            wanted = min(size - len(content), READ_BYTES)
            try:
                piece = self._read(wanted)
            except OSError as error:
                if error.errno is not None:  # the disk, not the codec
                    raise
                self._damage = str(error)
                piece = self._rescue(self._delivered + len(content), wanted)
            if not piece:
                break
            content += piece
        if self._damage and not content:
            raise DamagedArchiveError(self._damage)
        self._delivered += len(content)
        return bytes(content)

    def _open(self) -> None:
        import pyarrow

        self._file = pyarrow.OSFile(str(self._path), "rb")
        if self._file.size() == 0:
            self._damage = "the file is empty"
        self._stream: pyarrow.NativeFile = pyarrow.CompressedInputStream(self._file, self._compression)

    def _read(self, size: int) -> bytes:
        return bytes(self._stream.read(size))

    def _rescue(self, position: int, size: int) -> bytes:
        """The good bytes of a read that failed: it gave none of them, so go there again and read one by one."""
        self._file.close()
        self._open()
        while position:
            position -= len(self._read(min(position, READ_BYTES)))
        content = bytearray()
        try:
            while len(content) < size and (byte := self._read(1)):
                content += byte
        except OSError:
            pass  # the damage, met again
        return bytes(content)
