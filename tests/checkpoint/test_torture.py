"""Real processes killed at random instants of their saves, two that write to one directory, a disk that is full.

`test_commit.py` tries every instant of the protocol on a simulated disk; here the disk and the kill are real. Whatever
happens, each step that is there is whole, of one writer, and bit for bit what was saved.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megads.checkpoint.commit import is_temporary
from megads.checkpoint.load import load
from megads.checkpoint.retention import committed_steps, step_paths
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.checkpoint.verify import verify
from megads.errors import CheckpointError, SaveError
from megads.parallel.control import Control
from tests.checkpoint.samples import empty_like, same, whole

ALONE = Control(0, 1)
KILLS = 50


def state_of(step: int, writer: int = 0) -> dict[str, torch.Tensor]:
    """What is saved at a step: a few tensors, together 100 KB."""
    draw = torch.Generator().manual_seed(1000 * step + writer)
    return {f"model/w{n}": torch.randn(64, 98, generator=draw) for n in range(4)}


def forked(work: Callable[[], None]) -> int:
    """A child process that does `work` and ends; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def save_from(directory: Path, first: int) -> None:
    """Save step after step until somebody ends it."""
    for step in range(first, first + 1000):
        save(directory, step, pieces=whole(state_of(step)), objects={"step": step}, control=ALONE)


def newest(directory: Path) -> int:
    """The newest step, after a look at every one that is there."""
    paths = step_paths(directory, store=Store())
    assert committed_steps(directory) == paths  # nothing has a step's name that is not one
    for path in paths[:3]:
        step = int(path.name.removeprefix("step-"))
        assert verify(path) == []
        found = empty_like(state_of(step))
        load(path, whole(found))
        assert same(found, state_of(step))
    strangers = [name for name in os.listdir(directory) if not name.startswith("step-")]
    assert all(map(is_temporary, strangers)), strangers
    return int(paths[0].name.removeprefix("step-")) if paths else 0


def test_a_kill_at_any_instant_leaves_whole_steps(tmp_path: Path) -> None:
    draw, last, torn = random.Random(5), 0, 0
    for _ in range(KILLS):
        pid = forked(lambda first=last + 1: save_from(tmp_path, first))  # type: ignore[misc]
        time.sleep(draw.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += any(map(is_temporary, os.listdir(tmp_path)))
        found = newest(tmp_path)
        assert found >= last  # what was committed stays
        last = found
    assert last > KILLS / 5 and torn > KILLS / 5, (last, torn)  # kills did fall into saves


def test_two_writers_leave_steps_of_one_each(tmp_path: Path) -> None:
    def write(writer: int) -> None:
        for step in range(1, 31):
            try:
                save(tmp_path, step, pieces=whole(state_of(step, writer)), objects={}, control=ALONE)
            except (SaveError, CheckpointError):  # the other one was first, or took the temporary away
                continue

    pids = [forked(lambda writer=n: write(writer)) for n in range(2)]  # type: ignore[misc]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    paths = step_paths(tmp_path, store=Store())
    assert committed_steps(tmp_path) == paths and len(paths) >= 10
    for path in paths:
        step = int(path.name.removeprefix("step-"))
        found = empty_like(state_of(step))
        load(path, whole(found))
        assert any(same(found, state_of(step, writer)) for writer in range(2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("no right to mount a file system")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_keeps_the_steps_that_are_there(small_disk: Path) -> None:
    done = 0
    with pytest.raises(SaveError, match="No space left on device") as told:
        for step in range(1, 100):
            save(small_disk, step, pieces=whole(state_of(step)), objects={}, control=ALONE)
            done = step
    assert done >= 5 and newest(small_disk) == done
    assert f"step {done + 1} not saved" in str(told.value) and str(small_disk) in str(told.value)
    for path in step_paths(small_disk, store=Store())[2:]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    save(small_disk, done + 1, pieces=whole(state_of(done + 1)), objects={}, control=ALONE)
    assert newest(small_disk) == done + 1
