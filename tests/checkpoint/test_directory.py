"""A built directory is there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from megads.checkpoint.directory import built
from megads.checkpoint.store import Store
from megads.errors import CheckpointError


def test_it_appears_with_everything_in_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with built(target, store=Store()) as directory:
        (directory / "a").write_text("1")
        assert not target.exists()
        assert directory.parent == target.parent
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert (target / "a").read_text() == "1"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), built(tmp_path / "out", store=Store()) as directory:
        (directory / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "old").write_text("half")
    with built(tmp_path / "out", store=Store()):
        pass
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="already"), built(tmp_path / "out", store=Store()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_it_is_synced_before_it_gets_its_name(tmp_path: Path) -> None:
    calls: list[str] = []

    class Logged(Store):
        def sync_directory(self, path: Path) -> None:
            calls.append(f"sync {path.name}")
            super().sync_directory(path)

        def rename(self, source: Path, target: Path) -> None:
            calls.append(f"rename {target.name}")
            super().rename(source, target)

    with built(tmp_path / "out", store=Logged()):
        pass
    assert calls == ["sync .tmp-out", "rename out", f"sync {tmp_path.name}"]

    class Full(Store):
        def rename(self, source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with pytest.raises(OSError, match="No space"), built(tmp_path / "other", store=Full()):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
