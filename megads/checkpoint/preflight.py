"""Before step 1: can every rank write where checkpoints will go, do all see one directory, is there space?

An hour of training is not spent before a full, read-only or unshared disk is told. No torch.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from megads.checkpoint.commit import TEMPORARY_PREFIX, Agreement
from megads.checkpoint.store import Store, describe_failure, make_directories, remove_tree, write_file
from megads.errors import CheckpointError


def check_writable(
    directory: str | Path, expected_bytes: int, *, control: Agreement, store: Store | None = None
) -> None:
    """Refuse a directory that cannot take a step. All ranks call it.

    Args:
        directory: holds the steps; made if missing.
        expected_bytes: size of one step, over all ranks.

    Raises:
        CheckpointError: on all ranks: not writable, not shared by all hosts, or too little space.
    """
    directory, store = Path(directory), store or Store()
    nonce: str = control.broadcast(os.urandom(16).hex())
    probe = directory / f"{TEMPORARY_PREFIX}probe-{nonce[:8]}"
    failures = [control.broadcast(_open(probe, expected_bytes, nonce, store) if control.rank == 0 else None)]
    if failures[0] is None:
        failures = control.all_gather(_probe(probe, nonce, control.rank, store))
    if control.rank == 0:
        _close(probe, store)
    for failure in failures:
        if failure is not None:
            what, found, allowed, do = failure
            raise CheckpointError(what, found=found, allowed=allowed, do=do)


def _open(probe: Path, expected_bytes: int, nonce: str, store: Store) -> list[str] | None:
    """Rank 0: check the space, make the probe directory and put the nonce there."""
    directory = probe.parent
    try:
        make_directories(store, directory)
        free = store.free(directory)
        if free < expected_bytes:
            return [
                f"{directory}: too little space for one checkpoint",
                f"{free:,} bytes free",
                f"at least {expected_bytes:,} bytes for one step",
                "free space, or choose another run.dir",
            ]
        store.make_directory(probe)
        write_file(store, probe / "nonce", blocks=[nonce.encode()])
        store.sync_directory(probe)
    except OSError as error:
        return _not_writable(directory, describe_failure(error))
    return None


def _probe(probe: Path, nonce: str, rank: int, store: Store) -> list[str] | None:
    """Every rank: read rank 0's nonce, write a file, rename it."""
    who = f"rank {rank} on {socket.gethostname()}"
    try:
        found = store.read(probe / "nonce", offset=0, size=len(nonce))
    except OSError as error:
        found = bytearray(describe_failure(error).encode())
    if found != nonce.encode():
        return [
            f"{probe.parent}: {who} does not see what rank 0 wrote there",
            found.decode(errors="replace"),
            "one directory, shared by all hosts",
            "choose a run.dir on a shared file system",
        ]
    try:
        write_file(store, probe / f"{rank}.part", blocks=[nonce.encode()])
        store.rename(probe / f"{rank}.part", probe / f"{rank}.done")
    except OSError as error:
        return _not_writable(probe.parent, f"{who}: {describe_failure(error)}")
    return None


def _not_writable(directory: Path, reason: str) -> list[str]:
    return [
        f"{directory}: checkpoints cannot be written there",
        reason,
        "a directory in which every rank may create, rename and remove files",
        "check its permissions, quota and mount, or choose another run.dir",
    ]


def _close(probe: Path, store: Store) -> None:
    """Remove the probe; what cannot be removed is removed by the next save."""
    try:
        remove_tree(store, probe)
    except OSError:
        return
