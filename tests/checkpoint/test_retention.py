"""Which steps are there, and which are removed: the oldest, never the newest, never by halves."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from megads.checkpoint.retention import committed_steps, prune, step_paths
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.parallel.control import Control
from tests.checkpoint.samples import small_state, whole
from tests.checkpoint.stores import FaultStore

ALONE = Control(0, 1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for step in (99, 100, 1000, 123456789):
        save(tmp_path, step, pieces=whole(small_state()), objects={}, control=ALONE)
    return tmp_path


def numbers(paths: list[Path]) -> list[int]:
    return [int(p.name[5:]) for p in paths]


def test_steps_are_ordered_by_number(directory: Path) -> None:
    assert numbers(committed_steps(directory)) == [123456789, 1000, 100, 99]
    assert committed_steps(directory / "nothing") == []


@pytest.mark.parametrize(
    ("keep", "left"),
    [(None, 4), (1, 1), (2, 2), (4, 4), (9, 4), (0, 1)],
)
def test_the_oldest_go(directory: Path, keep: int | None, left: int) -> None:
    gone = prune(directory, keep)
    assert numbers(gone) == [99, 100, 1000, 123456789][: 4 - left], "oldest first"
    assert numbers(committed_steps(directory)) == [123456789, 1000, 100, 99][:left]
    assert len(list(directory.iterdir())) == left


def test_every_kth_step_stays_for_ever(directory: Path) -> None:
    assert numbers(prune(directory, 1, keep_every=100)) == [99]
    assert numbers(committed_steps(directory)) == [123456789, 1000, 100]


def test_damaged_steps_neither_count_nor_go(directory: Path) -> None:
    (directory / "step-00001000" / "manifest.json").unlink()
    assert numbers(prune(directory, 2)) == [99]
    assert numbers(committed_steps(directory)) == [123456789, 100]
    assert (directory / "step-00001000").is_dir()


def test_what_is_no_step_stays(directory: Path) -> None:
    for name in ("step-00000001.bak", "step-1", "set-aside-step-00000001", "notes"):
        (directory / name).mkdir()
    assert numbers(prune(directory, 1)) == [99, 100, 1000]
    assert len(list(directory.iterdir())) == 5


@pytest.mark.parametrize("fails", [False, True])
def test_steps_go_where_directories_cannot_be_renamed(directory: Path, fails: bool) -> None:
    def fault(_number: int, name: str, path: str) -> int | None:
        if name == "rename":
            return errno.ENOSYS
        return errno.EIO if fails and name == "unlink" and path.endswith(".bin") else None

    prune(directory, 2, store=FaultStore(fault))
    assert numbers(committed_steps(directory)) == [123456789, 1000]
    assert numbers(step_paths(directory, store=Store())) == [123456789, 1000]  # half removed is not damaged
    assert len(list(directory.iterdir())) == (6 if fails else 2)
    save(directory, 123456790, pieces=whole(small_state()), objects={}, control=ALONE)
    assert len(list(directory.iterdir())) == 3


@pytest.mark.parametrize("operation", ["rename", "unlink", "remove_directory"])
def test_a_failure_is_a_warning_and_nothing_half_removed_has_a_steps_name(
    directory: Path, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FaultStore(lambda _number, name, _path: errno.EACCES if name == operation else None)
    with caplog.at_level(logging.WARNING, logger="megads"):
        prune(directory, 1, store=store)
    assert "old step" in caplog.text
    assert "Permission denied" in caplog.text
    steps = [p for p in directory.iterdir() if p.name.startswith("step-")]
    assert sorted(committed_steps(directory)) == sorted(steps)
    save(directory, 123456790, pieces=whole(small_state()), objects={}, control=ALONE)
    prune(directory, 1)
    assert [p.name for p in directory.iterdir()] == ["step-123456790"]
