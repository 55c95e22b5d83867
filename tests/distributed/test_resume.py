"""A run that is killed, stopped or moved to another layout goes on as if nothing had happened.

Everything is seen from outside: exit codes, the last words of a job, metrics.jsonl, history.json, checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megads.assemble import source, wiring
from megads.checkpoint.load import load
from megads.checkpoint.retention import committed_steps
from megads.checkpoint.save import save
from megads.config.load import load as load_config
from megads.data.sampler import Sampler
from megads.log import read_metrics
from megads.optim.zero import NativeEngine
from megads.parallel.mesh import build_mesh
from megads.train import history as run_history
from tests.distributed.job import (
    Home,
    Layout,
    Process,
    children,
    connected,
    is_running,
    launch,
    losses,
    rank_processes,
    step_directory,
    tensors,
    train,
    wait_until,
)
from tests.ranks import run_ranks

LAYOUT = Layout(tensor=2, pipeline=2)
LAST = 36  # of the uninterrupted run


@pytest.fixture(scope="module")
def reference(home: Home) -> dict[int, float]:
    """Losses of the uninterrupted run; its checkpoints are in `reference`."""
    train(home, "reference", LAYOUT, f"run.stop_after={LAST}")
    return losses(home, "reference")


@pytest.fixture
def killed() -> Iterator[list[Process]]:
    """Launchers that a failing test would leave behind."""
    started: list[Process] = []
    yield started
    for process in started:
        for pid in children(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.kill()


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_killed_rank_ends_the_job_and_the_run_goes_on_bit_for_bit(
    home: Home, reference: dict[int, float], killed: list[Process], victim: int
) -> None:
    run, draw = f"killed-{victim}", random.Random(victim)
    after, pause = draw.randint(3, 9), draw.uniform(0, 0.05)
    print(f"rank {victim} is killed {pause:.3f} s after step {after}")
    checkpoints, metrics = (home.path / run / name for name in ("checkpoints", "metrics.jsonl"))

    job = launch(home, run, LAYOUT)
    killed.append(job)
    wait_until(
        lambda: not job.is_alive or len(read_metrics(metrics)) >= after, seconds=200, what="no step was done"
    )
    ranks = rank_processes(job.pid)
    assert sorted(ranks) == [0, 1, 2, 3], job.end().errors
    time.sleep(pause)
    start = time.monotonic()
    os.kill(ranks[victim], signal.SIGKILL)
    ended = job.end()
    seconds = time.monotonic() - start

    assert seconds < 15
    assert ended.code == 1
    assert ended.errors.splitlines()[-1].startswith(f"rank {victim}: killed by SIGKILL"), ended.errors
    assert "Traceback" not in ended.errors
    assert not [pid for pid in ranks.values() if is_running(pid)]
    done = losses(home, run)
    assert done == {step: reference[step] for step in done}  # the same run, started afresh

    committed = int(committed_steps(checkpoints)[0].name.removeprefix("step-"))
    assert 3 <= committed <= max(done) + 1
    train(home, run, LAYOUT, f"run.stop_after={committed + 3}")
    assert first_resumed_step(home, run) == committed + 1
    assert losses(home, run) == {step: reference[step] for step in range(1, committed + 4)}
    assert_same_bits(home, run, "reference", committed + 3)


def first_resumed_step(home: Home, run: str) -> int:
    """The first step that the last start of a run did, by its log."""
    last_start = (home.path / run / "log").read_text().split(" parameters, ")[-1]
    return int(last_start.split("\nstep ")[1].split("/")[0])


def assert_same_bits(home: Home, one: str, other: str, step: int) -> None:
    """Weights and moments of a step of two runs are equal, bit for bit."""
    found, expected = (tensors(step_directory(home, run, step)) for run in (one, other))
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different


def test_steps_saved_behind_training_are_the_same_bits(home: Home, reference: dict[int, float]) -> None:
    train(home, "behind", LAYOUT, "checkpoint.background=true", "checkpoint.every=1", "run.stop_after=6")
    assert losses(home, "behind") == {step: reference[step] for step in range(1, 7)}
    for step in (3, 6):
        assert_same_bits(home, "behind", "reference", step)


CHAIN = (
    (4, LAYOUT),
    (7, Layout(data=4, zero=1, schedule="gpipe", micro=1)),
    (10, Layout(tensor=4, zero=1)),
    (13, Layout(context=2, pipeline=2, context_kind="ulysses")),
    (15, Layout(tensor=2, pipeline=2, schedule="gpipe", micro=4)),
)


@dataclass(frozen=True)
class Bound:
    """What rounding may do. losses: relative. tensors: of the largest element of each."""

    losses: float
    tensors: float


# fp32: promise 1's bound for losses. fp64: nothing but rounding differs, or its nine more digits would show it.
BOUNDS = {"fp32": Bound(1e-6, 2e-5), "fp64": Bound(1e-14, 1e-12)}


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_a_run_that_moves_between_layouts_has_the_same_losses(
    home: Home, reference: dict[int, float], precision: str
) -> None:
    run, straight, bound = f"moved-{precision}", "reference", BOUNDS[precision]
    if precision == "fp64":
        straight = "reference-fp64"
        train(home, straight, Layout(), "run.stop_after=15", "optim.precision=fp64")
    expected = losses(home, straight)
    histories = set()
    for stop, layout in CHAIN:
        train(home, run, layout, f"run.stop_after={stop}", f"optim.precision={precision}")
        assert sorted(losses(home, run)) == list(range(1, stop + 1))  # each step once
        histories.add((home.path / run / "history.json").read_text())

    errors = {step: abs(loss / expected[step] - 1) for step, loss in losses(home, run).items()}
    print({step: f"{error:.1e}" for step, error in errors.items()})
    assert max(errors.values()) <= bound.losses
    assert len(histories) == 1
    assert len(json.loads(histories.pop())) == 1
    found, wanted = (tensors(step_directory(home, name, 15)) for name in (run, straight))
    assert found.keys() == wanted.keys()
    worst = {
        name: ((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()).item() for name in wanted
    }
    print(max(worst.items(), key=lambda item: item[1]))
    assert max(worst.values()) <= bound.tensors


def test_a_resume_that_forgets_adams_step_count_is_seen(
    home: Home, reference: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(home, "forgetful", Layout(), "run.stop_after=3")
    monkeypatch.setattr(NativeEngine, "load_scalars", lambda self, scalars: None)
    train(home, "forgetful", Layout(), "run.stop_after=6")
    errors = {step: abs(loss / reference[step] - 1) for step, loss in losses(home, "forgetful").items()}
    assert max(errors[step] for step in range(1, 5)) <= 1e-6
    assert errors[6] > 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(data=4, zero=1),
        Layout(tensor=2, data=2, zero=1),
        Layout(pipeline=4),
        Layout(tensor=4),
    ],
    ids=str,
)
def test_load_and_save_in_another_layout_keeps_every_bit(
    home: Home, reference: dict[int, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    monkeypatch.chdir(home.path)
    config = load_config(
        "config.yaml", [*layout.overrides, "run.seed=99"]
    )  # no value is right by initialisation
    saved = step_directory(home, "reference", LAST)

    def work(rank: int, size: int) -> None:
        control = connected(rank, size)
        mesh = build_mesh(wiring.layout_of(config, size), rank)
        model = wiring.build_model(config, mesh, vocab=source.open_source(config).tokenizer.vocab_size)
        engine = wiring.build_engine(config, model, mesh=mesh)
        load(saved, engine.targets(), control=control)
        save(tmp_path, LAST, pieces=engine.state(), objects={}, control=control)

    run_ranks(work, layout.world_size, timeout=120)
    found, expected = tensors(tmp_path / saved.name), tensors(saved)
    assert found.keys() == expected.keys()
    assert {name.split("/")[0] for name in found} == {"model", "optim"}
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_changes_of_batch_and_length_add_rows_and_neither_lose_nor_repeat_a_token(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home.path)
    stretches = [
        (5, Layout(), ["batch.global=8", "data.sequence_length=16"]),
        (8, Layout(data=2, micro=1), ["batch.global=4", "data.sequence_length=32"]),  # two pages a sample
        (12, Layout(), ["batch.global=16", "data.sequence_length=8"]),  # half a page
        (14, Layout(), ["batch.global=16", "data.sequence_length=8"]),  # nothing changes: no row
    ]
    rows = []
    for stop, layout, overrides in stretches:
        train(home, "changed", layout, f"run.stop_after={stop}", *overrides)
        rows.append(json.loads((home.path / "changed" / "history.json").read_text()))
    assert [len(row) for row in rows] == [1, 2, 3, 3]
    assert rows[3] == rows[2]
    assert rows[2][: len(rows[1])] == rows[1]
    assert rows[1][: len(rows[0])] == rows[0]
    assert [row["first_step"] for row in rows[3]] == [1, 6, 9]

    tokens = [record["tokens"] for record in read_metrics(home.path / "changed" / "metrics.jsonl")]
    assert tokens == [128 * step for step in range(1, 15)]
    constant = read_tokens(rows[0], steps=14)
    found = read_tokens(rows[3], steps=14)
    assert len(found) == len(set(found)) == 14 * 128
    assert set(found) == set(constant)


def read_tokens(rows: list[dict[str, object]], *, steps: int) -> list[int]:
    """Places in the corpus of all tokens that steps 1 .. `steps` read, by the config and a history."""
    opened = source.open_source(load_config("config.yaml"))
    sampler = Sampler(opened.train, run_history.from_objects({"history": rows}), seed=7)
    readings = [reading for step in range(1, steps + 1) for reading in sampler.readings(step)]
    return [place for reading in readings for place in range(reading.start, reading.stop)]
