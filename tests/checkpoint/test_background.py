"""A step saved behind training: the values of its moment, the bytes of a plain save, and no failure untold."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.checkpoint.background import SavePlan, Saver
from megads.checkpoint.load import load
from megads.checkpoint.reader import open_step
from megads.checkpoint.retention import committed_steps
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.errors import CheckpointError, SaveError
from megads.parallel.control import Control
from tests.checkpoint.samples import empty_like, same, small_state, whole
from tests.checkpoint.stores import FaultStore
from tests.checkpoint.threads import run_threads

ALONE = Control(0, 1)


class GatedStore(Store):
    """Storage that takes no byte before the gate is opened."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, handle: int, data: Any) -> int:
        assert self.gate.wait(20)
        return super().write(handle, data)


def test_training_goes_on_and_the_step_has_the_values_of_its_moment(tmp_path: Path) -> None:
    before, state, store = small_state(1), small_state(1), GatedStore()
    saver = Saver(SavePlan(tmp_path / "behind", in_background=True), control=ALONE, store=store)
    saver.save(1, pieces=whole(state), objects={"a": 1})
    saver.check()
    assert committed_steps(tmp_path / "behind") == [], "it has returned before a byte was written"
    for tensor in state.values():
        tensor.fill_(3)
    store.gate.set()
    saver.finish()
    save(tmp_path / "plain", 1, pieces=whole(before), objects={"a": 1}, control=ALONE)
    behind, plain = (open_step(tmp_path / name / "step-00000001") for name in ("behind", "plain"))
    assert behind.digest == plain.digest
    found = empty_like(before)
    load(behind.path, whole(found))
    assert same(found, before)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    store, order = GatedStore(), []
    saver = Saver(SavePlan(tmp_path, in_background=True), control=ALONE, store=store)
    saver.save(1, pieces=whole(small_state(1)), objects={})

    def second() -> None:
        saver.save(2, pieces=whole(small_state(2)), objects={})
        order.append("second began")

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(0.2)
    order.append("gate opened")
    store.gate.set()
    thread.join(20)
    saver.finish()
    assert order == ["gate opened", "second began"]
    for step in (1, 2):
        found = empty_like(small_state())
        load(tmp_path / f"step-0000000{step}", whole(found))
        assert same(found, small_state(step)), "the memory of the first snapshot is used again only after it"


def test_ranks_save_together_in_the_background(tmp_path: Path) -> None:
    state = small_state(1)

    def one(control: Control) -> None:
        saver = Saver(SavePlan(tmp_path, keep=1, in_background=True), control=control)
        for step in (1, 2, 3):
            saver.save(step, pieces=whole(state)[control.rank :: 2], objects={})
        saver.finish()

    assert run_threads(2, one) == [None, None]
    assert [path.name for path in committed_steps(tmp_path)] == ["step-00000003"]


def full_disk(*_: object) -> int:
    return errno.ENOSPC


@pytest.mark.parametrize("asks", ["check", "finish", "save"])
def test_a_failure_reaches_the_thread_that_trains(tmp_path: Path, asks: str) -> None:
    saver = Saver(SavePlan(tmp_path, in_background=True), control=ALONE, store=FaultStore(full_disk))
    saver.save(1, pieces=whole(small_state()), objects={})
    with pytest.raises(SaveError, match=r"step 1 not saved: .*No space left"):
        if asks == "check":
            for _ in range(2000):
                saver.check()
                threading.Event().wait(0.01)
        elif asks == "finish":
            saver.finish()
        else:
            saver.save(2, pieces=whole(small_state()), objects={})


@pytest.mark.parametrize("in_background", [False, True])
def test_with_go_on_a_failure_is_a_warning_and_the_next_save_is_made(
    tmp_path: Path, in_background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    is_full = True
    store = FaultStore(lambda *_: errno.ENOSPC if is_full else None)
    plan = SavePlan(tmp_path, in_background=in_background, stops_on_failure=False)
    saver = Saver(plan, control=ALONE, store=store)
    with caplog.at_level(logging.WARNING, logger="megads"):
        saver.save(1, pieces=whole(small_state()), objects={})
        saver.finish()
    assert "step 1 not saved: " in caplog.text
    assert "training goes on without this step" in caplog.text
    is_full = False
    saver.save(2, pieces=whole(small_state()), objects={})
    saver.finish()
    assert [path.name for path in committed_steps(tmp_path)] == ["step-00000002"]


def test_what_is_no_storage_failure_is_never_only_a_warning(tmp_path: Path) -> None:
    saver = Saver(SavePlan(tmp_path, in_background=True, stops_on_failure=False), control=ALONE)
    saver.save(1, pieces=whole({"model/w": torch.zeros(2)}), objects={"bad": object()})
    with pytest.raises(CheckpointError, match="an object is not JSON"):
        saver.finish()
