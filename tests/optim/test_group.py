"""Parameter groups: patterns, precedence, what is refused, and the update against torch's own groups."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megads.config.optim import OptimConfig
from megads.config.update import GroupConfig, MuonConfig
from megads.errors import ConfigError
from megads.optim.group import check_groups, group_of
from megads.optim.zero import NativeEngine
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, ShardedParameter, fill
from megads.parallel.shard import Init, ShardSpec
from tests.ranks import run_ranks

NORMAL = Init("normal", 0.5)
SPECS = {
    "layers.0.mlp.weight": ShardSpec((6, 5), init=NORMAL),
    "layers.0.mlp.bias": ShardSpec((6,), decay=False),
    "layers.1.mlp.weight": ShardSpec((6, 5), init=NORMAL),
    "word.weight": ShardSpec((7, 5), init=NORMAL, role="embedding", tie="word.weight"),
    "router.weight": ShardSpec((4, 5), init=NORMAL, role="router"),
}
CONFIG = OptimConfig(lr=1e-2, eps=1e-6, weight_decay=0.1, clip=None, precision="fp64")


class Toy(torch.nn.Module):
    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.found = torch.nn.ParameterList(scope.parameter(name, spec) for name, spec in SPECS.items())

    def named(self, name: str) -> ShardedParameter:
        return next(p for p in self.found if p.logical_name == f"toy.{name}")  # type: ignore[return-value]


def make(width: float = 1.0) -> Toy:
    toy = Toy(Scope(build_mesh(Layout(), 0), torch.float64, 1, "toy", width=width))
    for parameter in toy.found:
        fill(parameter, seed=1)  # type: ignore[arg-type]
    return toy


def test_equals_torchs_parameter_groups() -> None:
    groups = (
        GroupConfig(match="toy.layers.1.*", lr_scale=0.1, weight_decay=0.3),
        GroupConfig(match="*.bias", weight_decay=0.02),
        GroupConfig(match="*0.mlp*", eps=1e-2),
        GroupConfig(match="word.weight", lr_scale=3.0),
    )
    toy = make()
    mine = {name: toy.named(name).detach().clone().requires_grad_() for name in SPECS}
    reference = torch.optim.AdamW(
        [
            {"params": [mine["layers.0.mlp.weight"]], "eps": 1e-2},
            {"params": [mine["layers.0.mlp.bias"]], "eps": 1e-2, "weight_decay": 0.02},
            {"params": [mine["layers.1.mlp.weight"]], "lr": 1e-3, "weight_decay": 0.3},
            {"params": [mine["word.weight"]], "lr": 3e-2},
            {"params": [mine["router.weight"]]},
        ],
        lr=1e-2,
        betas=CONFIG.betas,
        eps=1e-6,
        weight_decay=0.1,
    )
    engine = NativeEngine(
        {0: torch.nn.ModuleList([toy])}, build_mesh(Layout(), 0), config=replace(CONFIG, groups=groups)
    )
    for step in range(1, 4):
        engine.zero_gradients()
        for number, (name, copy) in enumerate(mine.items()):
            generator = torch.Generator().manual_seed(10 * step + number)
            copy.grad = torch.randn(copy.shape, dtype=torch.float64, generator=generator)
            (toy.named(name) * copy.grad).sum().backward()
        engine.reduce(0)
        engine.step(lr=1e-2)
        reference.step()
    for name, copy in mine.items():
        assert torch.allclose(toy.named(name), copy, rtol=1e-12, atol=1e-14), name


def test_defaults_are_the_declarations() -> None:
    toy = make()
    matrix, vector = (group_of(toy.named(f"layers.0.mlp.{name}"), CONFIG) for name in ("weight", "bias"))
    assert (matrix.kind, matrix.weight_decay, matrix.lr_scale, matrix.eps) == ("adamw", 0.1, 1.0, 1e-6)
    assert vector == replace(matrix, weight_decay=0.0)
    muon = replace(CONFIG, name="muon", muon=MuonConfig(adamw_lr=5e-3))
    kinds = {name: group_of(toy.named(name), muon) for name in SPECS}
    assert {name for name, group in kinds.items() if group.kind == "muon"} == {
        "layers.0.mlp.weight",
        "layers.1.mlp.weight",
    }
    assert {group.lr_scale for group in kinds.values() if group.kind == "adamw"} == {0.5}
    chosen = replace(muon, groups=(GroupConfig(match="*.1.*", optimizer="adamw"),))
    assert group_of(toy.named("layers.1.mlp.weight"), chosen).kind == "adamw"
    assert group_of(toy.named("layers.0.mlp.weight"), chosen).kind == "muon"


def test_the_order_of_groups_does_not_matter() -> None:
    groups = (GroupConfig(match="*.weight", lr_scale=2.0), GroupConfig(match="*.0.*", weight_decay=0.5))
    parameter = make().named("layers.0.mlp.weight")
    found = {
        group_of(parameter, replace(CONFIG, groups=order)) for order in (groups, tuple(reversed(groups)))
    }
    (group,) = found
    assert (group.lr_scale, group.weight_decay) == (2.0, 0.5)


def test_two_groups_for_one_key_are_refused() -> None:
    groups = (GroupConfig(match="*.weight", lr_scale=2.0), GroupConfig(match="*.0.*", lr_scale=2.0))
    with pytest.raises(ConfigError) as caught:
        group_of(make().named("layers.0.mlp.weight"), replace(CONFIG, groups=groups))
    for word in ("lr_scale of toy.layers.0.mlp.weight", "match: *.weight and match: *.0.*"):
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["layers.0.mlp.bias", "word.weight", "router.weight"])
def test_muon_for_what_is_no_hidden_matrix_is_refused(name: str) -> None:
    groups = (GroupConfig(match=f"*{name}", optimizer="muon"),)
    with pytest.raises(ConfigError, match="no hidden matrix"):
        group_of(make().named(name), replace(CONFIG, name="muon", groups=groups))


def test_a_pattern_that_matches_nothing_on_any_rank_is_refused() -> None:
    names = ("layers.0.mlp.weight", "layers.1.mlp.weight")

    def check(rank: int, size: int, match: str) -> str:
        mesh = build_mesh(Layout(pipeline=2), rank)
        scope = Scope(mesh, torch.float64, 1, "toy")
        parameter = scope.parameter(names[rank], SPECS[names[rank]])
        try:
            check_groups([parameter], mesh, config=replace(CONFIG, groups=(GroupConfig(match=match),)))
        except ConfigError as error:
            return str(error)
        return ""

    assert run_ranks(lambda rank, size: check(rank, size, "*.1.*"), 2) == ["", ""]
    for said in run_ranks(lambda rank, size: check(rank, size, "*.1.mpl.*"), 2):
        assert "a pattern matches no parameter" in said and "*.1.mpl.*" in said


def test_width_scales_as_table_8() -> None:
    """Learning rates and decays are those of the authors' MuAdamW: hidden / m and x m, the rest as it is."""
    base, wide = make(), make(width=4.0)
    rows = {
        "layers.0.mlp.weight": (0.5, 0.25, 4.0, 0.25),
        "layers.0.mlp.bias": (1.0, 1.0, 1.0, 0.25),
        "word.weight": (1.0, 1.0, 1.0, 0.25),
        "router.weight": (0.25, 0.25, 4.0, 1.0),
    }
    for name, (init, lr, decay, eps) in rows.items():
        narrow, group = group_of(base.named(name), CONFIG), group_of(wide.named(name), CONFIG)
        assert group.lr_scale == lr * narrow.lr_scale
        assert group.weight_decay == decay * narrow.weight_decay
        assert group.eps == pytest.approx(eps * narrow.eps)
        assert torch.allclose(wide.named(name), init * base.named(name), rtol=1e-12)
    muon = replace(CONFIG, name="muon")
    matrix = "layers.0.mlp.weight"
    assert group_of(wide.named(matrix), muon) == group_of(base.named(matrix), muon)
