"""`verify/ranks.py`: ranks that answer, raise, die or hang, and what is said of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megads.errors import ConfigError
from megads.parallel.collectives import all_reduce_
from megads.parallel.control import Control
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.verify.ranks import RanksError, fork_ranks

SLACK = 20.0  # seconds that a loaded machine may add


def test_values_come_in_rank_order() -> None:
    def work(control: Control) -> tuple[int, float]:
        mesh = build_mesh(Layout(tensor=3), control.rank)
        return control.rank, all_reduce_(torch.ones(1), mesh.group("tp")).item()

    assert fork_ranks(work, 3) == [(0, 3.0), (1, 3.0), (2, 3.0)]
    assert fork_ranks(lambda control: control.size, 1) == [1]


def _raise(control: Control) -> None:
    if control.rank == 1:
        raise ValueError("rank one had enough")
    control.barrier()


def _exit(control: Control) -> None:
    if control.rank == 1:
        os._exit(3)
    control.barrier()


def _kill(control: Control) -> None:
    if control.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    control.barrier()


def _hang(control: Control) -> None:
    if control.rank == 1:
        time.sleep(60)
    control.barrier()


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (_raise, ("rank 1 of 2 failed", "ValueError: rank one had enough")),
        (_exit, ("rank 1 of 2 failed", "died with exit code 3")),
        (_kill, ("rank 1 of 2 failed", "died of SIGKILL")),
        (_hang, ("rank 0 of 2 failed in", "control.py", "barrier", "rank 1 stood in")),
    ],
    ids=["raises", "exits", "killed", "hangs"],
)
def test_a_rank_that_does_not_come_back_is_named(
    work: Callable[[Control], None], words: tuple[str, ...]
) -> None:
    start = time.monotonic()
    with pytest.raises(RanksError) as caught:
        fork_ranks(work, 2, stall=2.0)
    assert time.monotonic() - start < 2.0 + SLACK
    for word in words:
        assert word in str(caught.value)


def test_nothing_runs_for_ever() -> None:
    with pytest.raises(RanksError, match="no answer after 1 s"):
        fork_ranks(lambda control: time.sleep(60), 2, timeout=1.0)


def test_a_wrong_input_stays_one() -> None:
    def work(control: Control) -> None:
        raise ConfigError("model.heads", found=3, allowed=4)

    with pytest.raises(ConfigError, match=r"model\.heads"):
        fork_ranks(work, 2)


def test_no_process_is_left(tmp_path: Path) -> None:
    def work(control: Control) -> None:
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    with pytest.raises(RanksError):
        fork_ranks(work, 2, timeout=2.0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
