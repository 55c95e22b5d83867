"""The feed-forward layer as a mixture of experts: router, experts, and a shared MLP that every token passes.

    x --+--share of tokens--> router --> experts --> join--+--> y
        +-------------------- shared MLP ------------------+

Tensor-parallel ranks hold the same tokens, or with sequence parallelism a part of them; either way each token is routed
by one rank, so nothing is counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.experts import Experts
from megads.layers.mlp import SwiGLUMLP
from megads.layers.router import MoESpec, Router, Routing, TokenPlaces
from megads.parallel.parameter import Scope
from megads.parallel.tokens import join_shares, take_share


@dataclass(frozen=True, slots=True)
class MoEOutput:
    """What the layer makes.

    Attributes:
        hidden: as the input.
        balance_loss, z_loss: sums over this rank's tokens, which no other rank has; None: the model has none.
        num_tokens: how many they are.
    """

    hidden: Tensor
    balance_loss: Tensor | None
    z_loss: Tensor | None
    num_tokens: int


class MixtureOfExperts(torch.nn.Module):
    """[seq, batch, hidden], or [seq / n, batch, hidden] with sequence parallelism -> the same.

    Args:
        row: number of the layer among those with experts.
        init_std, output_std: deviation of the initial input and output weights.
        keeps_activation: whether the activation's output is kept for the backward, or made again.
    """

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        spec: MoESpec,
        *,
        row: int,
        init_std: float,
        output_std: float,
        keeps_activation: bool = True,
    ) -> None:
        super().__init__()
        self._mesh = scope.mesh
        self._is_cut = scope.sequence_parallel
        self.router = Router(scope.child("router"), hidden, spec, row=row, init_std=init_std)
        self.experts = Experts(
            scope.child("experts"),
            hidden,
            spec,
            init_std=init_std,
            output_std=output_std,
            keeps_activation=keeps_activation,
        )
        self.shared = (
            SwiGLUMLP(
                scope.child("shared"),
                hidden,
                spec.shared_ffn,
                init_std=init_std,
                output_std=output_std,
                has_bias=False,
                keeps_activation=keeps_activation,
            )
            if spec.shared_ffn
            else None
        )

    def forward(self, x: Tensor, batch: Batch) -> MoEOutput:
        places = TokenPlaces.of(batch, self._mesh)
        tokens = x.flatten(0, 1)  # [t, hidden]
        mine = tokens if self._is_cut else take_share(tokens, places.shares)
        routing: Routing = self.router(mine, places)
        made: Tensor = self.experts(mine, routing, shares=places.shares)
        y = (made if self._is_cut else join_shares(made, places.shares)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)
        return MoEOutput(y, routing.balance_loss, routing.z_loss, places.num_tokens)
