"""The tiny corpus and config of the whole jobs in this folder."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.job import Home, make_home


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    torch.set_num_threads(1)
    return make_home(tmp_path_factory.mktemp("home") / "home")
