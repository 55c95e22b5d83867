"""Self-attention with heads cut over the tensor-parallel axis; grouped-query, rotary or without positions.

Tensors are [seq, batch, hidden] outside ([seq / n, ...] with sequence parallelism) and [batch, heads, seq, dim] inside.
How the columns of other context-parallel ranks are met lives in `context.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.cache import Cached
from megads.layers.context import context_attention
from megads.layers.dropout import AttentionDropout
from megads.layers.linear import ColumnParallelLinear, RowParallelLinear
from megads.layers.norm import RMSNorm
from megads.layers.recompute import Origin
from megads.ops.rope import RopeSpec, rotary, rotary_angles
from megads.parallel.parameter import Scope


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Everything that defines grouped-query attention; numbers are global.

    Attributes:
        heads, kv_heads: of queries, and of keys and values.
        head_dim: width of one head; heads x head_dim need not be the width of the residual stream.
        qkv_bias, out_bias: whether the projections add a bias.
        qk_norm_eps: of an RMSNorm over each head of q and k, before they turn, its weight shared by all heads; None:
            there is none.
        base_head_dim: width of a head of the muP base, from which scores are scaled by 1 / head_dim and not by its
            root (`parallel/width.py`); None: as wide as here.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None
    base_head_dim: int | None = None

    @property
    def scale(self) -> float:
        """What the products of queries and keys are multiplied by."""
        root: float = self.head_dim**-0.5
        return root if self.base_head_dim is None else root * (self.base_head_dim / self.head_dim) ** 0.5

    def projection_cost(self, hidden: int) -> int:
        """Multiply-adds of one token in the projections."""
        return hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def pair_cost(self) -> int:
        """Multiply-adds of one query with one key and its value, over all heads."""
        return 2 * self.heads * self.head_dim


class SelfAttention(Cached):
    """Causal self-attention.

    Args:
        rope: how positions turn q and k; None: not (positions were added before).
        init_std, output_std: deviation of the initial input and output projections.
    """

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        *,
        spec: AttentionSpec,
        rope: RopeSpec | None,
        dropout: float,
        init_std: float,
        output_std: float,
    ) -> None:
        super().__init__()
        self._dim = dim = spec.head_dim
        self._scale = spec.scale
        tp_size = scope.mesh.group("tp").size
        self._num_local = (spec.heads // tp_size, spec.kv_heads // tp_size)
        self._context = scope.mesh.group("cp")
        self._context_kind = scope.context_kind
        self._rope = rope
        self.qkv = ColumnParallelLinear(
            scope.child("qkv"),
            hidden,
            blocks=(spec.heads * dim, spec.kv_heads * dim, spec.kv_heads * dim),
            init_std=init_std,
            has_bias=spec.qkv_bias,
        )
        self.q_norm = self._head_norm(scope.child("q_norm"), spec)
        self.k_norm = self._head_norm(scope.child("k_norm"), spec)
        self.out = RowParallelLinear(
            scope.child("out"), spec.heads * dim, hidden, init_std=output_std, has_bias=spec.out_bias
        )
        self.dropout = AttentionDropout(scope.child("dropout"), dropout, num_heads=spec.heads)

    @staticmethod
    def _head_norm(scope: Scope, spec: AttentionSpec) -> RMSNorm | None:
        """Each rank norms its own heads, so its gradient is a part of the sum."""
        if spec.qk_norm_eps is None:
            return None
        return RMSNorm(scope, spec.head_dim, eps=spec.qk_norm_eps, partial=("tp",))

    def forward(self, x: Tensor, batch: Batch, *, origin: Origin | None = None) -> Tensor:
        """With the origin of x, that is kept for the backward in its place."""
        if self.cache is None and (batch.columns is None) != (self._context.size == 1):
            raise ValueError("attention wants the context-parallel part of whole rows: Batch.context_part")
        fused = self.qkv(x, origin)  # [seq, batch, local q + k + v]
        seq, rows, _ = fused.shape
        num_heads, num_kv = self._num_local
        widths = [num_heads * self._dim, num_kv * self._dim, num_kv * self._dim]
        q, k, v = (
            part.view(seq, rows, -1, self._dim).permute(1, 2, 0, 3)  # [batch, local heads, seq, dim]
            for part in fused.split(widths, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self._rope is not None:
            angles = rotary_angles(batch.positions, self._rope, dim=self._dim)
            q, k = (rotary(x, angles, rope=self._rope) for x in (q, k))
            v = v.contiguous()  # as a part of `fused` it would keep q and k as they were before
        if self.cache is not None:
            attended = self.cache.attend(self, q=q, pair=(k, v), scale=self._scale)
        else:
            attended = context_attention(
                q,
                k,
                v,
                group=self._context,
                kind=self._context_kind,
                scale=self._scale,
                documents=batch.document_ids,
                dropout=self.dropout.plan(batch),
            ).out
        merged = attended.permute(2, 0, 1, 3).reshape(seq, rows, num_heads * self._dim)
        out: Tensor = self.out(merged)
        return out
