"""Muon on cut matrices against `torch.optim.Muon` on whole ones, whatever cuts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megads.config.optim import OptimConfig
from megads.config.update import MuonConfig
from megads.optim.orthogonal import orthogonalised
from megads.optim.zero import NativeEngine
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, ShardedParameter, fill, parameter_table
from megads.parallel.shard import Cut, Init, ShardSpec
from tests.ranks import run_ranks

LR = 1e-2
STEPS = 3
NORMAL = Init("normal", 1.0)
SPECS = {
    "fused.weight": ShardSpec((16, 6), (Cut(0, "tp", (8, 4, 4)),), NORMAL),
    "row.weight": ShardSpec((6, 8), (Cut(1, "tp"),), NORMAL),
    "whole.weight": ShardSpec((10, 7), init=NORMAL, partial=("tp",)),
    "experts.weight": ShardSpec((4, 8, 5), (Cut(0, "ep"), Cut(1, "etp", (4, 4))), NORMAL),
    "vector": ShardSpec((5,), init=Init("ones"), decay=False),
    "word.weight": ShardSpec((11, 4), (Cut(0, "tp", pad=True),), NORMAL, role="embedding"),
    "router.weight": ShardSpec((4, 6), init=NORMAL, role="router"),
}
CONFIG = OptimConfig(name="muon", lr=LR, clip=None, precision="fp64", bucket_elements=90)


class Toy(torch.nn.Module):
    """One parameter of every kind."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.found = torch.nn.ParameterList(scope.parameter(name, spec) for name, spec in SPECS.items())


def gradient_of(name: str, step: int, dtype: torch.dtype) -> torch.Tensor:
    """The whole gradient; of full rank."""
    generator = torch.Generator().manual_seed(1000 * step + sorted(SPECS).index(name))
    return torch.randn(SPECS[name].shape, dtype=torch.float64, generator=generator).to(dtype)


def local_part(parameter: ShardedParameter, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor."""
    part = torch.zeros_like(parameter)
    for region in parameter.regions:
        part[region.local.slices] = whole[region.source.slices]
    return part


def trained(layout: Layout, config: OptimConfig, steps: range, *, load: Any = None) -> list[dict[str, Any]]:
    """Weights and moments after the steps, by rank: (name, box) -> values."""

    def work(rank: int, size: int) -> dict[str, Any]:
        mesh = build_mesh(layout, rank)
        dtype = torch.float64 if config.precision == "fp64" else torch.float32
        toy = Toy(Scope(mesh, dtype, 1, "toy"))
        for parameter in parameter_table([toy]):
            fill(parameter, seed=1)
        engine = NativeEngine({0: torch.nn.ModuleList([toy])}, mesh, config=config)
        if load is not None:
            pieces, scalars = load
            for piece in engine.targets():
                piece.tensor.copy_(pieces[piece.name][piece.box.slices])
            engine.load_scalars(scalars)
        for step in steps:
            engine.zero_gradients()
            for parameter in parameter_table([toy]):
                name = parameter.logical_name.removeprefix("toy.")
                whole = gradient_of(name, step, dtype)
                summands = mesh.group(parameter.spec.reduction).size
                for axis in parameter.spec.partial:
                    summands *= mesh.group(axis).size
                (parameter * (local_part(parameter, whole) / summands)).sum().backward()
            engine.reduce(0)
            engine.step(lr=LR)
        engine.targets()  # waits until every rank has all weights
        return {
            "pieces": [(p.name, p.box, p.shape, p.tensor.clone()) for p in engine.state()],
            "local": {p.logical_name: p.detach().clone() for p in parameter_table([toy])},
            "scalars": engine.scalars(),
        }

    return run_ranks(work, layout.world_size)


def assembled(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for rank in found:
        for name, box, shape, values in rank["pieces"]:
            whole.setdefault(name, torch.full(shape, float("nan"), dtype=values.dtype))[box.slices] = values
    return whole


def split(name: str, whole: torch.Tensor) -> list[torch.Tensor]:
    """The matrices of a parameter, by hand."""
    if name == "fused.weight":
        return list(whole.split((8, 4, 4)))
    if name == "experts.weight":
        return [part for expert in whole for part in expert.split((4, 4))]
    return [whole]


def reference(config: OptimConfig, steps: range) -> dict[str, torch.Tensor]:
    """The same by torch's optimizers on whole matrices, with Newton-Schulz in their dtype."""
    (start,) = trained(Layout(), config, range(0))
    weights = {
        n.removeprefix("model/toy."): v.clone() for n, v in assembled([start]).items() if "model/" in n
    }
    matrices = {
        n: [part.clone().contiguous() for part in split(n, weights[n])]
        for n in ("fused.weight", "row.weight", "whole.weight", "experts.weight")
    }
    muon = torch.optim.Muon(
        [torch.nn.Parameter(m) for parts in matrices.values() for m in parts],
        lr=LR,
        weight_decay=config.weight_decay,
        momentum=config.muon.momentum,
        nesterov=config.muon.nesterov,
        adjust_lr_fn=config.muon.scale,
    )
    rest = {n: torch.nn.Parameter(weights[n]) for n in ("vector", "word.weight", "router.weight")}
    groups = [
        {"params": [rest["vector"]], "weight_decay": 0.0},
        {"params": [rest["word.weight"], rest["router.weight"]], "weight_decay": config.weight_decay},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, betas=config.betas, eps=config.eps)
    for step in steps:
        parameters = iter(muon.param_groups[0]["params"])
        for name in matrices:
            for part in split(name, gradient_of(name, step, weights[name].dtype)):
                next(parameters).grad = part.contiguous()
        for name, parameter in rest.items():
            parameter.grad = gradient_of(name, step, parameter.dtype)
        muon.step()
        adamw.step()
    done = iter(p.detach() for p in muon.param_groups[0]["params"])
    found = {n: p.detach() for n, p in rest.items()}
    for name, parts in matrices.items():
        mine = [next(done) for _ in parts]
        if name == "experts.weight":
            found[name] = torch.stack([torch.cat(mine[i : i + 2]) for i in range(0, 8, 2)])
        else:
            found[name] = torch.cat(mine)
    return found


@pytest.fixture
def wide_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's Muon runs its iteration in bfloat16 always; here in the dtype of the gradient."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    yield


LAYOUTS = [
    (Layout(), 0),
    (Layout(data=3), 1),
    (Layout(tensor=2, data=2), 0),
    (Layout(tensor=2, data=2), 1),
    (Layout(tensor=2, data=2), 2),
    (Layout(data=2, expert=2), 1),
    (Layout(tensor=2, data=2, expert=2), 1),
    (Layout(tensor=2, data=2, expert=4, expert_tensor=1), 2),
    (Layout(data=4, shard=2), 1),
]


@pytest.mark.parametrize(("layout", "zero"), LAYOUTS, ids=str)
def test_equals_torch_on_whole_matrices(layout: Layout, zero: int, wide_torch: None) -> None:
    config = replace(CONFIG, zero_stage=zero)
    expected = reference(config, range(1, STEPS + 1))
    found = trained(layout, config, range(1, STEPS + 1))
    whole = assembled(found)
    for name, value in expected.items():
        error = (whole[f"model/toy.{name}"] - value).abs().max() / value.abs().max()
        assert error < 1e-12, (name, float(error))
    kinds = {name.rpartition("/")[0] for name in whole if name.endswith("row.weight")}
    assert kinds == {"model", "optim/momentum"}
    for name in ("whole.weight", "vector"):  # copies on all ranks
        first, *others = (rank["local"][f"toy.{name}"] for rank in found)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(
    "muon", [MuonConfig(nesterov=False), MuonConfig(scale="original"), MuonConfig(momentum=0.8)], ids=str
)
def test_options_are_torchs(muon: MuonConfig, wide_torch: None) -> None:
    config = replace(CONFIG, muon=muon, precision="fp32", zero_stage=1)
    expected = reference(config, range(1, STEPS + 1))
    whole = assembled(trained(Layout(tensor=2), config, range(1, STEPS + 1)))
    for name, value in expected.items():
        error = (whole[f"model/toy.{name}"] - value).abs().max() / value.abs().max()
        assert error < 1e-5, (name, float(error))


def test_resumes_bit_for_bit() -> None:
    config = replace(CONFIG, zero_stage=1)
    layout = Layout(data=2)
    straight = assembled(trained(layout, config, range(1, 5)))
    half = trained(layout, config, range(1, 3))
    resumed = trained(layout, config, range(3, 5), load=(assembled(half), half[0]["scalars"]))
    again = assembled(resumed)
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    mesh = build_mesh(Layout(), 0)
    toy = Toy(Scope(mesh, torch.float64, 1, "toy"))
    for parameter in parameter_table([toy]):
        fill(parameter, seed=1)
    engine = NativeEngine({0: torch.nn.ModuleList([toy])}, mesh, config=CONFIG)

    def step(value: float) -> bool:
        engine.zero_gradients()
        for number, parameter in enumerate(toy.found, 1):
            parameter.grad.copy_(torch.linspace(0.1, number, parameter.numel()).view_as(parameter))
        toy.found[1].grad[2, 3] = value
        return bool(engine.step(lr=LR).finite)

    assert step(0.5)
    before = [p.tensor.clone() for p in engine.state()]
    assert not step(float("nan"))
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, engine.state(), strict=True))
    assert step(0.5)
    assert not torch.equal(before[0], engine.state()[0].tensor)


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(3)
    stack = torch.randn(3, 24, 40, dtype=torch.float64, generator=generator)
    for coefficients, steps, low, high in (("quintic", 5, 0.5, 1.3), ("deepseek_v4", 8, 0.999, 1.001)):
        for matrices in (stack, stack.mT):
            made = orthogonalised(matrices, steps=steps, coefficients=coefficients)
            values = torch.linalg.svdvals(made)
            assert low < values.min() and values.max() < high
    u, _, v = torch.linalg.svd(stack, full_matrices=False)
    assert torch.allclose(orthogonalised(stack, steps=8, coefficients="deepseek_v4"), u @ v, atol=1e-3)
