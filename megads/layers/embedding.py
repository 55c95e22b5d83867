"""Token and position embeddings, and the output head, with the vocabulary cut over the tensor-parallel axis.

The vocabulary need not divide: each rank holds ceil(V / n) rows, of which the last may be padding. 7 ids over 4 ranks:

    rank 0: 0 1   rank 1: 2 3   rank 2: 4 5   rank 3: 6 -
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.layers.linear import column_product
from megads.ops.cross_entropy import Columns
from megads.parallel.collectives import reduce_from, scatter_sum
from megads.parallel.parameter import Scope, ShardedParameter
from megads.parallel.shard import Cut, Init, ShardSpec
from megads.parallel.weight_queue import WeightQueue, gradient_of


def vocabulary_spec(vocab: int, hidden: int, *, init_std: float, tie: str | None) -> ShardSpec:
    """Declaration of a [vocab, hidden] weight, as embedding or head."""
    cuts = (Cut(0, "tp", pad=True),)
    return ShardSpec((vocab, hidden), cuts, Init("normal", init_std), role="embedding", tie=tie)


def vocabulary_columns(weight: ShardedParameter) -> Columns:
    """Which ids the local rows of a vocabulary-cut weight are."""
    if not weight.regions:
        return Columns(0, 0)
    (region,) = weight.regions
    return Columns(region.source.start[0], region.source.shape[0])


class _Lookup(torch.autograd.Function):
    """Rows of a weight, 0 where this rank does not hold them; the scatter of the gradient is the queue's work."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, row: Tensor, mine: Tensor, queue: WeightQueue) -> Tensor:
        ctx.save_for_backward(row, mine)
        ctx.weight, ctx.queue = weight, queue
        return F.embedding(row, weight) * mine[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        row, mine = ctx.saved_tensors
        weight, (dy,) = ctx.weight, gradients

        def scatter() -> None:
            total = gradient_of(weight)
            rows = (dy * mine[..., None]).flatten(0, -2).to(total.dtype)
            total.index_add_(0, row.flatten(), rows)

        ctx.queue.put(scatter, weight)
        return None, None, None, None


class VocabParallelEmbedding(torch.nn.Module):
    """Token ids [batch, seq] -> [seq, batch, hidden] on all tensor-parallel ranks.

    With sequence parallelism each rank keeps [seq / n, batch, hidden].
    """

    def __init__(self, scope: Scope, vocab: int, hidden: int, *, init_std: float, tie: str | None) -> None:
        super().__init__()
        self._group = scope.mesh.group("tp")
        self._queue = scope.queue
        self._collect = scatter_sum if scope.sequence_parallel else reduce_from
        self.weight = scope.parameter("weight", vocabulary_spec(vocab, hidden, init_std=init_std, tie=tie))
        self._columns = vocabulary_columns(self.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        mine, row = self._columns.locate(tokens.T)
        rows: Tensor = _Lookup.apply(self.weight, row, mine, self._queue)  # type: ignore[no-untyped-call]
        return self._collect(rows, self._group)


class PositionEmbedding(torch.nn.Module):
    """Learned positions: [batch, seq] indices -> [seq, batch, hidden], or [seq / n, batch, hidden]."""

    def __init__(self, scope: Scope, max_positions: int, hidden: int, *, init_std: float) -> None:
        super().__init__()
        self._group = scope.mesh.group("tp")
        self._is_cut = scope.sequence_parallel
        init = Init("normal", init_std)
        spec = ShardSpec((max_positions, hidden), init=init, partial=scope.partial, role="embedding")
        self.weight = scope.parameter("weight", spec)

    def forward(self, positions: Tensor) -> Tensor:
        index = positions.T
        if self._is_cut:
            index = index.chunk(self._group.size)[self._group.rank]
        return F.embedding(index, self.weight)


class VocabParallelHead(torch.nn.Module):
    """Hidden [seq, batch, hidden], or [seq / n, batch, hidden] -> this rank's logits [seq, batch, vocab_local].

    Columns beyond `columns.count` are padding.
    """

    def __init__(self, scope: Scope, vocab: int, hidden: int, *, init_std: float, tie: str | None) -> None:
        super().__init__()
        self._scope = scope
        self.weight = scope.parameter("weight", vocabulary_spec(vocab, hidden, init_std=init_std, tie=tie))
        self.columns = vocabulary_columns(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return column_product(x, self.weight, bias=None, scope=self._scope)
