"""`train/lock.py`: one job a directory, whatever becomes of the jobs."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from megads.errors import ConfigError
from megads.parallel.control import Control
from megads.train.lock import locked
from tests.ranks import run_ranks

ALONE = Control(0, 1)


def test_a_second_job_is_refused_and_the_directory_is_free_again(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with locked(run, control=ALONE):
        with pytest.raises(ConfigError, match="in use by another job") as error, locked(run, control=ALONE):
            pytest.fail("the second job was let in")
        assert f"process {os.getpid()} on" in str(error.value)
        with locked(tmp_path / "other", control=ALONE):
            pass
    with locked(run, control=ALONE):
        pass


def test_the_lock_of_a_killed_job_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with locked(tmp_path, control=ALONE):
            os._exit(9)
    os.waitpid(child, 0)
    with locked(tmp_path, control=ALONE):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_every_rank_is_told(tmp_path: Path) -> None:
    def work(rank: int, size: int) -> str:
        try:
            with locked(tmp_path, control=_control(rank, size)):
                return "let in"
        except ConfigError as error:
            return str(error)

    with locked(tmp_path, control=ALONE):
        told = run_ranks(work, 2)
    assert all("in use by another job" in text for text in told)
    assert run_ranks(work, 2) == ["let in"] * 2


def _control(rank: int, size: int) -> Control:
    return Control(rank, size, dist.new_group(backend="gloo"))


def test_a_directory_that_cannot_be_made_is_left_to_the_write_test(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "run", control=ALONE):
        assert (tmp_path / "file").is_file()


def test_a_file_system_without_locks_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(logging.getLogger("megads"), "propagate", True)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path, control=ALONE):
        pass
    assert "do not start two jobs" in caplog.text
