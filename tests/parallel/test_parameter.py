"""Parameters: declaration, pieces as an exact cover, ties."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megads.parallel.layout import Layout
from megads.parallel.mesh import Group, Mesh, build_mesh
from megads.parallel.parameter import Scope, describe_table, fill, parameter_table, pieces
from megads.parallel.shard import Cut, Init, ShardSpec


def mesh_of(tp_rank: int, tp_size: int) -> Mesh:
    """A mesh as rank `tp_rank` of `tp_size` sees it; it cannot communicate."""
    layout = Layout(tensor=tp_size)
    groups = {axis: Group((0,), 0) for axis in build_mesh(Layout(), 0).groups}
    groups["tp"] = Group(tuple(range(tp_size)), tp_rank)
    return Mesh(layout, tp_rank, torch.device("cpu"), groups)


SPECS = (
    ShardSpec((8, 6), (Cut(0, "tp", blocks=(4, 2, 2)),), Init("normal", 0.5)),
    ShardSpec((8, 6), (Cut(1, "tp"),), Init("normal", 0.5)),
    ShardSpec((7, 3), (Cut(0, "tp", pad=True),), Init("normal", 0.5)),
    ShardSpec((5,), (), Init("ones")),
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.shape))
@pytest.mark.parametrize("num_slices", [1, 3])
def test_pieces_of_all_ranks_and_slices_are_the_whole(spec: ShardSpec, num_slices: int) -> None:
    (whole,) = (Scope(mesh_of(0, 1), torch.float64, 7, "p").parameter("w", spec),)
    fill(whole, seed=7)
    found = torch.full(spec.shape, float("nan"), dtype=torch.float64)
    count = torch.zeros(spec.shape)
    for tp_rank in range(2):
        local = Scope(mesh_of(tp_rank, 2), torch.float64, 7, "p").parameter("w", spec)
        fill(local, seed=7)
        edges = [local.numel() * i // num_slices for i in range(num_slices + 1)]
        for start, stop in pairwise(edges):
            for piece in pieces(local, local.detach().view(-1)[start:stop], kind="model", start=start):
                assert (piece.name, piece.shape) == ("model/p.w", spec.shape)
                found[piece.box.slices] = piece.tensor
                count[piece.box.slices] += 1
    assert torch.equal(found, whole)
    assert bool((count == (1 if spec.cuts else 2)).all())


def test_pieces_are_views_that_loading_fills() -> None:
    local = Scope(mesh_of(1, 2), torch.float32, 7, "p").parameter("w", SPECS[0])
    for piece in pieces(local, local.detach().view(-1), kind="model"):
        piece.tensor.fill_(3.0)
    assert bool((local == 3.0).all())


def test_padding_is_zero() -> None:
    local = Scope(mesh_of(1, 2), torch.float32, 7, "p").parameter("w", SPECS[2])
    fill(local, seed=7)
    assert local.shape == (4, 3)
    assert bool((local[3] == 0).all()) and bool((local[:3] != 0).all())


def test_tied_parameters_of_one_process_are_one_object() -> None:
    scope = Scope(mesh_of(0, 1), torch.float32, 7)
    spec = ShardSpec((7, 3), tie="a.w")
    first, second = scope.child("a").parameter("w", spec), scope.child("b").parameter("w", spec)
    assert first is second
    elsewhere = Scope(mesh_of(0, 1), torch.float32, 7).child("b").parameter("w", spec)
    fill(first, seed=1)
    fill(elsewhere, seed=1)
    assert torch.equal(first, elsewhere)


def test_undeclared_parameters_are_refused_and_the_table_is_text() -> None:
    with pytest.raises(TypeError, match="Linear"):
        parameter_table([torch.nn.Linear(2, 2)])
    parameter = Scope(mesh_of(0, 1), torch.float32, 7, "p").parameter("w", SPECS[0])
    assert describe_table([parameter]) == "p.w  8x6  tp@0[4+2+2]  normal(0.5)  decay\n"
