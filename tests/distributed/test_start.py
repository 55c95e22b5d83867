"""A fresh run from the weights of another: all, another vocabulary, missing and surplus parts, other layouts."""

from __future__ import annotations

import pytest
import torch

import megads.checkpoint
from tests.distributed.bench import Bench, assert_refused
from tests.distributed.job import Ended, Layout, command, losses, step_directory, tensors, train

STILL = (
    "optim.lr=1e-30",
    "optim.min_lr=0",
    "optim.weight_decay=0",
    "optim.warmup_steps=0",
    "run.stop_after=1",
)


def start(bench: Bench, layout: Layout, *overrides: str) -> dict[str, torch.Tensor]:
    """Weights after a step that moves nothing, from those of `run`."""
    train(bench, "new", layout, "checkpoint.start=run", *STILL, *overrides)
    return {n: t for n, t in tensors(step_directory(bench, "new", 1)).items() if n.startswith("model/")}


def refused(bench: Bench, *overrides: str) -> Ended:
    """The end of a run that may not start from `run`."""
    return command(bench.path, "train", "config.yaml", "run.dir=no", "checkpoint.start=run", *overrides)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2), Layout(data=2)])
def test_all_weights_and_nothing_else(bench: Bench, layout: Layout) -> None:
    found, given = start(bench, layout), megads.checkpoint.open(bench.path / "run")
    assert found.keys() == {name for name in given if name.startswith("model/")}
    assert all(torch.equal(found[name], given[name]) for name in found)
    saved = megads.checkpoint.open(bench.path / "new")
    assert saved.step == 1 and saved.objects["optim"]["step"] == 1


def test_averages_begin_with_the_weights_that_the_run_starts_from(bench: Bench) -> None:
    train(bench, "new", Layout(), "checkpoint.start=run", *STILL, "optim.ema=[0.999]")
    found, given = tensors(step_directory(bench, "new", 1)), megads.checkpoint.open(bench.path / "run")
    names = [name.removeprefix("ema_0.999/") for name in found if name.startswith("ema_0.999/")]
    assert names and all(torch.equal(found[f"ema_0.999/{n}"], given[f"model/{n}"]) for n in names)


def test_a_run_that_has_steps_goes_on_from_them(bench: Bench) -> None:
    line = ("train", "config.yaml", "run.dir=new", "checkpoint.start=run", *STILL[:-1])
    first, second = (command(bench.path, *line, f"run.stop_after={last}") for last in (1, 3))
    assert first.code == second.code == 0
    assert "starts from the weights of run/checkpoints/step-00000003" in first.said + first.errors
    assert "starts from the weights" not in second.said + second.errors
    assert sorted(losses(bench, "new")) == [1, 2, 3]
    (bench.path / "new" / "history.json").write_text("{")
    assert_refused(command(bench.path, *line, "run.stop_after=4"), "history.json: not readable", "remove it")


def test_another_vocabulary_takes_the_rows_that_both_have(bench: Bench) -> None:
    vocab = 450  # 401 in `run`
    assert_refused(refused(bench, f"model.vocab={vocab}"), "model/embedding.word.weight", "401x32", "450x32")
    train(bench, "fresh", Layout(), *STILL, f"model.vocab={vocab}")
    fresh = tensors(step_directory(bench, "fresh", 1))
    found = start(bench, Layout(tensor=2), f"model.vocab={vocab}", "checkpoint.start_other_vocab=true")
    given = megads.checkpoint.open(bench.path / "run")["model/embedding.word.weight"]
    table = found["model/embedding.word.weight"]
    assert torch.equal(table[:401], given)
    assert torch.equal(table[401:], fresh["model/embedding.word.weight"][401:]) and table[401:].any()


def test_parts_that_are_missing_or_left_are_named_by_the_user(bench: Bench) -> None:
    """An untied head is missing in a tied model's weights; a layer less leaves one."""
    untied = ("model.tied=false", "model.layers=2")
    assert_refused(refused(bench, *untied), "model/head.output.weight", "model/layers.2.")
    found = start(
        bench,
        Layout(pipeline=2),
        *untied,
        "checkpoint.start_missing=[head.output.*]",
        "checkpoint.start_unused=[layers.2.]",
    )
    given = megads.checkpoint.open(bench.path / "run")
    assert "model/head.output.weight" in found and "model/layers.2.mlp.up.weight" not in found
    same = [name for name in found if name != "model/head.output.weight"]
    assert same and all(torch.equal(found[name], given[name]) for name in same)
