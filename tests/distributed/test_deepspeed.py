"""A whole run under DeepSpeed's stage 3: trained, validated, saved, and gone on with under other engines."""

from __future__ import annotations

import importlib
import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from megads.log import read_metrics
from tests.distributed.job import Home, Layout, losses, train

OFFLOAD = "{zero_optimization: {offload_optimizer: {device: cpu}, offload_param: {device: cpu}}}"


def test_a_run_goes_on_under_another_engine_and_stage(home: Home) -> None:
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # before the fork
    keys = ["log.validate_every=2", "checkpoint.every=2", "log.sample_every=2", "log.sample_tokens=4"]
    train(home, "native", Layout(), "run.stop_after=6", *keys)
    deepspeed = "optim.engine=deepspeed"
    train(home, "engines", Layout(data=2, zero=3), "run.stop_after=2", deepspeed, *keys)
    train(
        home,
        "engines",
        Layout(tensor=2, zero=3),
        "run.stop_after=4",
        deepspeed,
        f"optim.deepspeed={OFFLOAD}",
        *keys,
    )
    train(home, "engines", Layout(data=2, zero=1), "run.stop_after=6", *keys)
    expected = losses(home, "native")
    assert losses(home, "engines") == pytest.approx(expected, rel=1e-6)
    validated = [_validated(home, run) for run in ("native", "engines")]
    assert validated[0].keys() >= {2, 4, 6}
    assert validated[1] == pytest.approx(validated[0], rel=1e-6)


def _validated(home: Home, run: str) -> dict[int, float]:
    """Losses of the validation by step."""
    return {
        row["step"]: value
        for row in read_metrics(home.path / run / "metrics.jsonl")
        for key, value in row.items()
        if key.startswith("valid/") and key.endswith("/loss")
    }
