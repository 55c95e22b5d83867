"""A file that must not change while it is read: checked `pread`s.

A bad disk, a cut file or one that was written to raises an error that names the file, where a mapped file would kill
the process.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from megads.errors import DataError


class FixedFile:
    """A plain file, open for reading at any place, from several threads at once.

    Raises:
        DataError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        self._stat = os.fstat(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._stat.st_size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on.

        Raises:
            DataError: the file was changed, ends early or cannot be read.
        """
        now = os.fstat(self._file.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._stat.st_size, self._stat.st_mtime_ns):
            raise DataError(
                f"{self.path}: the file was changed while it was in use",
                found=f"{now.st_size} bytes",
                allowed=f"{self.size} bytes, unmodified since it was opened",
            )
        try:
            content = os.pread(self._file.fileno(), size, offset)
            # a read may stop early (signals, 2 GiB limit); only an empty one is the end
            while len(content) < size:
                more = os.pread(self._file.fileno(), size - len(content), offset + len(content))
                if not more:
                    break
                content += more
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read", found=error) from error
        if len(content) != size:
            raise DataError(f"{self.path}: the file ends early", found=f"{len(content)} bytes", allowed=size)
        return content


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file for reading; never blocks on a pipe."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: not a plain file", allowed="a file")
        return open(path, "rb")
    except OSError as error:
        raise DataError(
            f"{path}: cannot be opened",
            found=error.strerror,
            allowed="PREFIX.bin and PREFIX.idx side by side",
            do="give the prefix without .bin or .idx; tools/preprocess_data.py makes both files",
        ) from error
