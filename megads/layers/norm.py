"""Norm layers: parameters for `ops/norm.py`. Replicated over tensor-parallel ranks, never decayed.

With sequence parallelism each rank norms its part of the sequence, so gradients are partial sums over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megads.ops.norm import layer_norm, rms_norm
from megads.parallel.parameter import Scope
from megads.parallel.shard import Init, ShardSpec


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dim.

    Args:
        partial: axes whose ranks each norm only a part of what the weight is for; None: as the sequence is cut.
    """

    def __init__(
        self, scope: Scope, hidden: int, *, eps: float, partial: tuple[str, ...] | None = None
    ) -> None:
        super().__init__()
        self._eps = eps
        axes = scope.partial if partial is None else partial
        self.weight = scope.parameter(
            "weight", ShardSpec((hidden,), init=Init("ones"), partial=axes, decay=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self._eps)


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last dim, with bias."""

    def __init__(self, scope: Scope, hidden: int, *, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self.weight = scope.parameter(
            "weight", ShardSpec((hidden,), init=Init("ones"), partial=scope.partial, decay=False)
        )
        self.bias = scope.parameter("bias", ShardSpec((hidden,), partial=scope.partial, decay=False))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, eps=self._eps)
