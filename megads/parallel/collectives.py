"""Collectives over a `Group`: the plain ones, and those that autograd sees through.

Over a group of one rank each is the identity. Tensor-parallel layers need two conjugate pairs (Shoeybi et al. 2019,
section 3: f and g):

    copy_to      forward identity     backward all-reduce      before a column-parallel product
    reduce_from  forward all-reduce   backward identity        after a row-parallel product

Sums run in the tensor's own dtype, so callers reduce fp32 or fp64. Non-contiguous input is refused: gloo reduces the
wrong memory of a strided view without a word.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megads.parallel.mesh import Group

# renamed in torch 2.13, where the old names warn
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _check(tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"collectives need contiguous memory, got strides {tensor.stride()} of {tuple(tensor.shape)}"
        )


def all_reduce_(tensor: Tensor, group: Group, *, op: str = "sum") -> Tensor:
    """Replace `tensor` by the sum ("sum") or maximum ("max") over the group; returns it."""
    if group.size > 1:
        _check(tensor)
        dist.all_reduce(
            tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group.handle
        )
    return tensor


def reduce_scatter_(flat: Tensor, group: Group) -> Tensor:
    """Sum a flat tensor of n x size elements over the group; returns this rank's n elements, a view of `flat`."""
    share = flat.numel() // group.size
    mine = flat[group.rank * share : (group.rank + 1) * share]
    if group.size > 1:
        _check(flat)
        _REDUCE_SCATTER(mine, flat, group=group.handle)
    return mine


def all_gather_(flat: Tensor, group: Group) -> None:
    """Fill a flat tensor of n x size elements with every rank's n elements; this rank's are already in place."""
    if group.size > 1:
        _check(flat)
        share = flat.numel() // group.size
        mine = flat[group.rank * share : (group.rank + 1) * share]
        _ALL_GATHER(flat, mine, group=group.handle)


def gather_last(tensor: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's tensor along the last dim, in rank order (no gradient)."""
    if group.size == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(parts, tensor, group=group.handle)
    return torch.cat(parts, dim=-1)


def broadcast_(tensor: Tensor, group: Group, *, source: int) -> Tensor:
    """Replace `tensor` by that of the group's rank `source`; returns it."""
    if group.size > 1:
        _check(tensor)
        dist.broadcast(tensor, src=group.ranks[source], group=group.handle)
    return tensor


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_reduce_(gradients[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Identity whose gradient is summed over the group: each rank used `x` for its own share of the work."""
    return _CopyTo.apply(x, group) if group.size > 1 else x  # type: ignore[no-untyped-call]


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Sum over the group; the gradient of the sum is every rank's gradient as it is."""
    return _ReduceFrom.apply(x, group) if group.size > 1 else x  # type: ignore[no-untyped-call]
