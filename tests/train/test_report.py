"""What a run tells: one record a step, curves and samples for TensorBoard, and only one rank that speaks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megads.config.log import LogConfig
from megads.config.root import Config
from megads.log import read_metrics
from megads.train.report import Reporter, short_names
from tests.parity.harness import Case, Model, make_config

RECORD = {
    "step": 3,
    "loss": 2.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "seconds": 0.1,
    "mfu": 0.4,
    "valid/a/loss": 2.0,
}


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logging.getLogger("megads"), "propagate", True
    )  # a run in this process may have cut it


def make(*, tensorboard: bool) -> Config:
    config = make_config(Model(), Case(), precision="fp32")
    return replace(config, log=LogConfig(tensorboard=tensorboard))


def test_a_step_is_written_said_and_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reporter = Reporter(make(tensorboard=True), directory=tmp_path, speaks=True)
    with caplog.at_level(logging.INFO, logger="megads.train"):
        reporter.step(RECORD, is_shown=True)
        reporter.sample("The", "The end", step=3)
    reporter.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [RECORD]
    assert "step 3/100 loss 2.5000" in caplog.text
    assert "valid/a/loss 2.0000" in caplog.text and "'The' -> The end" in caplog.text
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(3, 2.5)]
    assert {"train/lr", "train/grad_norm", "perf/mfu", "valid/a/loss"} <= set(found.Tags()["scalars"])
    assert any("sample/The" in tag for tag in found.Tags()["tensors"])


def test_other_ranks_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(make(tensorboard=True), directory=tmp_path, speaks=False)
    reporter.step(RECORD, is_shown=True)
    reporter.sample("The", "The end", step=3)
    reporter.close()
    assert list(tmp_path.iterdir()) == []
    assert caplog.text == ""


def test_a_resumed_run_forgets_later_steps(tmp_path: Path) -> None:
    for start in (1, 2):
        reporter = Reporter(make(tensorboard=False), directory=tmp_path, speaks=True)
        reporter.resume(start - 1)
        for step in range(start, 4):
            reporter.step({**RECORD, "step": step}, is_shown=False)
        reporter.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_corpora_of_the_same_name_keep_their_paths() -> None:
    assert short_names(["a/valid", "b/valid", "c/books"]) == ["a/valid", "b/valid", "books"]
