"""Causal attention as an op with its own backward: `attention(q, k, v) -> (out, lse)`.

The log-sum-exp of the scores is part of the result, so that blocks of keys can be merged later (ring
attention), and the backward is computed from (q, k, v, out, lse) alone. Two implementations:

    flash_cpu   aten's CPU flash kernel, document by document; no [seq, seq] memory; fp32 and fp64
    plain       explicit softmax; defines the op; the only one with dropout

Documents: with ids given, a query sees a key iff both carry the same id and the key is not later.

    ids  1 1 2 2      q0 x . . .
                      q1 x x . .
                      q2 . . x .
                      q3 . . x x

Floor: 4 b h s^2 d flops forward (half if causal), 10 backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.ops.registry import Implementation, Op


@dataclass(frozen=True, slots=True)
class Dropout:
    """Dropout of attention weights: `keep()` gives the [batch, heads, seq, seq] bool mask, the same at each call."""

    probability: float
    keep: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """Output [batch, heads, seq, dim] and log-sum-exp of the scaled scores [batch, heads, seq]."""

    out: Tensor
    lse: Tensor


@dataclass(frozen=True, slots=True)
class _Call:
    """What both passes of one attention call share."""

    scale: float
    documents: Tensor | None  # [batch, seq]
    dropout: Dropout | None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Tensor | None = None,
    dropout: Dropout | None = None,
) -> AttentionResult:
    """Causal softmax(q k^T scale) v, each query head with the key/value head of its group.

    Args:
        q: [batch, heads, seq, dim].
        k, v: [batch, kv_heads, seq, dim]; heads is a multiple of kv_heads, consecutive heads share one.
        scale: of the scores, usually dim ** -0.5.
        documents: [batch, seq] ids, constant within a document; None: one document a row.
        dropout: of the attention weights after softmax; the lse is that of the scores without it.

    Returns:
        `out` is differentiable; `lse` is not.
    """
    out, lse = _Attention.apply(q, k, v, _Call(scale, documents, dropout))  # type: ignore[no-untyped-call]
    return AttentionResult(out, lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        out, lse = ATTENTION_FORWARD(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ATTENTION_BACKWARD(q, k, v, ctx.call, out, lse, gradients[0])
        return dq, dk, dv, None


def _expand(x: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads so that there is one for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _collapse(gradient: Tensor, kv_heads: int) -> Tensor:
    """Sum over the query heads that share a key/value head: the transpose of `_expand`."""
    if gradient.shape[1] == kv_heads:
        return gradient
    batch, heads, seq, dim = gradient.shape
    return gradient.view(batch, kv_heads, heads // kv_heads, seq, dim).sum(2)


def _visible(q: Tensor, call: _Call) -> Tensor:
    seq = q.shape[2]
    mask = torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()
    if call.documents is None:
        return mask
    return mask & (call.documents[:, None, :, None] == call.documents[:, None, None, :])


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    scores = (q @ _expand(k, heads).mT) * call.scale  # [batch, heads, seq, seq]
    scores.masked_fill_(~_visible(q, call), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp()
    if call.dropout is not None:
        weights = weights * call.dropout.keep() / (1.0 - call.dropout.probability)
    return weights @ _expand(v, heads), lse


def _plain_backward(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    keys, values = _expand(k, heads), _expand(v, heads)
    weights = ((q @ keys.mT) * call.scale - lse[..., None]).exp()
    weights.masked_fill_(~_visible(q, call), 0.0)
    dropped, dweights = weights, dout @ values.mT
    if call.dropout is not None:
        kept = call.dropout.keep() / (1.0 - call.dropout.probability)
        dropped, dweights = weights * kept, dweights * kept
    dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True)) * call.scale
    return (
        dscores @ keys,
        _collapse(dscores.mT @ q, kv_heads),
        _collapse(dropped.mT @ dout, kv_heads),
    )


def _documents(call: _Call, batch: int, seq: int) -> Iterator[tuple[slice, slice]]:
    """(rows, positions) of blocks that are plainly causal: all rows at once, or each document of each row."""
    if call.documents is None:
        yield slice(0, batch), slice(0, seq)
        return
    for row in range(batch):
        ids = call.documents[row]
        ends = [*(torch.nonzero(ids[1:] != ids[:-1]).flatten() + 1).tolist(), seq]
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            yield slice(row, row + 1), slice(start, end)


def _flash_cpu_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=q.dtype)
    for rows, span in _documents(call, q.shape[0], q.shape[2]):
        at = (rows, slice(None), span)
        part = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[at], k[at], v[at], 0.0, True, scale=call.scale
        )
        out[at], lse[at] = part[0], part[1]
    return out, lse


def _flash_cpu_backward(
    q: Tensor, k: Tensor, v: Tensor, call: _Call, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, span in _documents(call, q.shape[0], q.shape[2]):
        at = (rows, slice(None), span)
        dq[at], dk[at], dv[at] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[at], q[at], k[at], v[at], out[at], lse[at], 0.0, True, scale=call.scale
        )
    return dq, dk, dv


def _flash_cpu_accepts(q: Tensor, k: Tensor, v: Tensor, call: _Call, *_: Tensor) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.float64)
        and q.shape[-1] == v.shape[-1]
        and call.dropout is None
    )


def _always(*_: object) -> bool:
    return True


ATTENTION_FORWARD = Op(
    "attention",
    (
        Implementation("flash_cpu", _flash_cpu_forward, _flash_cpu_accepts),
        Implementation("plain", _plain_forward, _always),
    ),
)
ATTENTION_BACKWARD = Op(
    "attention",
    (
        Implementation("flash_cpu", _flash_cpu_backward, _flash_cpu_accepts),
        Implementation("plain", _plain_backward, _always),
    ),
)
