"""Save pieces of logical tensors as one committed step.

Each rank writes the pieces it is given as chunks of one file; together the ranks give every element exactly
once, which is checked before the commit. The order of storage calls is `commit.py`'s, the format
`manifest.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from megads.checkpoint.ahead import ahead
from megads.checkpoint.commit import Agreement, commit_step, take_turns
from megads.checkpoint.manifest import (
    MAX_CHUNK_BYTES,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    chunk_from_tree,
    chunk_tree,
    encode,
    hash_bytes,
)
from megads.checkpoint.store import Store, write_file
from megads.errors import CheckpointError, SaveError
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box

_TRIES = 3

_log = logging.getLogger(__name__)


def save(
    directory: str | Path,
    step: int,
    *,
    pieces: Sequence[Piece],
    objects: Mapping[str, Any],
    control: Agreement,
    writers_per_node: int = 8,
    store: Store | None = None,
) -> Path:
    """Save one step; returns its directory once it outlives a power cut. All ranks call it.

    Storage failures are tried again, from a new temporary, up to 3 times in all.

    Args:
        pieces: this rank's share; over all ranks every element of every tensor exactly once. Bits are kept.
        objects: small JSON values; rank 0's are saved.

    Raises:
        SaveError: on all ranks: storage failed; older steps are as they were.
        CheckpointError: on all ranks: the pieces do not fit together, or the step is there already.
    """
    directory, store = Path(directory), store or Store()
    turn = take_turns(control, writers_per_node)

    def attempt() -> Path:
        return commit_step(
            directory,
            step,
            write=lambda temporary: _write(temporary, pieces, rank=control.rank, store=store),
            manifest=lambda reports: encode(_merge(step, reports, objects)),
            turn=turn,
            control=control,
            store=store,
        )

    for number in range(1, _TRIES):
        try:
            return attempt()
        except SaveError as error:
            _log.warning("try %d of %d: %s", number, _TRIES, error)
    return attempt()


def split_box(box: Box, limit: int) -> Iterator[Box]:
    """Halve a box along its first dim that can be halved until each part has at most `limit` elements."""
    if box.size <= limit:
        yield box
        return
    dim = next(d for d, length in enumerate(box.shape) if length > 1)
    middle = (box.start[dim] + box.stop[dim]) // 2
    for start, stop in ((box.start[dim], middle), (middle, box.stop[dim])):
        part = Box(
            (*box.start[:dim], start, *box.start[dim + 1 :]), (*box.stop[:dim], stop, *box.stop[dim + 1 :])
        )
        yield from split_box(part, limit)


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in a manifest."""
    return str(dtype).removeprefix("torch.")


def _write(temporary: Path, pieces: Sequence[Piece], *, rank: int, store: Store) -> dict[str, Any]:
    """Write this rank's file, if it has any bytes; files, and tensors with their chunks, as JSON values."""
    name = f"chunks-{rank:05d}.bin"
    tensors: dict[str, dict[str, Any]] = {}
    hasher, offset = blake3(), 0

    def blocks() -> Iterator[memoryview]:
        nonlocal offset
        for piece in pieces:
            entry = _entry(tensors, piece)
            for box, data in _blocks(piece):
                entry["chunks"].append(chunk_tree(Chunk(box, name, offset, data.nbytes, hash_bytes(data))))
                hasher.update(data)
                offset += data.nbytes
                yield data

    if all(piece.box.size == 0 for piece in pieces):
        return {"files": {}, "tensors": {piece.name: _entry(tensors, piece) for piece in pieces}}
    with ahead(blocks()) as hashed:
        write_file(store, temporary / name, blocks=hashed)
    store.sync_directory(temporary)
    return {"files": {name: {"size": offset, "blake3": hasher.hexdigest()}}, "tensors": tensors}


def _entry(tensors: dict[str, dict[str, Any]], piece: Piece) -> dict[str, Any]:
    """The entry of a piece's tensor, made at its first piece.

    Raises:
        CheckpointError: the piece contradicts its box or an earlier piece.
    """
    if tuple(piece.tensor.shape) != piece.box.shape:
        raise CheckpointError(
            f"piece of {piece.name}: tensor and box differ",
            found=tuple(piece.tensor.shape),
            allowed=piece.box.shape,
        )
    head = {"shape": list(piece.shape), "dtype": dtype_name(piece.tensor.dtype)}
    entry = tensors.setdefault(piece.name, head | {"chunks": []})
    if any(entry[key] != value for key, value in head.items()):
        raise CheckpointError(f"pieces of {piece.name} differ in global shape or dtype")
    return entry


def _blocks(piece: Piece) -> Iterator[tuple[Box, memoryview]]:
    """A piece as bounded boxes with their bytes, row-major."""
    if piece.box.size == 0:
        return
    origin = tuple(-a for a in piece.box.start)
    for box in split_box(piece.box, MAX_CHUNK_BYTES // piece.tensor.element_size()):
        part = piece.tensor.detach()[box.shift(origin).slices].cpu().contiguous()
        yield box, part.reshape(-1).view(torch.uint8).numpy().data


def _merge(step: int, reports: list[dict[str, Any]], objects: Mapping[str, Any]) -> Manifest:
    """Rank 0: the manifest of all ranks' files."""
    heads: dict[str, tuple[tuple[int, ...], str]] = {}
    chunks: dict[str, list[Chunk]] = {}
    for rank, report in enumerate(reports):
        for name, entry in report["tensors"].items():
            head = (tuple(entry["shape"]), entry["dtype"])
            if heads.setdefault(name, head) != head:
                raise CheckpointError(
                    f"pieces of {name} differ", found=f"{head} on rank {rank}", allowed=heads[name]
                )
            chunks.setdefault(name, []).extend(map(chunk_from_tree, entry["chunks"]))
    tensors = {name: TensorEntry(*head, tuple(chunks[name])) for name, head in heads.items()}
    files = {n: FileEntry(f["size"], f["blake3"]) for report in reports for n, f in report["files"].items()}
    return Manifest(step, tensors, files, objects)
