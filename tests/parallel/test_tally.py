"""Counts of layers: once a backward, summed over all ranks, each module its own row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box
from megads.parallel.tally import Tallied, TallyTable, count_once, tallied_in
from tests.ranks import run_ranks


class Counter(Tallied):
    """Counts what it is told, and keeps the sum of all valid steps."""

    def __init__(self, row: int) -> None:
        super().__init__()
        self.row = row
        self.tally = torch.zeros(3, dtype=torch.float64)
        self.total = torch.zeros(3, dtype=torch.float64)

    def forward(self, x: Tensor, columns: Tensor) -> Tensor:
        weights = torch.ones(columns.shape, dtype=torch.float64)
        return count_once(x, self.tally, columns=columns, weights=weights)

    def settle(self, totals: Tensor, *, is_valid: Tensor) -> None:
        self.total += torch.where(is_valid, totals, 0.0)

    def kept(self) -> tuple[Piece, ...]:
        return (Piece(f"router/{self.row}.total", (3,), Box.whole((3,)), self.total),)


def test_a_backward_counts_and_a_forward_does_not() -> None:
    counter, x = Counter(0), torch.ones(2, requires_grad=True)
    y = counter(counter(x, torch.tensor([0, 2, 2])), torch.tensor([1]))
    assert counter.tally.tolist() == [0, 0, 0]
    y.sum().backward()
    assert counter.tally.tolist() == [1, 1, 2]
    assert x.grad is not None and x.grad.tolist() == [1, 1]


def test_modules_are_found_once_in_order_of_their_rows() -> None:
    first, second = Counter(1), Counter(0)
    inside = torch.nn.ModuleList([first, torch.nn.Sequential(second, first)])
    assert tallied_in([inside, first]) == (second, first)


def test_a_module_that_ignores_the_end_of_a_step_is_told() -> None:
    with pytest.raises(TypeError, match="Tallied"):
        Tallied().settle(torch.zeros(1), is_valid=torch.tensor(True))


def test_the_table_is_of_the_whole_model() -> None:
    """Two stages of two data-parallel ranks: stage 0 has rows 0 and 2, stage 1 has row 1."""

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(Layout(pipeline=2, data=2), rank)
        modules = tuple(map(Counter, (0, 2) if mesh.group("pp").rank == 0 else (1,)))
        table = TallyTable(modules, mesh, rows=3, columns=3)
        found = []
        for is_valid in (True, False):
            table.start()
            for module in modules:
                x = torch.ones(1, requires_grad=True)
                module(x, torch.tensor([mesh.group("dp").rank, 2])).backward()
            found.append(table.finish(is_valid=torch.tensor(is_valid)).tolist())
        names = [piece.name for piece in table.primary_pieces()]
        return found, [module.total.tolist() for module in modules], names, len(table.pieces())

    results = run_ranks(work, 4)
    row = [1.0, 1.0, 2.0]
    assert [r[0] for r in results] == [[[row] * 3] * 2] * 4
    assert [r[1] for r in results] == [[row, row], [row, row], [row], [row]]
    assert [r[2] for r in results] == [["router/0.total", "router/2.total"], [], ["router/1.total"], []]
    assert [r[3] for r in results] == [2, 2, 1, 1]
