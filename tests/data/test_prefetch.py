"""Batches come in order, no more of them than asked for are made ahead, and errors come out where they are taken."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megads.data.prefetch import Prefetcher
from megads.data.sequence import Batch
from megads.errors import DataError


class Kitchen:
    """Makes batches that know their step, and notes who made them."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        self.made: list[int] = []
        self.threads: set[str] = set()
        self._fails_at = fails_at

    def __call__(self, step: int) -> Batch:
        if step == self._fails_at:
            raise DataError(f"corpus x: sample 3 of step {step}")
        self.made.append(step)
        self.threads.add(threading.current_thread().name)
        row = torch.full((1, 4), step)
        return Batch(row, row, row > 0, row, None, torch.zeros(1), step)

    def settled(self) -> list[int]:
        """What was made once nothing more is."""
        while True:
            before = len(self.made)
            time.sleep(0.05)
            if len(self.made) == before:
                return self.made


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_and_the_queue_is_bounded(depth: int) -> None:
    kitchen = Kitchen()
    with Prefetcher(kitchen, range(5, 12), depth=depth) as batches:
        assert kitchen.settled() == list(range(5, 5 + depth))
        for step in range(5, 12):
            assert batches.take(step).step == step
            assert len(kitchen.made) <= step - 4 + depth
        assert kitchen.made == list(range(5, 12))
    assert all(name.startswith("megads-loader") for name in kitchen.threads) == (depth > 0)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_out_at_its_step_and_not_before(depth: int) -> None:
    with Prefetcher(Kitchen(fails_at=3), range(1, 9), depth=depth) as batches:
        assert [batches.take(step).step for step in (1, 2)] == [1, 2]
        with pytest.raises(DataError, match="corpus x: sample 3 of step 3"):
            batches.take(3)


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    with Prefetcher(Kitchen(), range(1, 1000), depth=2) as batches:
        batches.take(1)
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_steps_cannot_be_taken_out_of_order() -> None:
    with Prefetcher(Kitchen(), range(1, 9), depth=2) as batches, pytest.raises(ValueError, match="step 2"):
        batches.take(2)
