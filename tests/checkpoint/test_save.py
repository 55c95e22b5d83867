"""A save that fails says where and why on every rank, leaves older steps alone, and can be tried again."""

from __future__ import annotations

import errno
import logging
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.checkpoint.load import load
from megads.checkpoint.reader import open_step
from megads.checkpoint.retention import committed_steps
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.checkpoint.verify import verify
from megads.errors import CheckpointError, SaveError
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box
from tests.checkpoint.samples import bits, empty_like, same, small_state, whole
from tests.checkpoint.stores import FaultStore
from tests.checkpoint.threads import run_threads

ALONE = Control(0, 1)
OLD, NEW = small_state(1), small_state(2)


def check_step(directory: Path, step: int) -> None:
    """The newest step is `step`, bit for bit, and no temporary is left."""
    newest = committed_steps(directory)[0]
    wanted = empty_like(OLD)
    assert load(newest, whole(wanted)).step == step
    assert same(wanted, {1: OLD, 2: NEW}[step])
    assert verify(newest) == []
    assert [p.name for p in directory.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("write", errno.EIO),
        ("write", errno.EFBIG),
        ("sync", errno.EIO),
        ("create", errno.EROFS),
        ("create", errno.ENOSPC),
        ("close", errno.EIO),
        ("make_directory", errno.EACCES),
        ("sync_directory", errno.EIO),
        ("rename", errno.EIO),
    ],
)
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_lasting_failure_names_path_and_reason_on_all_ranks(
    tmp_path: Path, operation: str, code: int, bad_rank: int
) -> None:
    save(tmp_path, 1, pieces=whole(OLD), objects={}, control=ALONE)
    calls = []

    def fault(number: int, name: str, path: str) -> int | None:
        if name == operation:
            calls.append(path)
            return code
        return None

    def one(control: Control) -> Path:
        store = FaultStore(fault) if control.rank == bad_rank else Store()
        return save(
            tmp_path, 2, pieces=whole(NEW)[control.rank :: 2], objects={}, control=control, store=store
        )

    results = run_threads(2, one)
    if bad_rank == 1 and operation in ("make_directory", "rename"):
        check_step(tmp_path, 2)  # rank 0 alone does these
        return
    for error in results:
        assert isinstance(error, SaveError)
        assert error.exit_code == 1
        assert str(error).startswith("step 2 not saved: ")
        assert str(tmp_path / ".tmp-step-00000002") in str(error)
        assert os.strerror(code) in str(error)
        assert bad_rank == 0 or "rank 1: " in str(error)
    assert len({str(p).partition(".tmp")[2][:25] for p in calls}) == 3, (
        "three tries, each from a new temporary"
    )
    check_step(tmp_path, 1)
    save(tmp_path, 2, pieces=whole(NEW), objects={}, control=ALONE)
    check_step(tmp_path, 2)


def test_one_failure_anywhere_is_got_over(tmp_path: Path) -> None:
    """An error at the k-th change, for every k: the save returns all the same, and what it saved is right."""
    count = FaultStore(lambda *_: None)
    save(tmp_path / "count", 1, pieces=whole(OLD), objects={}, control=ALONE, store=count)
    for k in range(count.count):
        directory = tmp_path / str(k)
        store = FaultStore(lambda number, _operation, _path, k=k: errno.EIO if number == k else None)
        try:
            save(directory, 1, pieces=whole(OLD), objects={}, control=ALONE, store=store)
        except SaveError:
            raise AssertionError(f"change {k}") from None
        check_step(directory, 1)


def test_a_try_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FaultStore(lambda number, _operation, _path: errno.EIO if number == 3 else None)
    with caplog.at_level(logging.WARNING, logger="megads"):
        save(tmp_path, 1, pieces=whole(OLD), objects={}, control=ALONE, store=store)
    assert "try 1 of 3: step 1 not saved: " in caplog.text


def test_a_failed_fsync_is_never_taken_for_success(tmp_path: Path) -> None:
    """After a failed fsync the kernel may report the next one as clean: the file must not be used again."""
    created: list[str] = []

    def fault(number: int, operation: str, path: str) -> int | None:
        if operation == "create":
            created.append(path)
        return errno.EIO if operation == "sync" and len(created) == 1 else None

    save(tmp_path, 1, pieces=whole(OLD), objects={}, control=ALONE, store=FaultStore(fault))
    assert len(created) == len(set(created)) == 3, "the first file; then file and manifest in a new directory"


def test_short_writes_do_not_matter(tmp_path: Path) -> None:
    class Short(Store):
        def write(self, handle: int, data: Any) -> int:
            return super().write(handle, data[:7])

    save(tmp_path, 1, pieces=whole(OLD), objects={}, control=ALONE, store=Short())
    check_step(tmp_path, 1)


def test_a_file_size_limit_of_the_system_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(SaveError, match=r"chunks-00000.bin: File too large"):
            save(tmp_path, 1, pieces=whole(OLD), objects={}, control=ALONE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([[("w", (4,), (0,), (2,))], [("w", (4,), (3,), (4,))]], "'w': missing from index [2] on"),
        (
            [[("w", (4,), (0,), (3,))], [("w", (4,), (2,), (4,))]],
            "'w': there more than once from index [2] on",
        ),
        ([[("w", (4,), (0,), (4,))], [("w", (5,), (0,), (4,))]], "pieces of w differ"),
        ([[("w", (4,), (0,), (5,))], []], "is not inside shape (4,)"),
        ([[("../w", (4,), (0,), (4,))], []], ""),
        ([[("w w", (4,), (0,), (4,))], []], "not a name of letters"),
    ],
)
def test_pieces_that_do_not_fit_together_are_refused_on_all_ranks(
    tmp_path: Path, pieces: list[list[tuple[Any, ...]]], words: str
) -> None:
    def one(control: Control) -> Path:
        mine = [
            Piece(name, shape, Box(start, stop), torch.zeros(Box(start, stop).shape))
            for name, shape, start, stop in pieces[control.rank]
        ]
        return save(tmp_path, 1, pieces=mine, objects={}, control=control)

    results = run_threads(2, one)
    if not words:  # names are never paths, so dots are harmless
        assert (tmp_path / "step-00000001").is_dir()
        return
    for error in results:
        assert isinstance(error, CheckpointError)
        assert not isinstance(error, SaveError)
        assert words in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_piece_must_fit_its_box(tmp_path: Path) -> None:
    piece = Piece("w", (4,), Box((0,), (4,)), torch.zeros(3))
    with pytest.raises(CheckpointError, match="piece of w: tensor and box differ"):
        save(tmp_path, 1, pieces=[piece], objects={}, control=ALONE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.zeros(1)])
def test_objects_are_json(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="not JSON"):
        save(tmp_path, 1, pieces=[], objects={"x": value}, control=ALONE)
    assert list(tmp_path.iterdir()) == []


def test_objects_come_back_with_all_digits(tmp_path: Path) -> None:
    objects = {"lr": 0.1 + 0.2, "big": 2**60, "text": 'ü "\\\n', "nested": [{"a": None}, True, -0.0]}
    path = save(tmp_path, 1, pieces=[], objects=objects, control=ALONE)
    assert dict(open_step(path).objects) == objects


class Watching(Store):
    """Counts the chunk files that are being written at the same time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def create(self, path: Path) -> int:
        if path.suffix == ".bin":
            self.now += 1
            self.most = max(self.most, self.now)
        return super().create(path)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        if path.name.startswith(".tmp"):
            self.now -= 1


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_writers_take_turns(tmp_path: Path, at_once: int) -> None:
    """At most `writers_per_node` files of a host are written at once; one file a rank that has something."""
    state = {f"t{i}": torch.full((3,), float(i)) for i in range(5)}
    pieces, store = whole(state), Watching()
    shares = [[pieces[0], pieces[3]], [pieces[1]], [pieces[2]], [], [pieces[4]]]

    def one(control: Control) -> Path:
        mine = shares[control.rank]
        return save(
            tmp_path,
            1,
            pieces=mine,
            objects={},
            control=control,
            writers_per_node=at_once,
            store=store,
        )

    path = run_threads(5, one)[0]
    assert 1 <= store.most <= at_once
    names = sorted(p.name for p in path.iterdir())
    assert names == [f"chunks-0000{r}.bin" for r in (0, 1, 2, 4)] + ["manifest.json"]
    wanted = empty_like(state)
    load(path, whole(wanted))
    assert same(wanted, state)


def test_the_file_is_the_raw_values(tmp_path: Path) -> None:
    """The format can be read without megads: little-endian, row-major, from the manifest's offsets."""
    path = save(tmp_path, 1, pieces=whole(OLD), objects={}, control=ALONE)
    data = (path / "chunks-00000.bin").read_bytes()
    for name, entry in open_step(path).manifest.tensors.items():
        (chunk,) = entry.chunks
        assert data[chunk.offset : chunk.offset + chunk.size] == bits(OLD[name])
