"""Collectives over a `Group`: the plain ones, and those that autograd sees through.

Over a group of one rank each is the identity. Tensor-parallel layers need conjugate pairs (Shoeybi et al. 2019,
section 3; with activations cut along the sequence, Korthikanti et al. 2022, section 4.2):

    copy_to              forward identity         backward all-reduce
    reduce_from          forward all-reduce       backward identity
    scatter_sum          forward reduce-scatter   backward all-gather       along the sequence

The linear layers hold the other halves themselves, so that the backward's communication hides behind the weight
gradient (`layers/linear.py`). `start_*` returns at once; the result is there after `wait`.

gloo sums bf16 and fp16 in their own precision, with an error that depends on the place in the tensor: on the CPU such
sums run in fp32. Non-contiguous input is refused: gloo reduces the wrong memory of a strided view without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class _Works:
    """Several transfers that are waited for as one, and the tensor that they read."""

    def __init__(self, tensor: Tensor, *works: dist.Work) -> None:
        self._tensor = tensor
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class Pending:
    """A collective under way.

    Args:
        last: makes the result of what arrived.
    """

    def __init__(
        self,
        result: Tensor,
        *,
        work: dist.Work | _Works | None = None,
        last: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._result = result
        self._work = work
        self._last = last

    def wait(self) -> Tensor:
        """The result, when it is there."""
        if self._work is not None:
            self._work.wait()
        if self._last is not None:
            self._result, self._last = self._last(self._result), None
        return self._result


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype in which its sum is right."""
    narrow = tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if narrow else tensor


def start_all_reduce(tensor: Tensor, group: Group, *, op: str = "sum") -> Pending:
    """Begin to replace `tensor` by the sum ("sum") or maximum ("max") over the group."""
    if group.size == 1:
        return Pending(tensor)
    _check(tensor)
    wide = _wide(tensor)
    reduction = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
    work = dist.all_reduce(wide, op=reduction, group=group.handle, async_op=True)
    return Pending(wide, work=work, last=None if wide is tensor else tensor.copy_)


def all_reduce_(tensor: Tensor, group: Group, *, op: str = "sum") -> Tensor:
    """Replace `tensor` by the sum ("sum") or maximum ("max") over the group; returns it."""
    return start_all_reduce(tensor, group, op=op).wait()


def start_reduce_scatter(flat: Tensor, group: Group, *, dtype: torch.dtype | None = None) -> Pending:
    """Begin to sum a flat tensor of n x size elements over the group into this rank's n elements, a view of it.

    Args:
        dtype: in which elements travel; they are rounded once, and this rank's sum is in the dtype of `flat` (an
            all-to-all: the same bytes as a reduce-scatter, which would round at every addition). None: that of `flat`.
    """
    if group.size == 1:
        return Pending(flat)
    _check(flat)
    share = flat.numel() // group.size
    mine = flat[group.rank * share : (group.rank + 1) * share]
    if dtype is not None and dtype != flat.dtype:
        sent = flat.to(dtype)
        parts = torch.empty_like(sent)
        work = dist.all_to_all_single(parts, sent, group=group.handle, async_op=True)
        return Pending(
            parts,
            work=_Works(sent, work),
            last=lambda parts: mine.copy_(parts.view(group.size, share).sum(0, dtype=flat.dtype)),
        )
    return Pending(mine, work=_REDUCE_SCATTER(mine, flat, group=group.handle, async_op=True))


def start_all_gather(flat: Tensor, group: Group) -> Pending:
    """Begin to fill a flat tensor of n x size elements with every rank's n, of which this rank's are in place."""
    if group.size == 1:
        return Pending(flat)
    _check(flat)
    share = flat.numel() // group.size
    mine = flat[group.rank * share : (group.rank + 1) * share]
    return Pending(flat, work=_ALL_GATHER(flat, mine, group=group.handle, async_op=True))


def start_gather_sequence(x: Tensor, group: Group) -> Pending:
    """Begin to put together [seq / size, ...] of every rank to [seq, ...]."""
    if group.size == 1:
        return Pending(x)
    whole = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
    return Pending(whole, work=_ALL_GATHER(whole, x.contiguous(), group=group.handle, async_op=True))


def start_scatter_sequence(x: Tensor, group: Group) -> Pending:
    """Begin to sum [seq, ...] over the group into this rank's [seq / size, ...]."""
    if group.size == 1:
        return Pending(x)
    wide = _wide(x.contiguous())
    mine = wide.new_empty((x.shape[0] // group.size, *x.shape[1:]))
    work = _REDUCE_SCATTER(mine, wide, group=group.handle, async_op=True)
    return Pending(mine, work=work, last=None if wide.dtype == x.dtype else lambda sum: sum.to(x.dtype))


def gather_last(tensor: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's tensor along the last dim, in rank order (no gradient)."""
    if group.size == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(group.size)]
    dist.all_gather(parts, tensor, group=group.handle)
    return torch.cat(parts, dim=-1)


def start_exchange(
    rows: Tensor, group: Group, *, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Pending:
    """Begin to deal rows: the first send[0] go to the group's rank 0, the next send[1] to rank 1, ...

    The result holds receive[r] rows of every rank r, in rank order (no gradient).

    Args:
        rows: [sum(send), ...].
        send, receive: rows to and from each rank; None: equal numbers.
    """
    if group.size == 1:
        return Pending(rows)
    _check(rows)
    arriving = rows.new_empty((rows.shape[0] if receive is None else sum(receive), *rows.shape[1:]))
    work = dist.all_to_all_single(
        arriving,
        rows,
        output_split_sizes=None if receive is None else list(receive),
        input_split_sizes=None if send is None else list(send),
        group=group.handle,
        async_op=True,
    )
    return Pending(arriving, work=work)


def start_shift(tensor: Tensor, group: Group) -> Pending:
    """Begin to send a tensor to the next rank of the group, the last to the first, and to receive one like it.

    The result is the tensor of the rank before. The one that is sent must stay as it is until `wait`.
    """
    if group.size == 1:
        return Pending(tensor)
    _check(tensor)
    arriving = torch.empty_like(tensor)
    after, before = (group.ranks[(group.rank + step) % group.size] for step in (1, -1))
    send = dist.P2POp(dist.isend, tensor, after, group=group.handle)
    receive = dist.P2POp(dist.irecv, arriving, before, group=group.handle)
    return Pending(arriving, work=_Works(tensor, *dist.batch_isend_irecv([send, receive])))


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


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_scatter_sequence(x, group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return start_gather_sequence(gradients[0], ctx.group).wait(), None


def scatter_sum(x: Tensor, group: Group) -> Tensor:
    """Sum [seq, ...] over the group and keep this rank's [seq / size, ...]."""
    return _ScatterSum.apply(x, group) if group.size > 1 else x  # type: ignore[no-untyped-call]
