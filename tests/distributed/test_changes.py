"""Batch size and sequence length that change while a run goes on: planned, resumed, under any layout, in the ledger."""

from __future__ import annotations

import json
import re

import pytest
import torch

from megads.data.sequence import Batch
from megads.errors import DataError
from megads.log import read_metrics
from megads.parallel.layout import Layout as Grid
from megads.train.replica import check_replicas
from tests.distributed.job import Home, Layout, command, connected, losses, train
from tests.ranks import run_ranks

SCHEDULES = (
    "batch.ramp=[{tokens: 0, global: 4}, {tokens: 300, global: 8}]",
    "data.curriculum={kind: fixed_linear, start: 4, steps: 8, unit: 4}",
    "data.check_every=1",
)
STEPS = 12


@pytest.fixture(scope="module")
def planned(home: Home) -> dict[int, float]:
    """Losses of a run under both schedules in one process."""
    train(home, "planned", Layout(), *SCHEDULES, f"run.stop_after={STEPS}")
    return losses(home, "planned")


def rows(home: Home, run: str) -> list[dict[str, int]]:
    found: list[dict[str, int]] = json.loads((home.path / run / "history.json").read_text())
    return found


def test_rows_of_history_follow_the_schedules(home: Home, planned: dict[int, float]) -> None:
    """Lengths 4 4 8 8 8 12 12 12 16 ... by step; the batch doubles where 300 tokens were read."""
    found = [(row["first_step"], row["batch_size"], row["sequence_length"]) for row in rows(home, "planned")]
    assert found == [(1, 4, 4), (3, 4, 8), (6, 4, 12), (8, 4, 16), (10, 8, 16)]
    tokens = [record["tokens"] for record in read_metrics(home.path / "planned" / "metrics.jsonl")]
    assert tokens == [16, 32, 64, 96, 128, 176, 224, 288, 352, 480, 608, 736]


@pytest.mark.parametrize(
    "layout",
    [Layout(data=2), Layout(pipeline=3), Layout(tensor=2, pipeline=2, schedule="gpipe")],
    ids=["data2", "pipeline3", "tensor2-pipeline2"],
)
def test_losses_do_not_depend_on_the_layout_or_on_a_stop(
    home: Home, planned: dict[int, float], layout: Layout
) -> None:
    """With three stages the ranks in the middle read no tokens."""
    run = f"planned-{layout.data}{layout.pipeline}{layout.tensor}"
    for stop in (7, STEPS):
        train(home, run, layout, *SCHEDULES, f"run.stop_after={stop}")
        assert rows(home, run) == rows(home, "planned")
    assert losses(home, run) == pytest.approx(planned, rel=1e-5)


def test_a_resumed_run_is_the_same_bit_for_bit(home: Home, planned: dict[int, float]) -> None:
    for stop in (2, 8, STEPS):
        train(home, "stopped", Layout(), *SCHEDULES, f"run.stop_after={stop}")
    assert losses(home, "stopped") == planned


def test_the_verb_tells_documents_and_steps(home: Home, planned: dict[int, float]) -> None:
    config = "planned/config.yaml"
    told = command(home.path, "data", config, "--step", "10")
    assert told.code == 0, told.errors
    first, *lines = told.said.splitlines()
    assert first == "step 10: 8 samples of 16 tokens"
    pattern = re.compile(
        r"sample +(\d+) columns +(\d+)\.\.(\d+) +data/train document (\d+) tokens (\d+)\.\.(\d+) of \d+  (.*):(\d+)"
    )
    found = [pattern.fullmatch(line) for line in lines]
    assert all(found)
    columns = sum(int(match[3]) - int(match[2]) + 1 for match in found if match)
    assert columns == 8 * 16
    for match in found[:3]:
        assert match is not None
        for name in (match[4], f"{match[7]}:{match[8]}"):
            steps = command(home.path, "data", config, "--document", name)
            assert steps.code == 0, steps.errors
            assert f"step     10 {match[0]}" in steps.said
    wrongs = (
        (["--step", "0"], "outside the run"),
        (["--document", "99999"], "no document 99999 in the corpora"),
    )
    for wrong, why in wrongs:
        refused = command(home.path, "data", config, *wrong)
        assert (refused.code, refused.said) == (2, "")
        assert why in refused.errors


def test_a_run_that_has_not_begun_has_its_planned_history(home: Home, planned: dict[int, float]) -> None:
    fresh = command(home.path, "data", "config.yaml", "--step", "10", "run.dir=nowhere", *SCHEDULES)
    begun = command(home.path, "data", "planned/config.yaml", "--step", "10")
    assert fresh.said == begun.said != ""


def test_ranks_of_a_replica_that_differ_are_named() -> None:
    """Ranks 0, 1 and 2, 3 are replicas: rank 3 has another label, later another mask; middle stages have no tokens."""

    def work(rank: int, size: int) -> list[str]:
        grid, control = Grid(tensor=2, data=2), connected(rank, size)
        told = []
        for change in ("none", "labels", "mask"):
            tokens = torch.full((2, 4), rank // 2)
            batch = Batch(tokens, tokens.clone(), tokens >= 0, tokens, None, torch.arange(2), 5)
            if rank == 3 and change != "none":
                getattr(batch, change)[1, 2] = 0
            for reads in (True, rank != 3):
                try:
                    check_replicas(batch, layout=grid, control=control, reads_tokens=reads)
                    told.append("")
                except DataError as error:
                    told.append(str(error))
        return told

    for told in run_ranks(work, 4):
        assert told[:2] == ["", ""]
        assert "ranks 2 and 3" in told[2]
        assert "tokens and labels of step 5" in told[2]
        assert told[3] == ""
        assert "mask, positions and documents of step 5" in told[4]
        assert told[5] == told[4]
