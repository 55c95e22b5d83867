"""Attention as an op with its own backward: `attention(q, k, v) -> (out, lse)`, and the blocks it is made of.

The log-sum-exp of the scores is part of the result, so that blocks of keys can be merged (`Merge`, used by ring
attention), and the backward is computed from (q, k, v, out, lse) alone, where out and lse may be those of all blocks
together. Implementations, in order of preference:

    cudnn, flash_varlen, flash, efficient   on NVIDIA GPUs: `attention_cuda.py`
    flash_cpu   aten's CPU flash kernel, document by document; no [seq, seq] memory
    plain       explicit softmax in fp32 or fp64; defines the op; the only one with dropout

Documents: with ids given, a query sees a key iff both carry the same id and the key is not later.

    ids  1 1 2 2      q0 x . . .
                      q1 x x . .
                      q2 . . x .
                      q3 . . x x

Floor: 4 b h s^2 d flops forward (half if causal), 10 backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.ops import attention_cuda
from megads.ops.attention_call import Call, collapse, expand, whole
from megads.ops.attention_call import Dropout as Dropout
from megads.ops.attention_dense import (
    Gradients,
    Kernel,
    dense_implementation,
    empty_output,
    wide,
    with_even_values,
)
from megads.ops.registry import Implementation, Op


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """Output [batch, heads, seq, dim] and log-sum-exp of the scaled scores [batch, heads, seq], fp32 or fp64."""

    out: Tensor
    lse: Tensor


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
        documents: [batch, seq] ids, constant within a document; None: one document a row. Where they begin is read
            on the host, so that is where they should be.
        dropout: of the attention weights after softmax; the lse is that of the scores without it.

    Returns:
        `out` is differentiable; `lse` is not.
    """
    columns = whole(q.shape[2])
    out, lse = _Attention.apply(q, k, v, Call(scale, columns, columns, documents, dropout))  # type: ignore[no-untyped-call]
    return AttentionResult(out, lse)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        ctx.implementation = ATTENTION.pick(q, k, v, call)
        out, lse = ctx.implementation.run(q, k, v, call)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = ctx.implementation.backward(q, k, v, ctx.call, out, lse, gradients[0])
        return dq, dk, dv, None


class Merge:
    """Attention to many keys from blocks of them, in any order: a running softmax.

    out = sum_i out_i exp(lse_i - lse), lse = log sum_i exp(lse_i), in fp32 or fp64 (Milakov and Gimelshein 2018; Liu et
    al. 2023). The first block of a query must have a key that it sees, as the causal one has.

    Args:
        q: [batch, heads, queries, dim], whose attention it is.
        v: [batch, kv_heads, keys, v_dim], some of the values.
    """

    def __init__(self, q: Tensor, v: Tensor) -> None:
        self._dtype = q.dtype
        self._out = empty_output(q, v, dtype=wide(q.dtype)).zero_()
        self._lse = torch.full(q.shape[:3], float("-inf"), dtype=wide(q.dtype), device=q.device)

    def add(self, queries: slice, block: AttentionResult) -> None:
        """Take in the attention of `queries` to keys that were not there before."""
        out, lse = self._out[:, :, queries], self._lse[:, :, queries]
        share = torch.sigmoid(block.lse - lse)  # exp(block.lse) / (exp(lse) + exp(block.lse))
        out.lerp_(block.out.to(out.dtype), share[..., None])
        lse.copy_(torch.logaddexp(lse, block.lse))

    def result(self) -> AttentionResult:
        """Attention to all keys so far, out in the dtype of the queries."""
        return AttentionResult(self._out.to(self._dtype), self._lse)


def _wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return x.to(wide(x.dtype))


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    scores = (_wide(q) @ _wide(expand(k, heads)).mT) * call.scale  # [batch, heads, queries, keys]
    visible = call.visible(q.device)
    scores.masked_fill_(~visible, float("-inf"))
    lse = scores.logsumexp(dim=-1)  # -inf where no key is seen
    weights = (scores - lse[..., None]).exp().masked_fill_(~visible, 0.0)
    if call.dropout is not None:
        weights = weights * call.dropout.keep(call.queries, call.keys) / (1.0 - call.dropout.probability)
    return (weights @ _wide(expand(v, heads))).to(q.dtype), lse


def _plain_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, dout: Tensor
) -> Gradients:
    heads, kv_heads = q.shape[1], k.shape[1]
    queries, keys, values = _wide(q), _wide(expand(k, heads)), _wide(expand(v, heads))
    flow = _wide(dout)
    weights = ((queries @ keys.mT) * call.scale - lse[..., None]).exp()
    weights.masked_fill_(~call.visible(q.device), 0.0)
    dropped, dweights = weights, flow @ values.mT
    if call.dropout is not None:
        kept = call.dropout.keep(call.queries, call.keys).to(weights.dtype) / (1.0 - call.dropout.probability)
        dropped, dweights = weights * kept, dweights * kept
    dscores = weights * (dweights - (flow * _wide(out)).sum(-1, keepdim=True)) * call.scale
    dq, dk, dv = dscores @ keys, dscores.mT @ queries, dropped.mT @ flow
    return dq.to(q.dtype), collapse(dk, kv_heads).to(k.dtype), collapse(dv, kv_heads).to(v.dtype)


def _flash_cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, scale=scale
    )
    return out, lse


def _flash_cpu_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, is_causal: bool, scale: float
) -> Gradients:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, is_causal, scale=scale
    )
    return dq, dk, dv


def _flash_cpu_accepts(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float32, torch.float64)
        and q.shape[-1] >= v.shape[-1]
        and call.dropout is None
    )


def _always(*_: object) -> bool:
    return True


ATTENTION = Op(
    "attention",
    (
        *attention_cuda.IMPLEMENTATIONS,
        dense_implementation(
            "flash_cpu",
            with_even_values(Kernel(_flash_cpu_forward, _flash_cpu_backward)),
            accepts=_flash_cpu_accepts,
        ),
        Implementation("plain", _plain_forward, _always, _plain_backward),
    ),
)
