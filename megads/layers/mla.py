"""Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values are made of one small latent a token.

    x --down--> norm --up--> q       a head: nope | rope; or x --> q
    x --down-+> norm --up--> k, v    a head: nope | v
             +> rotated ---> k       a head: . | rope, the same for all heads

    scores = (q_nope k_nope + q_rope k_rope) scale

The products from a latent, and the one back, are cut by heads over the tensor-parallel axis. What comes before, and the
rotated part of the keys, is whole on every rank: with sequence parallelism it sees a part of the sequence, and its
gradients are partial sums; without, it sees all of it, and the gradients of all heads come together before it.

`absorbed` is the same attention for generation: scores and sums are taken on the latents themselves, which are all
that a cache must hold. How the columns of other context-parallel ranks are met lives in `context.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.cache import Cached
from megads.layers.context import context_attention
from megads.layers.dropout import AttentionDropout
from megads.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megads.layers.norm import RMSNorm
from megads.layers.recompute import Origin
from megads.ops.attention import attention
from megads.ops.rope import RopeSpec, rotary, rotary_angles
from megads.parallel.collectives import copy_to, start_gather_sequence
from megads.parallel.parameter import Scope
from megads.parallel.tokens import gather_rows


@dataclass(frozen=True, slots=True)
class MLASpec:
    """Everything that defines latent attention; sizes are global, nothing is left open.

    Attributes:
        heads: of queries; every one has keys and values of its own.
        q_lora, kv_lora: width of the latent of queries (None: queries come straight from x), and of keys and values.
        nope_dim, rope_dim: of a head's queries and keys, the part without positions and the one that is rotated.
        v_dim: of a head's values.
        norm_eps: of the norms of the latents.
        scale: of the scores: (nope_dim + rope_dim)^-0.5, times what a stretched context wants.
    """

    heads: int
    q_lora: int | None
    kv_lora: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    norm_eps: float
    scale: float

    @property
    def qk_dim(self) -> int:
        """Of a head's queries and keys."""
        return self.nope_dim + self.rope_dim

    def projection_cost(self, hidden: int) -> int:
        """Multiply-adds of one token in the projections."""
        queries = self.heads * self.qk_dim
        q = hidden * queries if self.q_lora is None else self.q_lora * (hidden + queries)
        kv = hidden * (self.kv_lora + self.rope_dim) + self.kv_lora * self.heads * (
            self.nope_dim + self.v_dim
        )
        return q + kv + self.heads * self.v_dim * hidden

    @property
    def pair_cost(self) -> int:
        """Multiply-adds of one query with one key and its value, over all heads."""
        return self.heads * (self.qk_dim + self.v_dim)


class Latent(torch.nn.Module):
    """What lies between x and the heads: down to `rank` values a token (and `beside` others), a norm, and up again.

    Args:
        heads_dim: width of all heads together.
        keeps_norm: whether the norm's output is kept for the backward, or made again.
    """

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        *,
        rank: int,
        beside: int,
        heads_dim: int,
        norm_eps: float,
        init_std: float,
        keeps_norm: bool,
    ) -> None:
        super().__init__()
        self._keeps_norm = keeps_norm
        self.down = ReplicatedLinear(scope.child("down"), hidden, rank + beside, init_std=init_std)
        self.norm = RMSNorm(scope.child("norm"), rank, eps=norm_eps)
        self.up = ColumnParallelLinear(
            scope.child("up"), rank, blocks=(heads_dim,), init_std=init_std, has_bias=False
        )

    def expand(self, latent: Tensor) -> Tensor:
        """The heads of a latent [seq, batch, rank] that was not normed yet: [seq, batch, local heads x dim]."""
        y: Tensor = self.up(self.norm(latent), None if self._keeps_norm else Origin(self.norm, latent))
        return y


class LatentAttention(Cached):
    """Causal latent attention, [seq, batch, hidden] ([seq / n, ...] with sequence parallelism) -> the same.

    Args:
        rope: how the rotated parts turn.
        init_std, output_std: deviation of the initial input and output projections.
        keeps_norms: whether outputs of the inner norms are kept for the backward, or made again.
    """

    def __init__(
        self,
        scope: Scope,
        hidden: int,
        spec: MLASpec,
        *,
        rope: RopeSpec | None,
        dropout: float,
        init_std: float,
        output_std: float,
        keeps_norms: bool = True,
    ) -> None:
        super().__init__()
        if rope is None:
            raise ValueError("latent attention turns a part of its queries and keys: it wants a RopeSpec")
        self._spec, self._rope = spec, rope
        self._tensor, self._context = scope.mesh.group("tp"), scope.mesh.group("cp")
        self._context_kind, self._is_cut = scope.context_kind, scope.sequence_parallel

        def latent(name: str, rank: int, *, beside: int, head_dim: int) -> Latent:
            return Latent(
                scope.child(name),
                hidden,
                rank=rank,
                beside=beside,
                heads_dim=spec.heads * head_dim,
                norm_eps=spec.norm_eps,
                init_std=init_std,
                keeps_norm=keeps_norms,
            )

        self.q = (
            ColumnParallelLinear(
                scope.child("q"),
                hidden,
                blocks=(spec.heads * spec.qk_dim,),
                init_std=init_std,
                has_bias=False,
            )
            if spec.q_lora is None
            else latent("q", spec.q_lora, beside=0, head_dim=spec.qk_dim)
        )
        self.kv = latent("kv", spec.kv_lora, beside=spec.rope_dim, head_dim=spec.nope_dim + spec.v_dim)
        self.out = RowParallelLinear(
            scope.child("out"), spec.heads * spec.v_dim, hidden, init_std=output_std, has_bias=False
        )
        self.dropout = AttentionDropout(scope.child("dropout"), dropout, num_heads=spec.heads)

    def forward(self, x: Tensor, batch: Batch, *, origin: Origin | None = None) -> Tensor:
        """With the origin of x, that is kept for the backward in its place."""
        if self.cache is not None:
            (latents,) = self.cache.extend(self, self.latents(x, batch))
            if self.cache.length:
                return self.absorbed(x, batch, cache=latents)
        elif (batch.columns is None) != (self._context.size == 1):
            raise ValueError("attention wants the context-parallel part of whole rows: Batch.context_part")
        spec, angles = self._spec, self._angles(batch)
        q = self._queries(x, angles, origin)  # [batch, local heads, seq, nope + rope]
        latent, k_rope = self.kv.down(x, origin).split_with_sizes([spec.kv_lora, spec.rope_dim], dim=-1)
        k_nope, v = self._heads(self.kv.expand(latent)).split_with_sizes([spec.nope_dim, spec.v_dim], dim=-1)
        k_rope = self._turned(k_rope, angles).expand(-1, k_nope.shape[1], -1, -1)
        k = torch.cat((k_nope, k_rope), dim=-1)
        if self.cache is not None:
            return self._merged(attention(q, k, v, scale=spec.scale).out)
        attended = context_attention(
            q,
            k,
            v.contiguous(),  # as a part of what `expand` made it would keep k_nope a second time
            group=self._context,
            kind=self._context_kind,
            scale=spec.scale,
            documents=batch.document_ids,
            dropout=self.dropout.plan(batch),
        )
        return self._merged(attended.out)

    def latents(self, x: Tensor, batch: Batch) -> Tensor:
        """What a cache holds of the tokens x: normed latents and rotated keys, the same on all tensor-parallel ranks.

        Returns:
            [batch, seq, kv_lora + rope_dim]. No gradient.
        """
        latent, k_rope = self.kv.down(x).split_with_sizes([self._spec.kv_lora, self._spec.rope_dim], dim=-1)
        latent = self.kv.norm(latent)
        if self._is_cut:
            latent = start_gather_sequence(latent, self._tensor).wait()
        return torch.cat((latent.transpose(0, 1), self._turned(k_rope, self._angles(batch))[:, 0]), dim=-1)

    def absorbed(self, x: Tensor, batch: Batch, *, cache: Tensor) -> Tensor:
        """Attention of the tokens x to all tokens of a cache that are not later; no keys and no values are made.

        With W_uk and W_uv the parts of kv.up that make a head's keys and values of the latent c, q_nope (W_uk c) =
        (W_uk^T q_nope) c and sum_i p_i W_uv c_i = W_uv sum_i p_i c_i (DeepSeek-V2 2024, section 2.1.2). As `forward` in
        everything else, dropout aside.

        Args:
            x: [seq, batch, hidden] ([seq / n, ...] with sequence parallelism), the last tokens.
            batch: whose `positions` [batch, seq] are those of x.
            cache: [batch, keys, kv_lora + rope_dim], `latents` of one document's tokens; those of x are the last.
        """
        spec = self._spec
        q = self._queries(x, self._angles(batch), None)
        q_nope, q_rope = q.split_with_sizes([spec.nope_dim, spec.rope_dim], dim=-1)
        up = self.kv.up.weight.view(-1, spec.nope_dim + spec.v_dim, spec.kv_lora)
        key_up, value_up = up.split_with_sizes(
            [spec.nope_dim, spec.v_dim], dim=1
        )  # [local heads, dim, kv_lora]
        q = torch.cat((q_nope @ key_up, q_rope), dim=-1)  # [batch, local heads, seq, kv_lora + rope]
        scores = q @ cache[:, None].mT * spec.scale  # [batch, local heads, seq, keys]
        seq, keys = scores.shape[-2:]
        later = torch.ones(seq, keys, dtype=torch.bool, device=x.device).triu(keys - seq + 1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(later, float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        summed = weights @ cache[:, None, :, : spec.kv_lora]  # [batch, local heads, seq, kv_lora]
        return self._merged(summed @ value_up.mT)

    def _angles(self, batch: Batch) -> Tensor:
        return rotary_angles(batch.positions, self._rope, dim=self._spec.rope_dim)

    def _queries(self, x: Tensor, angles: Tensor, origin: Origin | None) -> Tensor:
        """[batch, local heads, seq, nope + rope], rotated."""
        made = self.q.expand(self.q.down(x, origin)) if isinstance(self.q, Latent) else self.q(x, origin)
        nope, rope = self._heads(made).split_with_sizes([self._spec.nope_dim, self._spec.rope_dim], dim=-1)
        return torch.cat((nope, rotary(rope, angles, rope=self._rope)), dim=-1)

    def _turned(self, k_rope: Tensor, angles: Tensor) -> Tensor:
        """The keys that all heads share, cut as x -> [batch, 1, seq, rope], whole and rotated.

        The heads are those of all tensor-parallel ranks, so gradients are summed over them.
        """
        whole = gather_rows(k_rope, self._tensor) if self._is_cut else copy_to(k_rope, self._tensor)
        return rotary(whole.transpose(0, 1)[:, None], angles, rope=self._rope)

    def _heads(self, made: Tensor) -> Tensor:
        """[seq, batch, local heads x dim] -> [batch, local heads, seq, dim], a view."""
        seq, rows, _ = made.shape
        return made.view(seq, rows, self._spec.heads // self._tensor.size, -1).permute(1, 2, 0, 3)

    def _merged(self, out: Tensor) -> Tensor:
        """[batch, local heads, seq, v] -> what goes back into the residual stream."""
        y: Tensor = self.out(out.permute(2, 0, 1, 3).flatten(2))
        return y
