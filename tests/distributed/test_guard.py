"""A step out of line: skipped, or the run goes back and leaves its batches out; under pipelines, through a kill.

The spike is in the data: whatever step reads the poisoned document has labels that nobody could guess.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megads.data import loader
from megads.data.sampler import Reading, Sampler
from megads.data.sequence import Batch
from megads.log import read_metrics
from megads.train.standing import Restorer
from megads.train.verdict import RollBack
from tests.distributed.job import Home, Layout, command, losses, step_directory, tensors, train

GUARD = "optim.guard={policy: %s, window: 6, sigma: 12}"
SPIKE = 8  # the step that reads it, in a run that goes straight on
LAST = 13
ONE, MANY = Layout(), Layout(tensor=2, pipeline=2, micro=4)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of the samples that step 8 of an undisturbed run reads, by where their tokens lie, are one rare id."""
    read, poisoned = loader.Loader.batch, {}

    def places(sampler: Sampler, step: int) -> list[tuple[int, int]]:
        found: list[Reading] = list(sampler.readings(step))
        return sorted((reading.start, reading.stop) for reading in found)

    def batch(self: loader.Loader, step: int) -> Batch:
        made = read(self, step)
        sampler = self._sampler
        if "places" not in poisoned:
            undisturbed = Sampler(tuple(sampler.corpora.values()), sampler.history[:1], seed=7)
            poisoned["places"] = places(undisturbed, SPIKE)
        if places(sampler, step) != poisoned["places"]:
            return made
        return replace(made, labels=torch.full_like(made.labels, 397))

    monkeypatch.setattr(loader.Loader, "batch", batch)


def skipped(home: Home, run: str) -> list[int]:
    records = read_metrics(home.path / run / "metrics.jsonl")
    return [record["step"] for record in records if record["skipped"]]


def history(home: Home, run: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((home.path / run / "history.json").read_text())
    return rows


@pytest.mark.parametrize(
    "layout",
    [pytest.param(ONE, id="one"), pytest.param(MANY, id="tensor2-pipeline2", marks=pytest.mark.slow)],
)
def test_a_skipped_step_changes_nothing_and_names_its_documents(home: Home, layout: Layout) -> None:
    run = f"skip-{layout.world_size}"
    train(
        home, run, layout, GUARD % "skip", f"run.stop_after={LAST}", "checkpoint.every=1", "optim.ema=[0.9]"
    )
    assert skipped(home, run) == [SPIKE]
    before, at = (tensors(step_directory(home, run, step)) for step in (SPIKE - 1, SPIKE))
    assert all(torch.equal(before[name], at[name]) for name in before)
    log = (home.path / run / "log").read_text()
    assert f"step {SPIKE} is out of line and was skipped: loss" in log
    told = (home.path / run / "out_of_line" / f"step-{SPIKE:08d}.txt").read_text()
    assert told == command(home.path, "data", f"{run}/config.yaml", "--step", str(SPIKE)).said
    assert told.splitlines()[1] in log


@pytest.fixture
def straight(home: Home) -> dict[int, float]:
    """Losses of a run that went back in time, without a kill."""
    train(home, "back-1", Layout(), GUARD % "rollback", f"run.stop_after={LAST}")
    return losses(home, "back-1")


def test_a_rollback_leaves_the_batches_out_and_survives_kills_and_layouts(
    home: Home, straight: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints at 3 and 6: step 8 sends the run back to 6, and 7 reads what 9 would have read."""
    (first, row) = history(home, "back-1")
    assert (row["first_step"], row["skipped"]) == (7, [[0, 2 * 8]])
    assert sorted(straight) == list(range(1, LAST + 1))
    assert skipped(home, "back-1") == []
    told = command(home.path, "data", "back-1/config.yaml", "--step", "7").said.splitlines()[1:]
    (home.path / "plain.json").write_text(json.dumps([first]))
    undisturbed = command(home.path, "data", "config.yaml", "run.dir=plain", "--step", "9").said.splitlines()[
        1:
    ]
    assert told == undisturbed

    train(home, "back-4", MANY, GUARD % "rollback", f"run.stop_after={LAST}")
    assert history(home, "back-4") == history(home, "back-1")
    assert losses(home, "back-4") == pytest.approx(straight, rel=1e-5)

    # killed right after it went back, before anything new is saved
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        real = Restorer.roll_back

        def roll_back(self: Restorer, cause: RollBack, rows: object) -> object:
            patch.setattr("megads.train.trainer.source.build_loader", die)
            return real(self, cause, rows)  # type: ignore[arg-type]

        patch.setattr(Restorer, "roll_back", roll_back)
        argv = ["train", "config.yaml", "run.dir=killed-back", "batch.micro=2", GUARD % "rollback"]
        assert command(home.path, *argv, f"run.stop_after={LAST}").code != 0
    assert history(home, "killed-back") == history(home, "back-1")
    train(home, "killed-back", Layout(), GUARD % "rollback", f"run.stop_after={LAST}")
    assert (home.path / "killed-back" / "log").read_text().count("back to step 6") == 1
    assert losses(home, "killed-back") == straight
    found, expected = (tensors(step_directory(home, run, LAST)) for run in ("killed-back", "back-1"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_cannot_go_back_ends_with_the_reason(home: Home) -> None:
    argv = ["train", "config.yaml", "run.dir=nowhere-back", "checkpoint.every=1000", GUARD % "rollback"]
    ended = command(home.path, *argv, f"run.stop_after={LAST}")
    assert ended.code == 1
    assert f"step {SPIKE} is out of line and the run cannot go back" in ended.errors
    assert "no step is saved" in ended.errors
    argv = ["train", "config.yaml", "run.dir=stopped-by-guard", GUARD % "stop"]
    ended = command(home.path, *argv, f"run.stop_after={LAST}")
    assert ended.code == 1
    assert f"step {SPIKE} is out of line and was not taken" in ended.errors
    assert "(at most" in ended.errors


def test_guard_averages_and_plateau_go_on_bit_for_bit(home: Home) -> None:
    """Everything of a recipe that has a state, stopped twice and moved to its own checkpoints."""
    recipe = [
        GUARD % "skip",
        "optim.ema=[0.9, 0.99]",
        "optim.decay=plateau",
        "optim.plateau={factor: 0.5, patience: 0, threshold: 0.5}",
        "log.validate_every=2",
        "optim.label_smoothing=0.1",
        "optim.z_loss=1e-4",
    ]
    train(home, "recipe", Layout(), *recipe, f"run.stop_after={LAST}")
    for stop in (5, 9, LAST):
        train(home, "recipe-stopped", Layout(), *recipe, f"run.stop_after={stop}")
    keys = ("step", "loss", "trained_loss", "lr", "grad_norm", "skipped")
    found, expected = (
        [[record[key] for key in keys] for record in read_metrics(home.path / run / "metrics.jsonl")]
        for run in ("recipe-stopped", "recipe")
    )
    assert found == expected
    assert len({row[3] for row in expected}) >= 3  # the rate went down twice at least
    assert all(row[2] > row[1] for row in expected if row[0] != SPIKE)
    after, wanted = (tensors(step_directory(home, run, LAST)) for run in ("recipe-stopped", "recipe"))
    assert after.keys() == wanted.keys()
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)
    scores = [
        json.loads(command(home.path, "evaluate", "recipe", "--data", "data/valid", "--json", *more).said)[
            "loss"
        ]
        for more in ([], ["--weights", "ema_0.9"], ["--weights", "ema_0.99"])
    ]
    assert len(set(scores)) == 3
    refused = command(home.path, "evaluate", "recipe", "--data", "data/valid", "--weights", "ema_0.5")
    assert refused.code == 2
    assert "ema_0.9, ema_0.99, model" in refused.errors


def test_a_decay_branches_from_any_saved_step(home: Home) -> None:
    """The trunk keeps its rate; from its step 6 another run decays to the end in 4 steps."""
    train(home, "trunk", Layout(), "optim.decay=constant", "optim.warmup_steps=2", "run.stop_after=9")
    branch = [
        f"checkpoint.load={step_directory(home, 'trunk', 6)}",
        "run.steps=10",
        "optim.warmup_steps=2",
        "optim.decay=wsd",
        "optim.tail={shape: sqrt, steps: 4}",
    ]
    for stop in (8, 10):
        more = branch if stop == 8 else branch[1:]
        train(home, "branch", Layout(), *more, f"run.stop_after={stop}")
    rates = {r["step"]: r["lr"] for r in read_metrics(home.path / "branch" / "metrics.jsonl")}
    assert rates == pytest.approx({6 + n: 1e-3 * (1 - (n / 4) ** 0.5) for n in (1, 2, 3, 4)}, abs=1e-18)
    assert losses(home, "branch")[7] == losses(home, "trunk")[7]
