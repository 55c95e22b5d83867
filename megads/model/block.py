"""The one residual block: x + attention(norm(x)), then x + mlp(norm(x)), with dropout on each branch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.dropout import HiddenDropout
from megads.layers.recompute import Recompute, recomputed
from megads.parallel.parameter import Scope
from megads.pipeline.stage import BlockOutput, Payload


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
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.attention_dropout = HiddenDropout(scope.child("attention_branch"), dropout)
        self.mlp_dropout = HiddenDropout(scope.child("mlp_branch"), dropout)
        self._recomputes_all = recompute == "full"
        self._recomputed = () if isinstance(recompute, str) else recompute

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        (x,) = payload
        if self._recomputes_all:
            return BlockOutput((recomputed(self._body, x, batch),))
        return BlockOutput((self._body(x, batch),))

    def _body(self, x: Tensor, batch: Batch) -> Tensor:
        attend, feed = (
            partial(recomputed, branch) if name in self._recomputed else branch
            for name, branch in (("attention", self._attend), ("mlp", self._feed))
        )
        x = x + self.attention_dropout(attend(x, batch), batch)
        x = x + self.mlp_dropout(feed(x, batch), batch)
        return x

    def _attend(self, x: Tensor, batch: Batch) -> Tensor:
        y: Tensor = self.attention(self.attention_norm(x), batch)
        return y

    def _feed(self, x: Tensor, _: Batch) -> Tensor:
        y: Tensor = self.mlp(self.mlp_norm(x))
        return y
