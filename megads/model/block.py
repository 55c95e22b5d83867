"""The one residual block: x + attention(norm(x)), then x + mlp(norm(x)), with dropout on each branch.

The mlp is dense, or a mixture of experts, whose balance and z-losses leave the block as extras.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.dropout import HiddenDropout
from megads.layers.moe import MixtureOfExperts, MoEOutput
from megads.layers.recompute import KEEP_ALL, Memory, Origin, recomputed
from megads.parallel.parameter import Scope
from megads.pipeline.stage import BlockOutput, Extra, Payload

Moving = Callable[[torch.nn.Module], AbstractContextManager[None]]
"""What moves the tensors that a layer keeps: a context for its forward (`layers/offload.py`)."""


class TransformerBlock(torch.nn.Module):
    """(hidden,) -> (hidden,), [seq, batch, hidden]. Pre-norm; the parts are given, so families differ in data."""

    def __init__(
        self,
        scope: Scope,
        *,
        attention: torch.nn.Module,
        mlp: torch.nn.Module,
        attention_norm: torch.nn.Module,
        mlp_norm: torch.nn.Module,
        dropout: float,
        memory: Memory = KEEP_ALL,
        moving: Moving | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.attention_dropout = HiddenDropout(scope.child("attention_branch"), dropout)
        self.mlp_dropout = HiddenDropout(scope.child("mlp_branch"), dropout)
        self._memory = memory
        self._moving = moving

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        (x,) = payload
        with nullcontext() if self._moving is None else self._moving(self):
            return recomputed(self._body, x, batch) if self._memory.recomputes_all else self._body(x, batch)

    def _body(self, x: Tensor, batch: Batch) -> BlockOutput:
        attended = self._branch("attention", self._attend, x, batch)
        x = x + self.attention_dropout(attended.payload[0], batch)
        fed = self._branch("mlp", self._feed, x, batch)
        x = x + self.mlp_dropout(fed.payload[0], batch)
        return BlockOutput((x,), fed.extras)

    def _branch(
        self, name: str, branch: Callable[[Tensor, Batch], BlockOutput], x: Tensor, batch: Batch
    ) -> BlockOutput:
        return recomputed(branch, x, batch) if self._memory.recomputes(name) else branch(x, batch)

    def _attend(self, x: Tensor, batch: Batch) -> BlockOutput:
        origin = self._origin(self.attention_norm, x)
        return BlockOutput((self.attention(self.attention_norm(x), batch, origin=origin),))

    def _origin(self, norm: torch.nn.Module, x: Tensor) -> Origin | None:
        """What the layer behind a norm keeps in the place of its output; None: the output."""
        return Origin(norm, x) if self._memory.recomputes("norm") else None

    def _feed(self, x: Tensor, batch: Batch) -> BlockOutput:
        normed = self.mlp_norm(x)
        if not isinstance(self.mlp, MixtureOfExperts):
            return BlockOutput((self.mlp(normed, self._origin(self.mlp_norm, x)),))
        made: MoEOutput = self.mlp(normed, batch)
        count = torch.full((), made.num_tokens, device=x.device)
        losses = (("balance_loss", made.balance_loss), ("z_loss", made.z_loss))
        extras = tuple(Extra(name, loss, count) for name, loss in losses if loss is not None)
        return BlockOutput((made.hidden,), extras)
