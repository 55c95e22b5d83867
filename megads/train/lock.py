"""One job a run directory: the second is refused before it touches anything.

Rank 0 holds an advisory lock (flock) on `run.dir/lock` while the job lives; the kernel lets go of it when the process
ends, however it ends, so there is no stale lock. The file stays, and names the holder for the message alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megads.checkpoint.store import NO_LOCKS
from megads.errors import ConfigError
from megads.parallel.control import Control

_log = logging.getLogger("megads.train")


@contextmanager
def locked(directory: Path, *, control: Control) -> Iterator[None]:
    """Hold the directory, which is made if missing, for this job. All ranks call it.

    A directory that cannot be written is not told here but by the write test that follows.

    Raises:
        ConfigError: on all ranks: another job holds it.
    """
    descriptor, holder = _take(directory) if control.rank == 0 else (None, None)
    try:
        holder = control.broadcast(holder)
        if holder is not None:
            raise ConfigError(
                f"run.dir {directory} is in use by another job",
                found=holder,
                do="wait for it, or give this run a directory of its own",
            )
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _take(directory: Path) -> tuple[int | None, str | None]:
    """The lock's open file, or None; who holds the lock, or None."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        return None, None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        os.close(descriptor)
        return None, holder or "no name yet"
    except OSError as error:
        os.close(descriptor)
        if error.errno not in NO_LOCKS:
            raise
        _log.warning("%s: no file locks there (%s); do not start two jobs in it", directory, error.strerror)
        return None, None
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:  # a full disk: the write test that follows tells it
        _log.warning("%s: cannot name the holder of the lock: %s", directory, error.strerror)
    return descriptor, None
