"""Ranks that want the same chunks read each once between them; damage that one meets ends all; checks by sample."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from megads.checkpoint import save as save_module
from megads.checkpoint.load import load
from megads.checkpoint.reader import open_step
from megads.checkpoint.save import save
from megads.checkpoint.share import Reading
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.parallel.control import Control
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box
from tests.checkpoint.samples import empty_like, same, small_state, whole
from tests.ranks import run_ranks


class CountingStore(Store):
    """Counts the bytes that are read of chunk files."""

    def __init__(self) -> None:
        self.read_bytes = 0

    def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
        if path.suffix == ".bin":
            self.read_bytes += len(into)
        return super().read_into(path, offset=offset, into=into)


@pytest.fixture
def step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty-odd chunks of at most 64 bytes."""
    monkeypatch.setattr(save_module, "MAX_CHUNK_BYTES", 64)
    state = small_state(2) | {"model/large": torch.arange(500.0)}
    return save(tmp_path, 1, pieces=whole(state), objects={}, control=Control(0, 1))


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank saw."""

    read_bytes: int
    is_right: bool
    failure: str | None


def load_on_rank(rank: int, size: int, *, step: Path, part: range | None = None) -> Told:
    """Load everything (of `model/optional` a part) as one of `size` replicas."""
    mesh = build_mesh(Layout(data=size), rank)
    state = small_state(2) | {"model/large": torch.arange(500.0)}
    targets, store = empty_like(state), CountingStore()
    pieces = whole({name: t for name, t in targets.items() if name != "model/large"})
    mine = slice(None) if part is None else slice(rank * 500 // size, (rank + 1) * 500 // size)
    span = targets["model/large"][mine]
    start = mine.start or 0
    pieces.append(Piece("model/large", (500,), Box((start,), (start + span.numel(),)), span))
    control = Control(rank, size)
    reading = Reading(replicas=mesh.group("dp_cp"))
    try:
        load(step, pieces, control=control, reading=reading, store=store)
    except CheckpointError as error:
        return Told(store.read_bytes, is_right=False, failure=str(error))
    wanted = state | {"model/large": state["model/large"][mine]}
    found = targets | {"model/large": span}
    return Told(store.read_bytes, same(found, wanted), None)


@pytest.mark.parametrize("size", [2, 3])
def test_replicas_read_every_byte_once_between_them(step: Path, size: int) -> None:
    told = run_ranks(partial(load_on_rank, step=step), size)
    total = open_step(step).manifest.size
    assert all(rank.is_right for rank in told), told
    assert sum(rank.read_bytes for rank in told) == total
    assert max(rank.read_bytes for rank in told) <= total // size + 128  # the work is shared


def test_what_only_one_needs_it_reads_itself(step: Path) -> None:
    told = run_ranks(partial(load_on_rank, step=step, part=range(1)), 2)
    assert all(rank.is_right for rank in told), told
    total = open_step(step).manifest.size
    assert total <= sum(rank.read_bytes for rank in told) <= total + 64  # one chunk holds both halves' border


@pytest.mark.parametrize("number", [0, 1, 7])
def test_damage_that_one_rank_meets_is_told_by_all(step: Path, number: int) -> None:
    chunks = [chunk for entry in open_step(step).manifest.tensors.values() for chunk in entry.chunks]
    chunk = sorted(chunks, key=lambda c: (c.file, c.offset))[number]
    data = bytearray((step / chunk.file).read_bytes())
    data[chunk.offset] ^= 0x10
    (step / chunk.file).write_bytes(data)
    told = run_ranks(partial(load_on_rank, step=step), 2)
    assert all(rank.failure is not None for rank in told)
    for rank in told:
        assert f"damaged at bytes {chunk.offset}..{chunk.offset + chunk.size}" in str(rank.failure)


def test_a_share_of_the_chunks_is_checked(step: Path) -> None:
    """With all bytes but the sizes wrong, what is checked is what fails."""
    reader = open_step(step)
    wanted = [(chunk, name) for name, entry in reader.manifest.tensors.items() for chunk in entry.chunks]
    (file,) = step.glob("chunks-*.bin")
    file.write_bytes(bytes(byte ^ 0xFF for byte in file.read_bytes()))
    random.seed(0)

    def passes(checked: float) -> int:
        number = 0
        for item in wanted:
            with reader.reading([item], checked=checked) as chunks:
                try:
                    number += len(list(chunks))
                except CheckpointError:
                    continue
        return number

    assert passes(0.0) == len(wanted) and passes(1.0) == 0
    assert 0 < sum(passes(0.5) for _ in range(8)) < 8 * len(wanted)
