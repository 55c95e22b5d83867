"""Attention of sequences that are cut over the context-parallel ranks, in zig-zag chunks (`data/sequence.py`).

    ring         keys and values travel round the ranks while each computes with those it has; partial results are
                 merged by their log-sum-exp; in the backward the keys' gradients travel with them
    all_gather   keys and values of all ranks are gathered before, their gradients summed and scattered after
    ulysses      heads are exchanged for columns: each rank attends whole rows with its share of the heads

Ring and all_gather (Liu et al. 2023; Dubey et al. 2024, section 3.3.2) compute the same blocks. Of P ranks, rank r has
chunks r and 2P-1-r; rank s's keys meet its queries so (c: causal, x: all), P = 2:

                 keys of rank 0     keys of rank 1
                 chunk 0   3         chunk 1   2
    rank 0   0         c   .               .   .      s = r  causal on all local columns, which are in order
             3         x   c               x   x      s < r  all queries x first half of the keys
    rank 1   1         x   .               c   .      s > r  second half of the queries x all keys
             2         x   .               x   c

Every block below the diagonal costs the same, so ranks never wait for a slower one. With documents some are empty.

Ulysses (Jacobs et al. 2023) needs query heads for every rank; key/value heads that several ranks need are repeated and
their gradients summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.data.sequence import context_columns
from megads.ops.attention import ATTENTION, AttentionResult, Merge, attention
from megads.ops.attention_call import Call, Columns, Dropout
from megads.ops.attention_dense import Gradients
from megads.ops.registry import Implementation
from megads.parallel.collectives import (
    Pending,
    start_exchange,
    start_gather_sequence,
    start_scatter_sequence,
    start_shift,
)
from megads.parallel.mesh import Group
from megads.parallel.parameter import ContextKind, Scope

EVERYTHING = slice(None)


def attended_heads(scope: Scope, num_heads: int) -> range:
    """Global numbers of the query heads that this rank attends with: its tensor-parallel share, or a part of it."""
    heads = range(num_heads)
    parts = [scope.mesh.group("tp")]
    if scope.context_kind == "ulysses":
        parts.append(scope.mesh.group("cp"))
    for group in parts:
        share = len(heads) // group.size
        heads = heads[group.rank * share : (group.rank + 1) * share]
    return heads


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    kind: ContextKind,
    scale: float,
    documents: Tensor | None = None,
    dropout: Dropout | None = None,
) -> AttentionResult:
    """Causal attention of this rank's queries to the keys of whole rows; over one rank, plain attention.

    Args:
        q: [batch, heads, seq, dim], the columns `context_columns` of this rank.
        k, v: [batch, kv_heads, seq, dim]; heads is a multiple of kv_heads.
        group: the context-parallel ranks.
        kind: how they work together; "ulysses" needs heads to be a multiple of their number.
        scale: of the scores.
        documents: [batch, row] ids of whole rows, on the host; None: one document a row.
        dropout: of the attention weights; with "ulysses" of the heads that this rank attends with.

    Returns:
        `out` [batch, heads, seq, v_dim] is differentiable, `lse` is not. With "ulysses" lse is that of the heads that
        this rank attends with, in whole rows.
    """
    if group.size == 1:
        return attention(q, k, v, scale=scale, documents=documents, dropout=dropout)
    if kind == "ulysses":
        return _ulysses(q, k, v, group=group, scale=scale, documents=documents, dropout=dropout)
    row = Row(group.size, group.size * q.shape[2], scale, documents, dropout)
    function = _Ring if kind == "ring" else _AllGather
    return AttentionResult(*function.apply(q, k, v, row, group))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the scores that one kernel computes: local queries, and keys of the tensor that they meet."""

    queries: slice
    keys: slice
    call: Call

    def choose(self, q: Tensor, pair: Tensor) -> Pass | None:
        """The implementation for these queries, and keys and values as `pack` makes them; None: nothing is seen."""
        if self.call.is_empty:
            return None
        k, v = unpack(pair, q.shape[-1])
        q, k, v = q[:, :, self.queries], k[:, :, self.keys], v[:, :, self.keys]
        return Pass(self, ATTENTION.pick(q, k, v, self.call))


@dataclass(frozen=True, slots=True)
class Row:
    """A row of `length` columns, cut over `size` ranks, and what all blocks of its scores have in common."""

    size: int
    length: int
    scale: float
    documents: Tensor | None = None
    dropout: Dropout | None = None

    def meeting(self, rank: int, *, source: int) -> Block:
        """What the queries of `rank` see of the keys of rank `source`."""
        half = self.length // self.size // 2
        queries = context_columns(rank, size=self.size, length=self.length)
        keys = context_columns(source, size=self.size, length=self.length)
        if source == rank:
            return Block(EVERYTHING, EVERYTHING, self._call(queries, keys))
        if source < rank:
            return Block(EVERYTHING, slice(0, half), self._call(queries, keys[:1]))
        return Block(slice(half, 2 * half), EVERYTHING, self._call(queries[1:], keys))

    def blocks(self, rank: int) -> Iterator[Block]:
        """What the queries of `rank` see of the keys of the whole row: for each chunk, itself and all before."""
        half = self.length // self.size // 2
        chunks = context_columns(rank, size=self.size, length=self.length)
        for queries, chunk in zip((slice(0, half), slice(half, 2 * half)), chunks, strict=True):
            yield Block(queries, slice(chunk.start, chunk.stop), self._call((chunk,), (chunk,)))
            if chunk.start:
                yield Block(queries, slice(0, chunk.start), self._call((chunk,), (range(chunk.start),)))

    def _call(self, queries: Columns, keys: Columns) -> Call:
        return Call(self.scale, queries, keys, self.documents, self.dropout)


@dataclass(frozen=True, slots=True)
class Local:
    """What stays on a rank while it goes through the blocks of the backward."""

    q: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor


@dataclass(frozen=True, slots=True)
class Pass:
    """One block of the forward: the backward runs the same implementation."""

    block: Block
    implementation: Implementation

    def forward(self, q: Tensor, pair: Tensor) -> AttentionResult:
        """Attention of the block's queries to its keys."""
        k, v = unpack(pair, q.shape[-1])
        q, k, v = q[:, :, self.block.queries], k[:, :, self.block.keys], v[:, :, self.block.keys]
        return AttentionResult(*self.implementation.run(q, k, v, self.block.call))

    def backward(self, local: Local, pair: Tensor) -> Gradients:
        """Gradients of the block's queries, keys and values; `pair` as `pack` makes it."""
        if self.implementation.backward is None:
            raise ValueError(f"attention: {self.implementation.name} has no backward")
        i, j = self.block.queries, self.block.keys
        k, v = unpack(pair, local.q.shape[-1])
        q, out, lse, dout = (x[:, :, i] for x in (local.q, local.out, local.lse, local.dout))
        gradients: Gradients = self.implementation.backward(
            q, k[:, :, j], v[:, :, j], self.block.call, out, lse, dout
        )
        return gradients

    def add(self, gradients: Gradients, *, dq: Tensor, dpair: Tensor) -> None:
        """Add the block's gradients to those of all queries, and of all keys and values as `pack` lays them."""
        i, j = self.block.queries, self.block.keys
        dk, dv = unpack(dpair, dq.shape[-1])
        for total, gradient, part in zip((dq, dk, dv), gradients, (i, j, j), strict=True):
            total[:, :, part] += gradient


def pack(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values side by side, to travel in one message: [seq, batch, kv_heads, dim + v_dim]."""
    return torch.cat((k, v), dim=-1).permute(2, 0, 1, 3).contiguous()


def unpack(pair: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The keys [batch, kv_heads, seq, dim] and values of `pack`, views."""
    pair = pair.permute(1, 2, 0, 3)
    return pair[..., :dim], pair[..., dim:]


def _kept(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    result: AttentionResult,
    steps: Sequence[Pass | None],
    group: Group,
) -> tuple[Tensor, Tensor]:
    """The result of a forward, after keeping what its backward needs."""
    ctx.save_for_backward(*inputs, result.out, result.lse)
    ctx.steps, ctx.group = tuple(steps), group
    ctx.mark_non_differentiable(result.lse)
    return result.out, result.lse


class _Ring(torch.autograd.Function):
    """Step i of rank r computes with the keys of rank r - i, while those of the next step arrive."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: Row, group: Group) -> tuple[Tensor, Tensor]:
        merge, pair, steps = Merge(q, v), pack(k, v), []
        for step in range(group.size):
            coming = start_shift(pair, group) if step < group.size - 1 else Pending(pair)
            block = row.meeting(group.rank, source=(group.rank - step) % group.size)
            chosen = block.choose(q, pair)
            if chosen is not None:
                merge.add(block.queries, chosen.forward(q, pair))
            steps.append(chosen)
            pair = coming.wait()
        return _kept(ctx, (q, k, v), merge.result(), steps, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of keys go on one step behind the keys, and one step further: then they are home."""
        q, k, v, out, lse = ctx.saved_tensors
        local, group = Local(q, out, lse, gradients[0]), ctx.group
        pair, dq = pack(k, v), torch.zeros_like(q, dtype=lse.dtype)
        coming_gradients = Pending(torch.zeros_like(pair, dtype=lse.dtype))
        for step, chosen in enumerate(ctx.steps):
            coming = start_shift(pair, group) if step < group.size - 1 else Pending(pair)
            found = None if chosen is None else chosen.backward(local, pair)
            dpair = coming_gradients.wait()
            if chosen is not None and found is not None:
                chosen.add(found, dq=dq, dpair=dpair)
            coming_gradients = start_shift(dpair, group)
            pair = coming.wait()
        dk, dv = unpack(coming_gradients.wait().to(k.dtype), q.shape[-1])
        return dq.to(q.dtype), dk, dv, None, None


class _AllGather(torch.autograd.Function):
    """Keys and values are gathered again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: Row, group: Group) -> tuple[Tensor, Tensor]:
        merge, pair, steps = Merge(q, v), _gather(k, v, group), []
        for block in row.blocks(group.rank):
            chosen = block.choose(q, pair)
            if chosen is not None:
                merge.add(block.queries, chosen.forward(q, pair))
                steps.append(chosen)
        return _kept(ctx, (q, k, v), merge.result(), steps, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        local, group = Local(q, out, lse, gradients[0]), ctx.group
        pair, dq = _gather(k, v, group), torch.zeros_like(q, dtype=lse.dtype)
        dpair = torch.zeros_like(pair, dtype=lse.dtype)
        for chosen in ctx.steps:
            chosen.add(chosen.backward(local, pair), dq=dq, dpair=dpair)
        dpair = start_scatter_sequence(_by_rank(dpair, group.size), group).wait()
        dk, dv = unpack(dpair.to(k.dtype), q.shape[-1])
        return dq.to(q.dtype), dk, dv, None, None


def _gather(k: Tensor, v: Tensor, group: Group) -> Tensor:
    """Keys and values of all ranks, packed, in the order of the row."""
    return _by_column(start_gather_sequence(pack(k, v), group).wait(), group.size)


def _by_column(x: Tensor, size: int) -> Tensor:
    """[row, ...] rank by rank -> in the order of the row."""
    order = [2 * c if c < size else 2 * (2 * size - 1 - c) + 1 for c in range(2 * size)]
    return _reorder(x, order)


def _by_rank(x: Tensor, size: int) -> Tensor:
    """[row, ...] in the order of the row -> rank by rank."""
    return _reorder(x, [c for rank in range(size) for c in (rank, 2 * size - 1 - rank)])


def _reorder(x: Tensor, order: Sequence[int]) -> Tensor:
    """Chunk i of the result is chunk order[i] of x, [row, ...]."""
    chunks = x.view(len(order), -1, *x.shape[1:])
    return torch.cat([chunks[c] for c in order])


class _AllToAll(torch.autograd.Function):
    """[size, ...], of which slice p goes to rank p -> [size, ...], of which slice p came from rank p."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_exchange(x.contiguous(), group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return start_exchange(gradients[0].contiguous(), ctx.group).wait(), None


def _ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Group,
    scale: float,
    documents: Tensor | None,
    dropout: Dropout | None,
) -> AttentionResult:
    """Attention with a share of the heads over whole rows, between two all-to-alls."""
    heads, kv_heads, seq = q.shape[1], k.shape[1], q.shape[2]
    share = heads // group.size
    group_size = heads // kv_heads
    repeats = group_size // math.gcd(group_size, share)  # then every rank's heads are whole groups
    k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
    sent = [_by_head(x, group.size) for x in (q, k, v)]
    mixed = _AllToAll.apply(torch.cat(sent, dim=-1), group)  # type: ignore[no-untyped-call]
    mixed = _by_column(mixed.flatten(0, 1), group.size)  # [row, batch, widths of q, k and v]
    row, batch, _ = mixed.shape
    widths = [x.shape[-1] for x in sent]
    q, k, v = (
        part.view(row, batch, -1, x.shape[-1]).permute(1, 2, 0, 3)  # [batch, share of the heads, row, dim]
        for part, x in zip(mixed.split_with_sizes(widths, dim=-1), (q, k, v), strict=True)
    )
    result = attention(q, k, v, scale=scale, documents=documents, dropout=dropout)
    mine = _by_rank(result.out.permute(2, 0, 1, 3), group.size).view(group.size, seq, batch, share, -1)
    out: Tensor = _AllToAll.apply(mine, group)  # type: ignore[no-untyped-call]
    return AttentionResult(out.permute(2, 0, 3, 1, 4).flatten(1, 2), result.lse)


def _by_head(x: Tensor, size: int) -> Tensor:
    """[batch, heads, seq, dim] -> [size, seq, batch, heads / size x dim], each rank's share of the heads."""
    batch, heads, seq, dim = x.shape
    return x.view(batch, size, heads // size, seq, dim).permute(1, 3, 0, 2, 4).flatten(3)
