"""Feed-forward layers, their width cut over the tensor-parallel axis.

With `keeps_activation` false the activation's output is not kept for the backward but made again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megads.layers.linear import ColumnParallelLinear, RowParallelLinear
from megads.layers.recompute import Origin
from megads.ops.activation import gelu, swiglu
from megads.parallel.parameter import Scope


class GeluMLP(torch.nn.Module):
    """W2 gelu(W1 x): [..., hidden] -> [..., hidden]."""

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        ffn: int,
        *,
        init_std: float,
        output_std: float,
        has_bias: bool,
        keeps_activation: bool = True,
    ) -> None:
        super().__init__()
        self._keeps_activation = keeps_activation
        self.up = ColumnParallelLinear(
            scope.child("up"), hidden, blocks=(ffn,), init_std=init_std, has_bias=has_bias
        )
        self.down = RowParallelLinear(
            scope.child("down"), ffn, hidden, init_std=output_std, has_bias=has_bias
        )

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """With the origin of x, that is kept for the backward in its place."""
        inner = self.up(x, origin)
        y: Tensor = self.down(gelu(inner), None if self._keeps_activation else Origin(gelu, inner))
        return y


class SwiGLUMLP(torch.nn.Module):
    """W2 (silu(Wg x) * Wu x), gate and up in one weight: [..., hidden] -> [..., hidden]."""

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        ffn: int,
        *,
        init_std: float,
        output_std: float,
        has_bias: bool,
        keeps_activation: bool = True,
    ) -> None:
        super().__init__()
        self._keeps_activation = keeps_activation
        self.gate_up = ColumnParallelLinear(
            scope.child("gate_up"), hidden, blocks=(ffn, ffn), init_std=init_std, has_bias=has_bias
        )
        self.down = RowParallelLinear(
            scope.child("down"), ffn, hidden, init_std=output_std, has_bias=has_bias
        )

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """With the origin of x, that is kept for the backward in its place."""
        inner = self.gate_up(x, origin)
        y: Tensor = self.down(swiglu(inner), None if self._keeps_activation else Origin(swiglu, inner))
        return y
