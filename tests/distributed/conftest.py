"""One tiny corpus for all tests of whole jobs, and copies of it to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.bench import Bench
from tests.distributed.job import Home, Layout, make_home, train


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    torch.set_num_threads(1)
    return make_home(tmp_path_factory.mktemp("home") / "home")


@pytest.fixture(scope="session")
def trained(home: Home) -> Home:
    """The home with a run called `run` that has done and saved steps 1, 2 and 3."""
    train(home, "run", Layout(), "run.stop_after=3", "checkpoint.every=1")
    return home


@pytest.fixture
def bench(trained: Home, tmp_path: Path) -> Bench:
    shutil.copytree(trained.path / "data", tmp_path / "data")
    shutil.copytree(trained.path / "run", tmp_path / "run")
    shutil.copy(trained.path / "config.yaml", tmp_path)
    return Bench(tmp_path)
