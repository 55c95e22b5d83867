"""Reading chunks together: what every rank of a replica group needs is read by one of them and broadcast.

    rank 0 reads   chunk 0 | chunk 2 | chunk 4        each rank hashes what it reads
    rank 1 reads   chunk 1 | chunk 3 | chunk 5        all ranks get 0, 1, 2, ... in this order

So a thousand data-parallel replicas take from a shared file system what one would. Chunks that not all of them need
(optimizer state that ZeRO cuts) are read by who needs them. A rank that finds damage tells the others with the chunk.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.checkpoint.manifest import Chunk
from megads.checkpoint.reader import StepReader
from megads.errors import CheckpointError
from megads.parallel.collectives import all_reduce_, broadcast_
from megads.parallel.mesh import Group

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Reading:
    """How chunks are read.

    Attributes:
        checked: share of the chunks whose hash is compared (0: none, 1: all); sizes and manifest always are.
        replicas: ranks that may read for each other; None: each reads for itself. All of them read together.
        device: where the group's collectives take their tensors.
    """

    checked: float = 1.0
    replicas: Group | None = None
    device: torch.device = CPU


ALONE = Reading()

Wanted = tuple[Chunk, str]


@dataclass(frozen=True, slots=True)
class Part:
    """A chunk of tensor `name` and its bytes: [size] uint8, valid until the next is asked for."""

    chunk: Chunk
    name: str
    data: Tensor


def read_shared(reader: StepReader, wanted: Sequence[Wanted], *, reading: Reading) -> Generator[Part]:
    """The wanted chunks, each once, in no promised order.

    Args:
        wanted: what this rank needs, in file order.

    Raises:
        DamageError: on a rank that read damage itself; the others end without a word.
    """
    group = reading.replicas
    if group is None or group.size == 1:
        yield from _read(reader, wanted, reading.checked)
        return
    common = _common(reader, wanted, group, reading.device)
    shared = [item for item in wanted if _place(item) in common]
    failure: CheckpointError | None = None
    try:
        yield from _read(reader, [item for item in wanted if _place(item) not in common], reading.checked)
    except CheckpointError as error:
        failure = error
    num_failures = torch.full((1,), int(failure is not None), dtype=torch.int32, device=reading.device)
    if all_reduce_(num_failures, group).item():
        if failure is not None:
            raise failure
        return
    yield from _read_in_turns(reader, shared, group, reading)


def _place(item: Wanted) -> tuple[str, int]:
    chunk, _ = item
    return chunk.file, chunk.offset


def _common(
    reader: StepReader, wanted: Sequence[Wanted], group: Group, device: torch.device
) -> frozenset[tuple[str, int]]:
    """Places of the chunks that all ranks of the group want."""
    every = sorted(
        (chunk.file, chunk.offset) for entry in reader.manifest.tensors.values() for chunk in entry.chunks
    )
    mine = {_place(item) for item in wanted}
    counts = torch.tensor([place in mine for place in every], dtype=torch.int32, device=device)
    if every:
        all_reduce_(counts, group)
    return frozenset(place for place, n in zip(every, counts.tolist(), strict=True) if n == group.size)


def _read(reader: StepReader, wanted: Sequence[Wanted], checked: float) -> Generator[Part]:
    with reader.reading(wanted, checked=checked) as chunks:
        for read in chunks:
            yield Part(read.chunk, read.name, torch.frombuffer(read.data, dtype=torch.uint8))


def _read_in_turns(
    reader: StepReader, wanted: Sequence[Wanted], group: Group, reading: Reading
) -> Generator[Part]:
    """Chunk i is read by rank i modulo the group's size; a byte behind its own tells whether it is right."""
    largest = max((chunk.size for chunk, _ in wanted), default=0)
    buffer = torch.empty(largest + 1, dtype=torch.uint8, device=reading.device)
    with closing(_read(reader, wanted[group.rank :: group.size], reading.checked)) as mine:
        for number, (chunk, name) in enumerate(wanted):
            source = number % group.size
            message = buffer[: chunk.size + 1]
            failure: CheckpointError | None = None
            if source == group.rank:
                message[-1] = 0
                try:
                    message[:-1].copy_(next(mine).data)
                except CheckpointError as error:
                    failure = error
                    message[-1] = 1
            broadcast_(message, group, source=source)
            if failure is not None:
                raise failure
            if message[-1].item():
                return
            yield Part(chunk, name, message[:-1])
