"""Initial weights: the same bits under every layout, and the distribution that the declaration says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megads.assemble.wiring import build_engine, build_model, layout_of
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill
from megads.parallel.shard import Init, ShardSpec
from tests.parity.harness import VOCAB, Case, Model, assemble, make_config
from tests.ranks import run_ranks

MODELS = tuple(Model(family, tied=tied) for family in ("gpt", "llama") for tied in (True, False))
LAYOUTS = (
    Case(tensor=2),
    Case(data=2, zero=1),
    Case(pipeline=2, schedule="gpipe"),
    Case(tensor=4),
    Case(pipeline=4),
    Case(pipeline=4, schedule="gpipe", micro=4),
    Case(data=4, zero=1, bucket=5000),
    Case(tensor=2, pipeline=2),
    Case(tensor=2, data=2, zero=1),
    Case(pipeline=2, data=2, micro=2),
    Case(tensor=4, pipeline=2),
    Case(tensor=2, pipeline=4),
    Case(tensor=2, pipeline=2, data=2, zero=1),
    Case(pipeline=5),
)


def initial_weights(case: Case) -> list[dict[str, torch.Tensor]]:
    """The global initial weights of every model in MODELS under one layout."""

    def work(rank: int, size: int) -> Any:
        configs = [make_config(model, case, precision="fp32") for model in MODELS]
        mesh = build_mesh(layout_of(configs[0], size), rank)
        found = []
        for config in configs:
            engine = build_engine(config, build_model(config, mesh, vocab=VOCAB), mesh=mesh)
            found.append([(p.name, p.shape, p.box.slices, p.tensor.clone()) for p in engine.state()])
        return found

    results = run_ranks(work, case.world_size)
    whole = [assemble([r[i] for r in results]) for i in range(len(MODELS))]
    return [{n: v for n, v in w.items() if n.startswith("model/")} for w in whole]


@pytest.fixture(scope="module")
def reference() -> list[dict[str, torch.Tensor]]:
    return initial_weights(Case())


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_bits_are_the_same_under_every_layout(case: Case, reference: list[dict[str, torch.Tensor]]) -> None:
    for model, expected, got in zip(MODELS, reference, initial_weights(case), strict=True):
        assert expected.keys() == got.keys()
        different = [name for name in expected if not torch.equal(expected[name], got[name])]
        assert not different, f"{model}: {different}"


def test_names_are_logical_and_all_there(reference: list[dict[str, torch.Tensor]]) -> None:
    tied, untied = reference[0], reference[1]
    assert untied.keys() - tied.keys() == {"model/head.output.weight"}
    assert tied["model/embedding.word.weight"].shape == (VOCAB, 64)
    assert {name.split(".")[1] for name in tied if name.startswith("model/layers.")} == set("012")


def _weight(name: str, *, std: float, shape: tuple[int, ...]) -> torch.Tensor:
    mesh = build_mesh(Layout(), 0)
    parameter = Scope(mesh, torch.float32, 1234, name).parameter(
        "weight", ShardSpec(shape, init=Init("normal", std))
    )
    fill(parameter, seed=1234)
    return parameter.detach()


def test_distribution_is_that_of_the_declaration() -> None:
    values = _weight("layers.3.mlp.up", std=0.02, shape=(512, 1024)).double() / 0.02
    n = values.numel()
    assert abs(values.mean().item()) < 4 / n**0.5
    assert abs(values.std().item() - 1) < 4 / (2 * n) ** 0.5
    ordered = values.flatten().sort().values
    normal = torch.special.ndtr(ordered)
    steps = torch.arange(n, dtype=torch.float64) / n
    distance = torch.maximum((normal - steps).abs(), (normal - steps - 1 / n).abs()).max().item()
    assert distance < 1.63 / n**0.5  # Kolmogorov-Smirnov, 1%


def test_streams_of_different_names_differ() -> None:
    a = _weight("layers.0.mlp.up", std=1.0, shape=(256, 256)).flatten()
    b = _weight("layers.1.mlp.up", std=1.0, shape=(256, 256)).flatten()
    correlation = torch.corrcoef(torch.stack((a, b)))[0, 1].item()
    assert abs(correlation) < 4 / a.numel() ** 0.5
