"""`verify/measure.py`: what a rank does when another never joins it; agreement is what tests/parity proves."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megads.verify import measure as module
from megads.verify.measure import measure
from megads.verify.ranks import RanksError
from tests.parity.harness import Case, Model, make_config

SLACK = 20.0  # seconds that a loaded machine may add


def test_a_group_of_the_layout_waits_no_longer_than_its_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forgotten message inside the layout is told as soon as one that all ranks wait for."""
    step = module.train_step

    def stuck(*args: Any, mesh: Any, **options: Any) -> Any:
        if mesh.group("tp").rank == 1:
            time.sleep(200)
        return step(*args, mesh=mesh, **options)

    monkeypatch.setattr(module, "train_step", stuck)
    case = Case(tensor=2, data=2, micro=14)
    config = make_config(Model("llama", layers=1), case, precision="fp64")
    start = time.monotonic()
    with pytest.raises(RanksError, match=r"rank 1 stood in .*measure\.py"):
        measure(config, case.world_size, steps=1, stall=2.0)
    assert time.monotonic() - start < 2.0 + SLACK
