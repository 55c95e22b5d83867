"""Linear layers cut over the tensor-parallel axis, with their communication.

    column       W [out, in] cut along out:  y_r = x W_r^T         x replicated, y cut
    row          W [out, in] cut along in:   y = sum_r x_r W_r^T   x cut, y replicated; bias added once, after the sum
    replicated   W [out, in] on every rank:  y = x W^T             x and y replicated, or cut along the sequence: no
                                                                   communication, dW is then a part of the sum

                      forward                    backward of x                 backward of W
    column            .                          all-reduce, under way while   dy^T x
    row               all-reduce                 .                             dy^T x
    with sequence parallelism x of column and y of row are [seq / n, ...]:
    column            all-gather x               reduce-scatter, under way     dy^T x, x gathered again
    row               reduce-scatter y           all-gather dy                 dy^T x, dy gathered again in a W

(Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.) The weight gradient is added to the parameter's
`.grad` here, in that buffer's dtype, and not handed to autograd: low-precision weights accumulate in float32. It is
work in the scope's `WeightQueue`, so that a schedule may put it off; x of column and dy of row are then gathered by W
itself, not held whole.

In the forward, and in an I, nothing is left to hide communication behind but the product itself: with
`parallel.sequence_pieces` sequence-parallel activations travel in pieces, one while another is multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.layers.recompute import Origin
from megads.ops.product import add_product_
from megads.parallel.collectives import (
    Pending,
    start_all_reduce,
    start_gather_sequence,
    start_scatter_sequence,
)
from megads.parallel.mesh import Group
from megads.parallel.parameter import Scope
from megads.parallel.shard import Cut, Init, ShardSpec
from megads.parallel.weight_queue import WeightQueue, gradient_of


class _Started(Protocol):
    """A result that may be under way."""

    def wait(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Parts of a result under way, to be joined along the sequence."""

    parts: tuple[Pending, ...]

    def wait(self) -> Tensor:
        return torch.cat([part.wait() for part in self.parts])


@dataclass(frozen=True, slots=True)
class _Cutting:
    """Over which ranks a product is cut, whether other activations are cut along the sequence, and who runs dW.

    Attributes:
        num_pieces: in how many pieces sequence-parallel activations travel, one while another is multiplied.
    """

    group: Group
    is_sequence_parallel: bool
    num_pieces: int
    queue: WeightQueue

    @classmethod
    def of(cls, scope: Scope) -> _Cutting:
        """As the layers of `scope` are cut."""
        is_cut = scope.sequence_parallel and scope.mesh.group("tp").size > 1
        num_pieces = scope.sequence_pieces if is_cut else 1
        return cls(scope.mesh.group("tp"), scope.sequence_parallel, num_pieces, scope.queue)

    def whole(self, x: Tensor) -> Pending:
        """Begin to make an activation between regions whole."""
        return start_gather_sequence(x, self.group) if self.is_sequence_parallel else Pending(x)

    def sum(self, x: Tensor) -> Pending:
        """Begin to sum partial results; the memory of `x` may be used."""
        if self.is_sequence_parallel:
            return start_scatter_sequence(x, self.group)
        return start_all_reduce(x.contiguous(), self.group)

    def product_of_whole(self, x: Tensor, weight: Tensor, *, bias: Tensor | None) -> Tensor:
        """The product of an activation that is made whole on the way: x cut along the sequence, the result whole."""
        if self.num_pieces == 1:
            return F.linear(self.whole(x).wait(), weight, bias)
        pieces = x.tensor_split(min(self.num_pieces, x.shape[0]))
        gathering = [self.whole(piece) for piece in pieces]
        y = x.new_empty((self.group.size, *x.shape[:-1], weight.shape[0]))  # [ranks, seq / ranks, batch, out]
        start = 0
        for piece, pending in zip(pieces, gathering, strict=True):
            stop = start + piece.shape[0]
            made = F.linear(pending.wait(), weight, bias)  # [ranks x piece, batch, out]
            y[:, start:stop] = made.unflatten(0, (self.group.size, -1))  # type: ignore[no-untyped-call]
            start = stop
        return y.flatten(0, 1)

    def start_sum_of_product(self, x: Tensor, weight: Tensor) -> _Started:
        """Begin to sum the partial products of all ranks: x whole, the result cut along the sequence."""
        if self.num_pieces == 1:
            return self.sum(F.linear(x, weight))
        by_rank: Tensor = x.unflatten(0, (self.group.size, -1))  # type: ignore[no-untyped-call]
        pieces = by_rank.tensor_split(min(self.num_pieces, by_rank.shape[1]), dim=1)
        return _Pieces(tuple(self.sum(F.linear(piece.flatten(0, 1), weight)) for piece in pieces))


def add_weight_gradient(weight: Tensor, *, dy: Tensor, x: Tensor) -> None:
    """weight.grad += dy^T x, in the dtype of the gradient.

    Args:
        weight: [out, in], with or without `.grad`.
        dy: [..., out].
        x: [..., in].
    """
    add_product_(gradient_of(weight), dy=dy, x=x)


def _keep(ctx: Any, x: Tensor, origin: Origin | None) -> None:
    """Keep the input of a product, or in its place what it can be made of."""
    ctx.save_for_backward(x if origin is None else origin.source.detach())
    ctx.function = None if origin is None else origin.function


def _kept(ctx: Any) -> Callable[[], Tensor]:
    """What gives the input of a product, made again if need be."""
    (kept,), function = ctx.saved_tensors, ctx.function
    return (lambda: kept) if function is None else (lambda: function(kept))


class _Column(torch.autograd.Function):
    """The weight is kept as an attribute: under recompute a saved tensor comes back as another object."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, cutting: _Cutting, origin: Origin | None
    ) -> Tensor:
        _keep(ctx, x, origin)
        ctx.weight, ctx.has_bias, ctx.cutting = weight, bias is not None, cutting
        return cutting.product_of_whole(x, weight, bias=bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x = _kept(ctx)
        weight, cutting = ctx.weight, ctx.cutting
        with torch.no_grad():
            # W makes x whole for itself when its time comes; at once, the gather hides behind dy W
            gathering = None if cutting.queue.is_deferring else cutting.whole(x())
            summing = cutting.start_sum_of_product(dy, weight.T)

            def weight_gradient() -> None:
                whole = cutting.whole(x()) if gathering is None else gathering
                add_weight_gradient(weight, dy=dy, x=whole.wait())

            cutting.queue.put(weight_gradient, weight)
            dbias = dy.flatten(0, -2).sum(0) if ctx.has_bias else None
            return summing.wait(), None, dbias, None, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, cutting: _Cutting, origin: Origin | None) -> Tensor:
        _keep(ctx, x, origin)
        ctx.weight, ctx.cutting = weight, cutting
        return cutting.start_sum_of_product(x, weight).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (part,), x, weight, cutting = gradients, _kept(ctx), ctx.weight, ctx.cutting
        with torch.no_grad():
            whole = cutting.whole(part).wait()
            dx = whole @ weight
            # this rank's part of dy alone waits for W, which makes it whole again
            at_hand = None if cutting.queue.is_deferring else whole

            def weight_gradient() -> None:
                dy = cutting.whole(part).wait() if at_hand is None else at_hand
                add_weight_gradient(weight, dy=dy, x=x())

            cutting.queue.put(weight_gradient, weight)
            return dx, None, None, None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, queue: WeightQueue, origin: Origin | None) -> Tensor:
        _keep(ctx, x, origin)
        ctx.weight, ctx.queue = weight, queue
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), x, weight = gradients, _kept(ctx), ctx.weight
        with torch.no_grad():
            ctx.queue.put(lambda: add_weight_gradient(weight, dy=dy, x=x()), weight)
            return dy @ weight, None, None, None


def column_product(
    x: Tensor, weight: Tensor, *, bias: Tensor | None, scope: Scope, origin: Origin | None = None
) -> Tensor:
    """x W^T + b for a weight cut along its output, as the layers of `scope` are cut."""
    return _Column.apply(x, weight, bias, _Cutting.of(scope), origin)  # type: ignore[no-untyped-call,no-any-return]


class ColumnParallelLinear(torch.nn.Module):
    """x -> this rank's share of x W^T + b, [seq, batch, out_local].

    x is [seq, batch, in], or [seq / n, batch, in] with sequence parallelism.

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
        self._scope = scope
        cut = Cut(0, "tp", blocks)
        self.weight = scope.parameter(
            "weight", ShardSpec((out_features, in_features), (cut,), Init("normal", init_std))
        )
        self.bias = (
            scope.parameter("bias", ShardSpec((out_features,), (cut,), decay=False)) if has_bias else None
        )

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """With an origin, that is kept for the backward in the place of x."""
        return column_product(x, self.weight, bias=self.bias, scope=self._scope, origin=origin)


class RowParallelLinear(torch.nn.Module):
    """This rank's share of x, [seq, batch, in_local] -> x W^T + b, [seq, batch, out] on all ranks.

    With sequence parallelism the result is [seq / n, batch, out].
    """

    def __init__(
        self, scope: Scope, in_features: int, out_features: int, *, init_std: float, has_bias: bool
    ) -> None:
        super().__init__()
        self._cutting = _Cutting.of(scope)
        self.weight = scope.parameter(
            "weight", ShardSpec((out_features, in_features), (Cut(1, "tp"),), Init("normal", init_std))
        )
        self.bias = (
            scope.parameter("bias", ShardSpec((out_features,), partial=scope.partial, decay=False))
            if has_bias
            else None
        )

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """With an origin, that is kept for the backward in the place of x."""
        y: Tensor = _Row.apply(x, self.weight, self._cutting, origin)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


class ReplicatedLinear(torch.nn.Module):
    """[..., in] -> x W^T, [..., out], W the same on every tensor-parallel rank.

    x is what layers meet between regions: whole and the same on all ranks, or [seq / n, batch, in].
    """

    def __init__(self, scope: Scope, in_features: int, out_features: int, *, init_std: float) -> None:
        super().__init__()
        self._queue = scope.queue
        spec = ShardSpec((out_features, in_features), init=Init("normal", init_std), partial=scope.partial)
        self.weight = scope.parameter("weight", spec)

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        """With an origin, that is kept for the backward in the place of x."""
        return _Replicated.apply(x, self.weight, self._queue, origin)  # type: ignore[no-untyped-call,no-any-return]
