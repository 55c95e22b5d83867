"""Context-parallel attention of all ranks in one process: the blocks, merges and backward of `layers/context.py`.

What travels between ranks there is read here from the whole; everything else is the code under test. So one GPU checks
the blocks of every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megads.data.sequence import context_columns
from megads.layers.context import Block, Local, Row, pack, unpack
from megads.ops.attention import Merge


def attend_in_ring(q: Tensor, k: Tensor, v: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """out and lse of whole rows, as the ranks of a ring compute them; only out is differentiable."""
    return _Simulated.apply(q, k, v, row, True)


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """The same of ranks that gather keys and values first."""
    return _Simulated.apply(q, k, v, row, False)


def _columns(rank: int, row: Row) -> Tensor:
    parts = context_columns(rank, size=row.size, length=row.length)
    return torch.cat([torch.arange(part.start, part.stop) for part in parts])


def _blocks(rank: int, row: Row, *, is_ring: bool) -> Iterator[tuple[Block, Tensor]]:
    """The blocks of a rank in its order, each with the columns of the keys that it is given."""
    if not is_ring:
        yield from ((block, torch.arange(row.length)) for block in row.blocks(rank))
        return
    for step in range(row.size):
        source = (rank - step) % row.size
        yield row.meeting(rank, source=source), _columns(source, row)


class _Simulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: Row, is_ring: bool) -> tuple[Tensor, Tensor]:
        outs, lses, ctx.steps = [], [], []
        for rank in range(row.size):
            mine = _columns(rank, row).to(q.device)
            local, merge = q[:, :, mine], Merge(q[:, :, mine], v)
            for block, columns in _blocks(rank, row, is_ring=is_ring):
                columns = columns.to(q.device)
                pair = pack(k[:, :, columns], v[:, :, columns])
                chosen = block.choose(local, pair)
                if chosen is not None:
                    merge.add(block.queries, chosen.forward(local, pair))
                    ctx.steps.append((mine, columns, chosen))
            outs.append(merge.result().out)
            lses.append(merge.result().lse)
        order = torch.cat([_columns(rank, row) for rank in range(row.size)]).argsort().to(q.device)
        out, lse = torch.cat(outs, dim=2)[:, :, order], torch.cat(lses, dim=2)[:, :, order]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dpair = torch.zeros_like(q, dtype=lse.dtype), torch.zeros_like(pack(k, v), dtype=lse.dtype)
        for mine, columns, chosen in ctx.steps:
            local = Local(*(x[:, :, mine] for x in (q, out, lse, gradients[0])))
            pair = pack(k[:, :, columns], v[:, :, columns])
            dq_part, dpair_part = torch.zeros_like(dq[:, :, mine]), torch.zeros_like(pair, dtype=lse.dtype)
            chosen.add(chosen.backward(local, pair), dq=dq_part, dpair=dpair_part)
            dq.index_add_(2, mine, dq_part)
            dpair.index_add_(0, columns, dpair_part)
        dk, dv = unpack(dpair, q.shape[-1])
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None
