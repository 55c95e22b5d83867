"""Tokens to the ranks of their experts and back.

    tokens x K choices --by expert--> copies --all-to-all over "ep"--> --by expert--> rows of each local expert
    tokens <--sum of K, by gate------ copies <--all-to-all------------ <--by rank---- what the experts made

Ranks of one expert-parallel group hold neighbouring experts, so copies in order of their expert are in order of their
rank. Numbers of rows differ from rank to rank and step to step: with expert parallelism the host reads them, for it
must know how much to receive; without, they stay on the device. Sums are over the K copies of a token in their order,
so nothing hangs on who computed them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.parallel.collectives import start_exchange
from megads.parallel.mesh import Group
from megads.parallel.tokens import deal_rows


class _TakeRows(torch.autograd.Function):
    """rows[order // copies]; the gradients of the copies of a row are summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape, ctx.copies = rows.shape, copies
        return rows.index_select(0, torch.div(order, copies, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        num_rows, width = ctx.shape
        placed = _placed(gradients[0], order, num_rows * ctx.copies)
        return placed if ctx.copies == 1 else placed.view(num_rows, ctx.copies, width).sum(1), None, None


class _PlaceRows(torch.autograd.Function):
    """The inverse: row i to place order[i] of `size`, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(order)
        return _placed(rows, order, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].index_select(0, order), None, None


def _placed(rows: Tensor, order: Tensor, size: int) -> Tensor:
    make = rows.new_empty if order.shape[0] == size else rows.new_zeros
    return make((size, *rows.shape[1:])).index_copy_(0, order, rows)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The way of one micro-batch's tokens through one layer's experts.

    Attributes:
        counts: [local experts] int64, rows that each of this rank's experts gets, from all ranks.
    """

    counts: Tensor
    _group: Group
    _copies: int  # K
    _num_tokens: int
    _order: Tensor  # [kept] int64, choices (token x K + k) in order of their expert
    _send: tuple[int, ...]  # rows to each rank
    _receive: tuple[int, ...]
    _arrival: Tensor | None  # [received] int64, rows by rank -> rows by expert; None: they are

    @classmethod
    def plan(cls, experts: Tensor, group: Group, *, num_experts: int, is_whole: bool) -> Dispatch:
        """The ways for the choices of this rank's tokens. All ranks of the group call it.

        Args:
            experts: [t, K] int64; `num_experts` where a choice goes nowhere.
            group: ranks that the experts are dealt to.
            is_whole: whether every choice goes somewhere.
        """
        num_tokens, copies = experts.shape
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
        counts = counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]
        if group.size == 1:
            order = order if is_whole else order[: int(counts.sum())]
            return cls(counts, group, copies, num_tokens, order, (), (), None)
        sent = counts.view(group.size, -1)  # [ranks, local experts]
        received = start_exchange(sent.contiguous(), group).wait()
        send, receive = torch.stack((sent.sum(1), received.sum(1))).tolist()
        numbers = torch.arange(sent.shape[1], device=flat.device).repeat(group.size)
        owners = numbers.repeat_interleave(received.flatten(), output_size=sum(receive))
        arrival = owners.argsort(stable=True)
        return cls(
            received.sum(0),
            group,
            copies,
            num_tokens,
            order[: sum(send)],
            tuple(send),
            tuple(receive),
            arrival,
        )

    def send(self, x: Tensor) -> Tensor:
        """[t, hidden] -> the rows of this rank's experts, those of the first expert first."""
        rows: Tensor = _TakeRows.apply(x, self._order, self._copies)  # type: ignore[no-untyped-call]
        if self._arrival is None:
            return rows
        rows = deal_rows(rows, self._group, send=self._send, receive=self._receive)
        return _TakeRows.apply(rows, self._arrival, 1)  # type: ignore[no-untyped-call,no-any-return]

    def collect(self, rows: Tensor, *, gates: Tensor) -> Tensor:
        """What the experts made of the rows -> [t, hidden], the sum of a token's rows by its gates [t, K]."""
        if self._arrival is not None:
            rows = _PlaceRows.apply(rows, self._arrival, rows.shape[0])  # type: ignore[no-untyped-call]
            rows = deal_rows(rows, self._group, send=self._receive, receive=self._send)
        size = self._num_tokens * self._copies
        placed: Tensor = _PlaceRows.apply(rows, self._order, size)  # type: ignore[no-untyped-call]
        made = placed.view(self._num_tokens, self._copies, placed.shape[-1])  # there may be no token
        return torch.bmm(gates.to(rows.dtype).unsqueeze(1), made).squeeze(1)
