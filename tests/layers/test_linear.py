"""Linear layers under sequence parallelism, whole or in pieces: the numbers of one process, and every call counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megads.layers import linear
from megads.layers.linear import ColumnParallelLinear, RowParallelLinear
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill
from tests.ranks import run_ranks

SEQ, BATCH, HIDDEN, FFN = 20, 3, 8, 12


class Layers(torch.nn.Module):
    """x -> row(tanh(column(x)))."""

    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.column = ColumnParallelLinear(
            scope.child("column"), HIDDEN, blocks=(FFN,), init_std=0.5, has_bias=True
        )
        self.row = RowParallelLinear(scope.child("row"), FFN, HIDDEN, init_std=0.5, has_bias=False)
        for parameter in (self.column.weight, self.row.weight):
            fill(parameter, seed=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.row(torch.tanh(self.column(x)))
        return y


def run(size: int, *, pieces: int = 1, sequence: bool = True, defers: bool = False) -> list[Any]:
    """Of each rank: its part of the output, of dx, and of both weight gradients; calls by name and phase."""

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(Layout(tensor=size), rank)
        scope = Scope(mesh, torch.float64, 3, "test", sequence_parallel=sequence, sequence_pieces=pieces)
        layers = Layers(scope)
        calls: list[str] = []
        for name in ("start_gather_sequence", "start_scatter_sequence", "start_all_reduce"):
            started = getattr(linear, name)
            setattr(linear, name, lambda x, group, n=name, s=started: calls.append(n) or s(x, group))
        generator = torch.Generator().manual_seed(1)
        x, dy = torch.randn(2, SEQ, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
        if sequence:
            x, dy = x.chunk(size)[rank].clone(), dy.chunk(size)[rank].clone()
        x.requires_grad_()
        counts = []
        y = layers(x)
        counts.append(len(calls))
        if defers:
            with scope.queue.deferring(0, 0):
                y.backward(dy)
            counts.append(len(calls))
            scope.queue.run(0, 0)
        else:
            y.backward(dy)
        counts.append(len(calls))
        return y.detach(), x.grad, layers.column.weight.grad, layers.row.weight.grad, counts

    return run_ranks(work, size)


def together(results: list[Any], *, sequence: bool) -> tuple[torch.Tensor, ...]:
    """The global tensors."""
    y, dx = (torch.cat([r[i] for r in results]) if sequence else results[0][i] for i in (0, 1))
    return y, dx, torch.cat([r[2] for r in results]), torch.cat([r[3] for r in results], dim=1)


@pytest.fixture(scope="module")
def reference() -> tuple[torch.Tensor, ...]:
    return together(run(1), sequence=True)


@pytest.mark.parametrize("defers", [False, True])
@pytest.mark.parametrize(
    ("size", "pieces", "sequence"), [(2, 1, False), (2, 1, True), (2, 3, True), (4, 2, True), (2, 100, True)]
)
def test_numbers_of_one_process(
    size: int, pieces: int, sequence: bool, defers: bool, reference: tuple[torch.Tensor, ...]
) -> None:
    results = run(size, pieces=pieces, sequence=sequence, defers=defers)
    for found, wanted in zip(together(results, sequence=sequence), reference, strict=True):
        assert (found - wanted).norm() <= 1e-14 * wanted.norm()


@pytest.mark.parametrize(
    ("pieces", "defers", "expected"),
    [
        (1, False, [2, 5]),  # forward: gather, scatter; backward: gather dy, gather x, scatter dx
        (3, False, [6, 11]),  # the forward's both and the scatter of dx in three pieces
        (1, True, [2, 4, 6]),  # W gathers x, and dy again
        (3, True, [6, 10, 12]),
    ],
)
def test_collectives_are_counted(pieces: int, defers: bool, expected: list[int]) -> None:
    assert all(result[4] == expected for result in run(2, pieces=pieces, defers=defers))
