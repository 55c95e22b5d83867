"""The storage calls of checkpoints, one small class: what tests replace to fill disks and cut power.

Primitives only, no order and no policy: which call follows which is `commit.py`'s business. Every failure is
an `OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

Kind = Literal["file", "directory", "other", "missing"]
Buffer = bytes | bytearray | memoryview

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system without locks answers."""

WRITE_BYTES = 4 << 20
"""Bytes handed to the system at once: one call with 64 MiB took three times as long as sixteen of 4 MiB."""


class Store:
    """Files and directories of the local (or mounted) file system."""

    def kind(self, path: Path) -> Kind:
        """What is at `path`; a link to a directory is a directory, any other link is `other`."""
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                return "directory" if path.is_dir() else "other"
        except (FileNotFoundError, NotADirectoryError):
            return "missing"
        return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

    def is_link(self, path: Path) -> bool:
        """Whether `path` is a symbolic link, whatever it points to."""
        return path.is_symlink()

    def entries(self, path: Path) -> list[str]:
        """Names in a directory, sorted."""
        return sorted(os.listdir(path))

    def size(self, path: Path) -> int:
        """Bytes of a file."""
        return path.lstat().st_size

    def free(self, path: Path) -> int:
        """Bytes that an unprivileged user may still write to the file system of directory `path`."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def read(self, path: Path, *, offset: int, size: int) -> bytearray:
        """`size` bytes from `offset`, fewer at the end. Never follows a link, never waits on a pipe."""
        data = bytearray(size)
        with memoryview(data) as view:
            count = self.read_into(path, offset=offset, into=view)
        del data[count:]
        return data

    def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
        """Fill `into` with bytes from `offset`; returns how many there were, fewer at the end. As `read`."""
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise OSError(0, "not a regular file")
            done = 0
            while done < len(into):
                count = os.preadv(handle, [into[done:]], offset + done)
                if count == 0:
                    break
                done += count
            return done
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(handle)

    def create(self, path: Path) -> int:
        """A handle that writes a new file; it is an error if something is there."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, handle: int, data: Buffer) -> int:
        """Write some of `data`; returns the number of bytes taken."""
        return os.write(handle, memoryview(data)[:WRITE_BYTES])

    def sync(self, handle: int) -> None:
        """Return when what was written through `handle` outlives a power cut."""
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path)

    def sync_directory(self, path: Path) -> None:
        """Return when the names in `path` outlive a power cut."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(handle)

    def lock(self, path: Path) -> int | None:
        """A handle that keeps other processes out of directory `path` until it is closed, or the process ends.

        None where the file system has no locks.

        Raises:
            BlockingIOError: another process holds it.
        """
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno in NO_LOCKS:
                return None
            reason = "another process saves there" if isinstance(error, BlockingIOError) else error.strerror
            raise OSError(error.errno, reason, str(path)) from error
        return handle

    def unlock(self, handle: int) -> None:
        """Let others in again."""
        os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Atomic; it is an error if `target` is a directory with something in it."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)


def write_file(store: Store, path: Path, *, blocks: Iterable[Buffer]) -> None:
    """Write a new file and wait until its bytes are safe; its name is so once its directory is synced.

    Raises:
        OSError: with `path`.
    """
    try:
        handle = store.create(path)
        try:
            for block in blocks:
                rest = memoryview(block)
                while rest:
                    rest = rest[store.write(handle, rest) :]
            store.sync(handle)
        finally:
            store.close(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_directories(store: Store, path: Path) -> None:
    """Make `path` and what is missing above it, so that it outlives a power cut."""
    if store.kind(path) == "directory":
        return
    make_directories(store, path.parent)
    try:
        store.make_directory(path)
    except FileExistsError:
        if store.kind(path) != "directory":
            raise
    store.sync_directory(path.parent)


def remove_tree(store: Store, path: Path) -> None:
    """Remove a file, or a directory with all in it; links are removed, not followed."""
    if store.is_link(path) or store.kind(path) != "directory":
        store.unlink(path)
        return
    for name in store.entries(path):
        remove_tree(store, path / name)
    store.remove_directory(path)


def describe_failure(error: OSError) -> str:
    """`path: reason`."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
