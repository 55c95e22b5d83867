"""Feed-forward layers, their width cut over the tensor-parallel axis."""

from __future__ import annotations

import torch
from torch import Tensor

from megads.layers.linear import ColumnParallelLinear, RowParallelLinear
from megads.ops.activation import gelu, swiglu
from megads.parallel.parameter import Scope


class GeluMLP(torch.nn.Module):
    """W2 gelu(W1 x): [..., hidden] -> [..., hidden]."""

    def __init__(
        self, scope: Scope, hidden: int, ffn: int, *, init_std: float, output_std: float, has_bias: bool
    ) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(
            scope.child("up"), hidden, blocks=(ffn,), init_std=init_std, has_bias=has_bias
        )
        self.down = RowParallelLinear(
            scope.child("down"), ffn, hidden, init_std=output_std, has_bias=has_bias
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(gelu(self.up(x)))
        return y


class SwiGLUMLP(torch.nn.Module):
    """W2 (silu(Wg x) * Wu x), gate and up in one weight: [..., hidden] -> [..., hidden]."""

    def __init__(
        self, scope: Scope, hidden: int, ffn: int, *, init_std: float, output_std: float, has_bias: bool
    ) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(
            scope.child("gate_up"), hidden, blocks=(ffn, ffn), init_std=init_std, has_bias=has_bias
        )
        self.down = RowParallelLinear(
            scope.child("down"), ffn, hidden, init_std=output_std, has_bias=has_bias
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(swiglu(self.gate_up(x)))
        return y
