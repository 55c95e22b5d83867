"""A directory that cannot take a checkpoint is refused before step 1, on all ranks."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megads.checkpoint.preflight import check_writable
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.parallel.control import Control
from tests.checkpoint.stores import FaultStore
from tests.checkpoint.threads import run_threads


class Small(Store):
    def free(self, path: Path) -> int:
        return 1000


class Elsewhere(Store):
    """A host that has its own, empty directory of the same name."""

    def read_into(self, path: Path, *, offset: int, into: memoryview) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))


def read_only() -> Store:
    return FaultStore(lambda _n, name, _p: errno.EROFS if name in ("create", "make_directory") else None)


def full() -> Store:
    return FaultStore(lambda _n, name, _p: errno.ENOSPC if name == "write" else None)


def refusals(directory: Path, stores: list[Store], expected_bytes: int = 1000) -> list[str]:
    """What each rank is told; they must agree."""

    def one(control: Control) -> None:
        check_writable(directory, expected_bytes, control=control, store=stores[control.rank])

    results = run_threads(len(stores), one)
    assert all(r is None for r in results) or all(
        isinstance(r, CheckpointError) and r.exit_code == 2 for r in results
    )
    assert len({str(r) for r in results}) == 1
    assert not directory.exists() or list(directory.iterdir()) == []
    return [str(r) for r in results if r is not None]


def test_a_good_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    assert refusals(tmp_path / "run" / "checkpoints", [Store()] * 3) == []
    assert (tmp_path / "run" / "checkpoints").is_dir()


def test_too_little_space_names_path_needed_and_free(tmp_path: Path) -> None:
    assert refusals(tmp_path, [Small(), Store()], 1000) == []
    text = refusals(tmp_path, [Small(), Store()], 123_456)[0]
    assert str(tmp_path) in text
    assert "1,000 bytes free" in text
    assert "123,456 bytes" in text


@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize(
    ("make", "words"), [(read_only, "Read-only file system"), (full, "No space left on device")]
)
def test_what_cannot_be_written_is_told(tmp_path: Path, make: object, words: str, bad_rank: int) -> None:
    assert callable(make)
    stores = [make() if rank == bad_rank else Store() for rank in range(2)]
    text = refusals(tmp_path, stores)[0]
    assert "checkpoints cannot be written there" in text
    assert words in text
    assert bad_rank == 0 or "rank 1 on " in text


def test_a_directory_that_is_not_shared_is_told(tmp_path: Path) -> None:
    text = refusals(tmp_path, [Store(), Store(), Elsewhere()])[0]
    assert "rank 2 on " in text
    assert "does not see what rank 0 wrote" in text


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_writable(tmp_path / "run" / "checkpoints", 1, control=Control(0, 1))
