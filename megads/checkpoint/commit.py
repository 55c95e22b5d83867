"""How a step comes to exist: the protocol alone. What is written is a callable, storage calls are injected.

    every rank   writes its file into .tmp-step-00000100-<nonce>/, syncs the file, syncs the directory
                 reports (name, size, hash, chunks) or its failure to rank 0
    rank 0       writes manifest.json, syncs it, syncs the directory            all that will be read is safe
                 renames .tmp-step-00000100-<nonce> to step-00000100            the commit
                 syncs the parent                                               the commit is safe: "saved"

Where directories cannot be renamed (some mounted object stores) the temporary has the step's name from the start. A
file `.uncommitted-step-00000100` beside it is there before it and goes after the manifest; with it and without a right
manifest the directory is a temporary like any other.

A crash at any point leaves either no `step-00000100`, or a complete one. Temporaries that a crash leaves are
skipped by every reader and removed by the next save. Rank 0 holds a lock on the directory meanwhile, so that two jobs
do not take each other's temporaries for such. No torch.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megads.checkpoint.manifest import MANIFEST_NAME
from megads.checkpoint.reader import open_step, step_name
from megads.checkpoint.store import Store, describe_failure, make_directories, remove_tree, write_file
from megads.errors import CheckpointError, SaveError

TEMPORARY_PREFIX = ".tmp-"
MARKER_PREFIX = ".uncommitted-"
NO_RENAME = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL)
"""What a file system that cannot rename directories answers."""

_log = logging.getLogger(__name__)


class Agreement(Protocol):
    """What is needed of `parallel.control.Control`."""

    rank: int
    size: int

    def all_gather(self, value: Any) -> list[Any]: ...
    def gather(self, value: Any) -> list[Any] | None: ...
    def broadcast(self, value: Any) -> Any: ...
    def barrier(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """When this rank writes: at most `writers_per_node` ranks of a host write at once."""

    index: int
    count: int


def take_turns(control: Agreement, writers_per_node: int) -> Turn:
    """Cut the ranks of each host into groups that write one after the other."""
    hosts = control.all_gather(socket.gethostname())
    on_this_host = hosts[: control.rank].count(hosts[control.rank])
    return Turn(on_this_host // writers_per_node, -(-max(Counter(hosts).values()) // writers_per_node))


def commit_step(
    directory: Path,
    step: int,
    *,
    write: Callable[[Path], Any],
    manifest: Callable[[list[Any]], bytes],
    turn: Turn,
    control: Agreement,
    store: Store,
) -> Path:
    """Save one step; returns its directory once it is safe. All ranks call it.

    Args:
        directory: holds the steps; made if missing.
        write: writes and syncs this rank's files into the directory it is given; returns a JSON value.
        manifest: makes the manifest's bytes from all ranks' values; called on rank 0.

    Raises:
        SaveError: on all ranks: storage failed, with path and reason; older steps are as they were.
        CheckpointError: on all ranks: `manifest` refused what the ranks have.
    """
    target = directory / step_name(step)
    with ExitStack() as held:
        opened = control.broadcast(_open(directory, target, store, held) if control.rank == 0 else None)
        _raise_on(opened, step)
        temporary = directory / opened["temporary"]
        report: dict[str, Any] = {}
        for index in range(turn.count):
            if index == turn.index:
                report = _attempt(lambda: {"value": write(temporary)})
            control.barrier()
        reports = control.gather(report)
        verdict = None
        if reports is not None:
            verdict = _first_failure(reports) or _attempt(
                lambda: _commit(temporary, target, manifest([r["value"] for r in reports]), store)
            )
            if "failure" in verdict:
                (_clear if temporary == target else _discard)(temporary, store)
        _raise_on(control.broadcast(verdict), step)
    return target


def is_temporary(name: str) -> bool:
    """Whether a directory entry is what an unfinished save or deletion left."""
    return name.startswith(TEMPORARY_PREFIX)


def is_uncommitted(path: Path, store: Store) -> bool:
    """Whether a directory with a step's name is what an unfinished save left: marked, and without a right manifest."""
    if store.kind(_marker(path)) != "file":
        return False
    try:
        open_step(path, store=store)
    except CheckpointError:
        return True
    return False


def remove_temporaries(directory: Path, store: Store) -> None:
    """Remove what unfinished saves and deletions left; a failure is a warning."""
    for name in store.entries(directory):
        if is_temporary(name):
            _discard(directory / name, store)
        elif name.startswith(MARKER_PREFIX):
            _clear(directory / name.removeprefix(MARKER_PREFIX), store)


def remove_step(path: Path, store: Store) -> None:
    """Remove a committed step; one that is half removed is none.

    Raises:
        OSError: storage failed; the step is whole, or a temporary.
    """
    nameless = path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}-{os.urandom(4).hex()}")
    try:
        store.rename(path, nameless)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        write_file(store, _marker(path), blocks=[b"the step is being removed\n"])
        store.sync_directory(path.parent)
        store.unlink(path / MANIFEST_NAME)
        _clear(path, store)
    else:
        remove_tree(store, nameless)


def _marker(step: Path) -> Path:
    return step.with_name(MARKER_PREFIX + step.name)


def _clear(step: Path, store: Store) -> None:
    """Remove a step that was written in place and not committed, then its mark; a committed one loses the mark."""
    try:
        if is_uncommitted(step, store) and store.kind(step) != "missing":
            remove_tree(store, step)
            store.sync_directory(step.parent)  # without its mark it would be a damaged step
        store.unlink(_marker(step))
    except OSError as error:
        _log.warning("cannot remove %s: %s", step, describe_failure(error))


def _open(directory: Path, target: Path, store: Store, held: ExitStack) -> dict[str, Any]:
    """Rank 0: keep other jobs out and make the temporary directory."""

    def make() -> dict[str, Any]:
        make_directories(store, directory)
        lock = store.lock(directory)
        if lock is not None:
            held.callback(store.unlock, lock)
        remove_temporaries(directory, store)
        if store.kind(target) != "missing":
            raise CheckpointError(f"{target}: is there already", do="move it away, or use another run.dir")
        temporary = directory / f"{TEMPORARY_PREFIX}{target.name}-{os.urandom(4).hex()}"
        store.make_directory(temporary)
        if not _can_rename(temporary, store):
            _log.warning("%s: directories cannot be renamed there; steps are written in place", directory)
            _discard(temporary, store)
            temporary = target
            write_file(store, _marker(target), blocks=[b"the save is not complete\n"])
            store.sync_directory(directory)
            store.make_directory(target)
            store.sync_directory(directory)
        return {"temporary": temporary.name}

    return _attempt(make)


def _can_rename(directory: Path, store: Store) -> bool:
    """Whether the file system renames directories, tried on this empty one."""
    other = directory.with_name(f"{directory.name}-renamed")
    try:
        store.rename(directory, other)
    except OSError as error:
        if error.errno in NO_RENAME:
            return False
        _discard(directory, store)
        raise
    store.rename(other, directory)
    return True


def _commit(temporary: Path, target: Path, manifest: bytes, store: Store) -> dict[str, Any]:
    """Rank 0: all chunks are safe; make the step exist."""
    write_file(store, temporary / MANIFEST_NAME, blocks=[manifest])
    store.sync_directory(temporary)
    if temporary == target:
        store.unlink(_marker(target))
        return {}
    store.rename(temporary, target)
    try:
        store.sync_directory(target.parent)
    except OSError:
        store.rename(target, temporary)
        raise
    return {}


def _attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The action's result, or its failure as a JSON value that every rank can be told."""
    try:
        return action()
    except OSError as error:
        return {"failure": describe_failure(error), "storage": True}
    except CheckpointError as error:
        return {"failure": str(error), "storage": False}


def _first_failure(reports: list[dict[str, Any]]) -> dict[str, Any] | None:
    for rank, report in enumerate(reports):
        if "failure" in report:
            return report | {"failure": f"rank {rank}: {report['failure']}"}
    return None


def _raise_on(verdict: dict[str, Any], step: int) -> None:
    if "failure" not in verdict:
        return
    message = f"step {step} not saved: {verdict['failure']}"
    if verdict["storage"]:
        raise SaveError(message, do="free space or repair the storage; older steps are as they were")
    raise CheckpointError(message)


def _discard(path: Path, store: Store) -> None:
    try:
        remove_tree(store, path)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, describe_failure(error))
