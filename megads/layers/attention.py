"""Self-attention with heads cut over the tensor-parallel axis; grouped-query, rotary or without positions.

Tensors are [seq, batch, hidden] outside ([seq / n, ...] with sequence parallelism) and [batch, heads, seq, dim] inside.
How the columns of other context-parallel ranks are met lives in `context.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.context import context_attention
from megads.layers.dropout import AttentionDropout
from megads.layers.linear import ColumnParallelLinear, RowParallelLinear
from megads.layers.recompute import Origin
from megads.ops.rope import rotary, rotary_angles
from megads.parallel.parameter import Scope


class SelfAttention(torch.nn.Module):
    """Causal self-attention.

    Args:
        heads, kv_heads: global numbers of query and key/value heads.
        rope_theta: base of the rotary frequencies; None: no rotation (positions were added before).
        init_std, output_std: deviation of the initial input and output projections.
    """

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        *,
        heads: int,
        kv_heads: int,
        rope_theta: float | None,
        dropout: float,
        init_std: float,
        output_std: float,
        has_bias: bool,
    ) -> None:
        super().__init__()
        self._dim = hidden // heads
        tp_size = scope.mesh.group("tp").size
        self._num_local = (heads // tp_size, kv_heads // tp_size)
        self._context = scope.mesh.group("cp")
        self._context_kind = scope.context_kind
        self._rope_theta = rope_theta
        blocks = (heads * self._dim, kv_heads * self._dim, kv_heads * self._dim)
        self.qkv = ColumnParallelLinear(
            scope.child("qkv"), hidden, blocks=blocks, init_std=init_std, has_bias=has_bias
        )
        self.out = RowParallelLinear(
            scope.child("out"), heads * self._dim, hidden, init_std=output_std, has_bias=has_bias
        )
        self.dropout = AttentionDropout(scope.child("dropout"), dropout, num_heads=heads)

    def forward(self, x: Tensor, batch: Batch, *, origin: Origin | None = None) -> Tensor:
        """With the origin of x, that is kept for the backward in its place."""
        if (batch.columns is None) != (self._context.size == 1):
            raise ValueError("attention wants the context-parallel part of whole rows: Batch.context_part")
        fused = self.qkv(x, origin)  # [seq, batch, local q + k + v]
        seq, rows, _ = fused.shape
        num_heads, num_kv = self._num_local
        widths = [num_heads * self._dim, num_kv * self._dim, num_kv * self._dim]
        q, k, v = (
            part.view(seq, rows, -1, self._dim).permute(1, 2, 0, 3)  # [batch, local heads, seq, dim]
            for part in fused.split(widths, dim=-1)
        )
        if self._rope_theta is not None:
            angles = rotary_angles(batch.positions, dim=self._dim, theta=self._rope_theta)
            q, k = rotary(q, angles), rotary(k, angles)
            v = v.contiguous()  # as a part of `fused` it would keep q and k as they were before
        attended = context_attention(
            q,
            k,
            v,
            group=self._context,
            kind=self._context_kind,
            scale=self._dim**-0.5,
            documents=batch.document_ids,
            dropout=self.dropout.plan(batch),
        )
        merged = attended.out.permute(2, 0, 1, 3).reshape(seq, rows, num_heads * self._dim)
        out: Tensor = self.out(merged)
        return out
