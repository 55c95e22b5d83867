"""A committed step, opened for reading: the manifest, and chunks whose bytes have been checked.

The one place that reads checkpoint files; loading, verifying and describing stand on it. No torch: values are
bytes here.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megads.checkpoint.ahead import ahead
from megads.checkpoint.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    Chunk,
    DamageError,
    Manifest,
    decode,
    hash_bytes,
)
from megads.checkpoint.store import Store, describe_failure
from megads.errors import CheckpointError

STEP_NAME = re.compile(r"step-(\d{8,})")


def step_name(step: int) -> str:
    """Name of a step's directory."""
    return f"step-{step:08d}"


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """A chunk of tensor `name` and its checked bytes."""

    chunk: Chunk
    name: str
    data: memoryview


@dataclass(frozen=True, slots=True)
class StepReader:
    """One committed step.

    Attributes:
        path: its directory.
        manifest: checked against its own hash and bounds.
        digest: hash of the manifest's bytes: equal on every rank that reads the same step.
        store: the storage calls.
    """

    path: Path
    manifest: Manifest
    digest: str
    store: Store

    @property
    def step(self) -> int:
        """Optimizer steps done when it was saved."""
        return self.manifest.step

    @property
    def objects(self) -> Mapping[str, Any]:
        """The small JSON values that were saved with it."""
        return self.manifest.objects

    def file_problem(self, name: str) -> str | None:
        """Why the file `name` cannot be right, judged by its kind and size; None if it may be."""
        path = self.path / name
        try:
            kind = self.store.kind(path)
            if kind == "missing":
                return f"{path}: missing"
            if kind != "file":
                what = "directory" if kind == "directory" else "link, pipe or device"
                return f"{path}: a {what} in place of the file"
            found, expected = self.store.size(path), self.manifest.files[name].size
        except OSError as error:
            return describe_failure(error)
        return None if found == expected else f"{path}: {found} bytes, {expected} were saved"

    def read_chunk(self, chunk: Chunk, *, name: str) -> memoryview:
        """The bytes of a chunk of tensor `name`, checked: what is returned is what was hashed.

        Raises:
            DamageError: they cannot be read, or are not those that were saved.
        """
        return self._checked(chunk, name, self._fetch(chunk, name, memoryview(bytearray(chunk.size))))

    @contextmanager
    def reading(
        self, wanted: Sequence[tuple[Chunk, str]], *, checked: float = 1.0
    ) -> Iterator[Iterator[ReadChunk]]:
        """Gives chunks of the named tensors in this order, each read while the one before is hashed and used.

        Memory: two chunks. The bytes of one are valid until the next is asked for.

        Args:
            checked: share of the chunks, drawn anew each time, whose hash is compared; sizes always are.

        Raises:
            DamageError: where a chunk would be handed out, as `read_chunk`.
        """
        largest = max((chunk.size for chunk, _ in wanted), default=0)
        draw = random.Random()
        buffers = itertools.cycle([memoryview(bytearray(largest)) for _ in range(2)])
        reads = (
            ReadChunk(chunk, name, self._fetch(chunk, name, next(buffers)[: chunk.size]))
            for chunk, name in wanted
        )
        with ahead(reads) as chunks:
            yield (
                replace(read, data=self._checked(read.chunk, read.name, read.data))
                if checked >= 1.0 or draw.random() < checked
                else read
                for read in chunks
            )

    def _fetch(self, chunk: Chunk, name: str, into: memoryview) -> memoryview:
        """Fill `into` with a chunk's bytes."""
        path = self.path / chunk.file
        try:
            count = self.store.read_into(path, offset=chunk.offset, into=into)
        except OSError as error:
            raise DamageError(self._place(chunk, name), found=describe_failure(error)) from error
        if count != chunk.size:
            raise DamageError(self._place(chunk, name), found=f"{count} bytes", allowed=f"{chunk.size} bytes")
        return into

    def _checked(self, chunk: Chunk, name: str, data: memoryview) -> memoryview:
        """`data`, if it has the hash of the chunk."""
        found = hash_bytes(data)
        if found != chunk.blake3:
            raise DamageError(
                self._place(chunk, name),
                found=f"hash {found[:16]}",
                allowed=f"hash {chunk.blake3[:16]}, as saved",
            )
        return data

    def _place(self, chunk: Chunk, name: str) -> str:
        stop = chunk.offset + chunk.size
        return f"{self.path / chunk.file}: damaged at bytes {chunk.offset}..{stop}, tensor {name}"


def open_step(path: str | Path, *, store: Store | None = None) -> StepReader:
    """Open a step's directory; reads its manifest and nothing else.

    Raises:
        CheckpointError: no such directory, or a newer format.
        DamageError: the manifest is missing, damaged or of another step.
    """
    path, store = Path(path), store or Store()
    try:
        return _open(path, store)
    except OSError as failure:
        raise DamageError(f"{path}: cannot be read", found=describe_failure(failure)) from failure


def _open(path: Path, store: Store) -> StepReader:
    kind = store.kind(path)
    if kind != "directory":
        error = DamageError if kind != "missing" and STEP_NAME.fullmatch(path.name) else CheckpointError
        raise error(
            f"{path}: no checkpoint",
            found="nothing there" if kind == "missing" else f"a {kind} that is no directory",
            allowed=f"the directory of a step, with its {MANIFEST_NAME}",
        )
    file = path / MANIFEST_NAME
    if store.kind(file) != "file":
        raise DamageError(
            f"{file}: no manifest", found=store.kind(file), allowed="the file that is written last in a save"
        )
    size = store.size(file)
    data = store.read(file, offset=0, size=min(size, MAX_MANIFEST_BYTES + 1))
    if len(data) > MAX_MANIFEST_BYTES:
        raise DamageError(
            f"{file}: too large for a manifest", found=f"{size} bytes", allowed=MAX_MANIFEST_BYTES
        )
    manifest = decode(data, where=str(file))
    match = STEP_NAME.fullmatch(path.name)
    if match is not None and int(match[1]) != manifest.step:
        raise DamageError(
            f"{file}: of another step", found=f"step {manifest.step}", allowed=f"step {int(match[1])}"
        )
    return StepReader(path, manifest, hash_bytes(data), store)
