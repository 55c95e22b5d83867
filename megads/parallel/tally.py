"""What layers count during a step, summed once over all ranks, and the state that moves by it without a gradient.

    backward of each micro-batch   tally += counts of this rank's tokens       (a recomputed forward counts nothing,
                                                                                an evaluation neither)
    end of the step                table[row of each] = tally, summed over the world: one collective for all layers
                                   settle(row): state moves by the global counts

Counting in the backward is what makes it once a token: it runs once, however often the forward did. Nothing visits
the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Piece


class Tallied(torch.nn.Module):
    """A module that counts. Ranks of a pipeline stage hold the same one, each with its own tokens.

    Attributes:
        row: which of the model's counting modules it is.
        tally: [columns] float64, counted on this rank since the step began.
    """

    row: int
    tally: Tensor

    def settle(self, totals: Tensor, *, is_valid: Tensor) -> None:
        """The step is over.

        Args:
            totals: [columns], the tallies of all ranks.
            is_valid: bool scalar; False: the step changes nothing.
        """
        raise TypeError(f"{type(self).__name__} says nothing of the end of a step")

    def kept(self) -> tuple[Piece, ...]:
        """State of the module that a checkpoint holds, whole on every rank that has the module."""
        return ()


class _Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: Tensor, weights: Tensor, tally: Tensor) -> Tensor:
        ctx.save_for_backward(columns, weights)
        ctx.tally = tally  # an attribute: under recompute a saved tensor comes back as another object
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        columns, weights = ctx.saved_tensors
        ctx.tally.scatter_add_(0, columns, weights)
        return gradients[0], None, None, None


def count_once(x: Tensor, tally: Tensor, *, columns: Tensor, weights: Tensor) -> Tensor:
    """`x` itself; when its gradient comes, tally[columns] += weights.

    Args:
        columns: [n] int64.
        weights: [n], of tally's dtype.
    """
    return _Count.apply(x, columns, weights, tally)  # type: ignore[no-untyped-call,no-any-return]


def tallied_in(modules: Iterable[torch.nn.Module]) -> tuple[Tallied, ...]:
    """The modules that count, each once."""
    found = {m for module in modules for m in module.modules() if isinstance(m, Tallied)}
    return tuple(sorted(found, key=lambda m: m.row))


@dataclass(frozen=True, slots=True)
class TallyTable:
    """This rank's counting modules and the shape of the whole model's table.

    Attributes:
        modules: those of this rank's stages.
        rows, columns: of the table, the same on every rank.
    """

    modules: tuple[Tallied, ...]
    mesh: Mesh
    rows: int
    columns: int

    def start(self) -> None:
        """Begin a step."""
        for module in self.modules:
            module.tally.zero_()

    def finish(self, *, is_valid: Tensor) -> Tensor:
        """End a step: sum over all ranks and let every module settle. All ranks call it.

        Returns:
            [rows, columns] float64, the same on every rank.
        """
        table = torch.zeros(self.rows, self.columns, dtype=torch.float64, device=self.mesh.device)
        for module in self.modules:
            table[module.row] = module.tally
        if self.rows:
            all_reduce_(table, self.mesh.group("world"))
        for module in self.modules:
            module.settle(table[module.row], is_valid=is_valid)
        return table

    def pieces(self) -> tuple[Piece, ...]:
        """All state that is kept: what this rank loads."""
        return tuple(piece for module in self.modules for piece in module.kept())

    def primary_pieces(self) -> tuple[Piece, ...]:
        """What this rank saves: over all ranks everything once."""
        is_first = all(self.mesh.group(axis).rank == 0 for axis in ("tp", "dp_cp"))
        return self.pieces() if is_first else ()
