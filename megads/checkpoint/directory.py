"""A directory that is there whole or not at all, for what is not a step: exports and imports. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megads.checkpoint.commit import TEMPORARY_PREFIX
from megads.checkpoint.store import Store, make_directories, remove_tree
from megads.errors import CheckpointError


@contextlib.contextmanager
def built(target: Path, *, store: Store) -> Iterator[Path]:
    """A temporary beside `target` that becomes it if the body succeeds, and is gone if it does not.

    The body syncs the files it writes, and directories of its own.

    Raises:
        CheckpointError: something is at `target`.
        OSError: with the path.
    """
    if store.kind(target) != "missing":
        raise CheckpointError(
            f"{target}: is there already",
            found=store.kind(target),
            allowed="the name of a new directory",
            do="move it away, or give another name",
        )
    make_directories(store, target.absolute().parent)
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    if store.kind(temporary) != "missing":
        remove_tree(store, temporary)  # what a killed process left
    store.make_directory(temporary)
    try:
        yield temporary
        store.sync_directory(temporary)
        store.rename(temporary, target)
    except BaseException:
        remove_tree(store, temporary)
        raise
    store.sync_directory(target.absolute().parent)
