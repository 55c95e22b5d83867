"""Buckets: many files of frames or numbers that are appended to in turn, in bounded memory.

Lives here: the files. Does not live here: what is put where (dedup, shuffle).
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

MAX_BUCKETS = 512
"""Files open at once; the usual limit of a process is 1024."""
BUFFER_BYTES = 1 << 16


class Buckets:
    """`count` files in `folder`, made when first written to; leaving the block closes them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self._files: dict[int, BinaryIO] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, bucket: int) -> BinaryIO:
        """The file of a bucket, for appending."""
        if bucket not in self._files:
            self._files[bucket] = open(self.path(bucket), "wb", BUFFER_BYTES)  # noqa: SIM115 - closed at exit
        return self._files[bucket]

    def path(self, bucket: int) -> Path:
        """Where a bucket is, if anything was put in it."""
        return self.folder / f"{bucket:06}"

    def __enter__(self) -> Buckets:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()


def num_buckets(total_bytes: int, bucket_bytes: int) -> int:
    """A power of two of buckets that hold about `bucket_bytes` each, as far as `MAX_BUCKETS` allows."""
    count = 1
    while count < MAX_BUCKETS and count * bucket_bytes < total_bytes:
        count *= 2
    return count
