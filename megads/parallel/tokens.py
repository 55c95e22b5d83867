"""Rows of tokens on their way between ranks, as autograd sees it: shares of a batch, and deals to owners.

Tensor-parallel ranks without sequence parallelism hold the same tokens; work that is done once a token takes a share
each. 5 tokens over 2 ranks (the last share may be short, or empty):

    rank 0: t0 t1 t2    rank 1: t3 t4

    take_share      forward this rank's share       backward all-gather
    join_shares     forward all-gather              backward this rank's share
    gather_rows     forward all-gather              backward reduce-scatter      (each rank uses all rows its own way)
    deal_rows       forward all-to-all              backward all-to-all back

The other half of `gather_rows` is `scatter_sum` of `collectives.py`, where the plain collectives are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.parallel.collectives import start_exchange, start_gather_sequence, start_scatter_sequence
from megads.parallel.mesh import Group


@dataclass(frozen=True, slots=True)
class Shares:
    """How `total` rows are shared by the ranks of a group: ceil(total / size) each, as far as they go."""

    total: int
    group: Group

    @property
    def size(self) -> int:
        """Rows of a full share."""
        return -(-self.total // self.group.size)

    @property
    def start(self) -> int:
        """This rank's first row."""
        return min(self.group.rank * self.size, self.total)

    @property
    def stop(self) -> int:
        return min(self.start + self.size, self.total)

    @property
    def is_even(self) -> bool:
        """Whether every share is full."""
        return self.total % self.group.size == 0

    def take(self, rows: Tensor) -> Tensor:
        """This rank's share of all rows, a view."""
        return rows[self.start : self.stop]

    def join(self, share: Tensor) -> Tensor:
        """All rows, from every rank's share (no gradient)."""
        return start_gather_sequence(fill_up(share, self.size), self.group).wait()[: self.total]


def fill_up(rows: Tensor, size: int, *, value: float = 0) -> Tensor:
    """`rows` with rows of `value` after them, `size` in all."""
    missing = size - rows.shape[0]
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing), value=value) if missing else rows


class _TakeShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        return shares.take(rows).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.shares.join(gradients[0]), None


class _JoinShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        return shares.join(share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.shares.take(gradients[0]), None


def take_share(rows: Tensor, shares: Shares) -> Tensor:
    """This rank's share of rows that all ranks hold, [total, ...] -> [share, ...]."""
    return _TakeShare.apply(rows, shares) if shares.group.size > 1 else rows  # type: ignore[no-untyped-call]


def join_shares(share: Tensor, shares: Shares) -> Tensor:
    """All rows on every rank, [share, ...] -> [total, ...]."""
    return _JoinShares.apply(share, shares) if shares.group.size > 1 else share  # type: ignore[no-untyped-call]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return start_gather_sequence(rows, group).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return start_scatter_sequence(gradients[0], ctx.group).wait(), None


def gather_rows(rows: Tensor, group: Group) -> Tensor:
    """Every rank's rows, equally many, one after another: [n, ...] -> [size x n, ...]."""
    return _GatherRows.apply(rows, group) if group.size > 1 else rows  # type: ignore[no-untyped-call]


class _DealRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: Group, send: tuple[int, ...], receive: tuple[int, ...]
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return start_exchange(rows.contiguous(), group, send=send, receive=receive).wait()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        dy = gradients[0].contiguous()
        return start_exchange(dy, ctx.group, send=ctx.receive, receive=ctx.send).wait(), None, None, None


def deal_rows(rows: Tensor, group: Group, *, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
    """send[r] consecutive rows to each rank r of the group; returns receive[r] rows of every r, in rank order."""
    if group.size == 1:
        return rows
    return _DealRows.apply(rows, group, send, receive)  # type: ignore[no-untyped-call,no-any-return]
