"""The one residual block: x + attention(norm(x)), then x + mlp(norm(x)), with dropout on each branch."""

from __future__ import annotations

import torch

from megads.data.sequence import Batch
from megads.layers.dropout import HiddenDropout
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
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp
        self.attention_dropout = HiddenDropout(scope.child("attention_branch"), dropout)
        self.mlp_dropout = HiddenDropout(scope.child("mlp_branch"), dropout)

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        (x,) = payload
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), batch), batch)
        x = x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), batch)
        return BlockOutput((x,))
