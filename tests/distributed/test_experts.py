"""A whole job with experts: trained, resumed under another layout, evaluated and continued at layouts of their own."""

from __future__ import annotations

import json

import pytest
import torch

from megads.log import read_metrics
from tests.distributed.job import Home, Layout, commands, losses, step_directory, tensors, train

MODEL = (
    "model.family=llama",
    "model.dropout=0",
    "model.attention_dropout=0",
    "model.ffn=48",
    "model.experts=8",
    "model.expert_ffn=16",
    "model.shared_experts=1",
    "model.dense_layers=1",
    "model.router=sigmoid",
    "model.renormalise=true",
    "model.balance=bias",
    "model.balance_weight=0.01",
    "model.bias_rate=0.05",
    "model.z_loss=0.001",
    "model.init_std=0.1",
    "optim.precision=fp64",
)
EXPERTS = ("parallel.expert=2", "parallel.expert_tensor=1")


@pytest.fixture(scope="module")
def resumed(home: Home) -> Home:
    """`whole`: six steps of one process. `moved`: three on one grid of experts, and the rest on another."""
    train(home, "whole", Layout(), *MODEL, "run.stop_after=6")
    train(home, "moved", Layout(tensor=2, zero=1), *MODEL, *EXPERTS, "run.stop_after=3")
    train(home, "moved", Layout(pipeline=2), *MODEL, "run.stop_after=6")
    return home


def test_a_run_with_experts_goes_on_elsewhere(resumed: Home) -> None:
    whole, moved = losses(resumed, "whole"), losses(resumed, "moved")
    assert list(moved) == [1, 2, 3, 4, 5, 6]
    assert list(moved.values()) == pytest.approx(list(whole.values()), rel=1e-12)
    mine, other = (tensors(step_directory(resumed, run, 6)) for run in ("moved", "whole"))
    assert mine.keys() == other.keys()
    bias = "model/layers.2.mlp.router.bias"
    assert torch.equal(mine[bias], other[bias]) and mine[bias].abs().max() >= 0.1


def test_metrics_tell_the_load_of_each_layer(resumed: Home) -> None:
    whole, moved = (read_metrics(resumed.path / run / "metrics.jsonl") for run in ("whole", "moved"))
    for one, other in zip(whole, moved, strict=True):
        loads = [key for key in one if key.startswith("layers.")]
        assert loads == [f"layers.{n}/load_{end}" for n in (1, 2) for end in ("max", "min")]
        assert all(one[key] == other[key] for key in loads)
        assert all(one[f"layers.{n}/load_min"] < 1 < one[f"layers.{n}/load_max"] for n in (1, 2))
        for key in ("balance_loss", "z_loss"):
            assert one[key] == pytest.approx(other[key], rel=1e-12)


def test_evaluation_and_generation_take_the_bias_from_the_checkpoint(resumed: Home) -> None:
    said = []
    for degrees in ([], ["parallel.expert=2"], [*EXPERTS, "parallel.tensor=2"]):
        argv = ["evaluate", "whole", "--data", "data/valid", "--json", *degrees]
        first, *_ = commands(*[(resumed.path, argv)] * (2 if degrees else 1))
        assert first.code == 0, first.errors
        said.append(json.loads(first.said)["loss"])
    assert said == pytest.approx([said[0]] * 3, rel=1e-12)
    argv = ["generate", "whole", "--prompt", "def main(", "--tokens", "5", "--temperature", "0"]
    one, (two, _) = (
        commands((resumed.path, argv))[0],
        commands(*[(resumed.path, [*argv, *EXPERTS, "parallel.tensor=2"])] * 2),
    )
    assert one.code == two.code == 0, two.errors
    assert one.said == two.said
