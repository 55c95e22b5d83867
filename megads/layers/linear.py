"""Linear layers cut over the tensor-parallel axis.

    column   W [out, in] cut along out:  y_r = x W_r^T      x replicated, y cut     gradient of x summed over ranks
    row      W [out, in] cut along in:   y = sum_r x_r W_r^T  x cut, y replicated   bias added once, after the sum

Column then row needs one all-reduce forward and one backward (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.parallel.collectives import copy_to, reduce_from
from megads.parallel.parameter import Scope
from megads.parallel.shard import Cut, Init, ShardSpec


class ColumnParallelLinear(torch.nn.Module):
    """x [..., in] -> this rank's share of x W^T + b, [..., out_local].

    Args:
        blocks: sizes of the fused parts of the output, each cut on its own; their sum is the output width.
        init_std: deviation of the initial weights; biases start at zero.
        has_bias: whether there is a bias.
    """

    def __init__(
        self, scope: Scope, in_features: int, *, blocks: tuple[int, ...], init_std: float, has_bias: bool
    ) -> None:
        super().__init__()
        out_features = sum(blocks)
        self._group = scope.mesh.group("tp")
        cut = Cut(0, "tp", blocks)
        self.weight = scope.parameter(
            "weight", ShardSpec((out_features, in_features), (cut,), Init("normal", init_std))
        )
        self.bias = (
            scope.parameter("bias", ShardSpec((out_features,), (cut,), decay=False)) if has_bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(copy_to(x, self._group), self.weight, self.bias)


class RowParallelLinear(torch.nn.Module):
    """This rank's share of x, [..., in_local] -> x W^T + b, [..., out], the same on all ranks."""

    def __init__(
        self, scope: Scope, in_features: int, out_features: int, *, init_std: float, has_bias: bool
    ) -> None:
        super().__init__()
        self._group = scope.mesh.group("tp")
        self.weight = scope.parameter(
            "weight", ShardSpec((out_features, in_features), (Cut(1, "tp"),), Init("normal", init_std))
        )
        self.bias = scope.parameter("bias", ShardSpec((out_features,), decay=False)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = reduce_from(F.linear(x, self.weight), self._group)
        return y if self.bias is None else y + self.bias
