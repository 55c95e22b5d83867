"""Causal attention as an op with its own backward: `attention(q, k, v) -> (out, lse)`.

The log-sum-exp of the scores is part of the result, so that blocks of keys can be merged later (ring
attention), and the backward is computed from (q, k, v, out, lse) alone. Implementations, in order of preference:

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
from megads.ops.attention_call import Call, Documents, collapse, expand
from megads.ops.attention_call import Dropout as Dropout
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
    documents: Documents | Tensor | None = None,
    dropout: Dropout | None = None,
) -> AttentionResult:
    """Causal softmax(q k^T scale) v, each query head with the key/value head of its group.

    Args:
        q: [batch, heads, seq, dim].
        k, v: [batch, kv_heads, seq, dim]; heads is a multiple of kv_heads, consecutive heads share one.
        scale: of the scores, usually dim ** -0.5.
        documents: [batch, seq] ids, constant within a document; None: one document a row. Where they begin is read
            on the host: calls with the same ids share that by passing one `Documents`.
        dropout: of the attention weights after softmax; the lse is that of the scores without it.

    Returns:
        `out` is differentiable; `lse` is not.
    """
    if isinstance(documents, Tensor):
        documents = Documents(documents)
    out, lse = _Attention.apply(q, k, v, Call(scale, documents, dropout))  # type: ignore[no-untyped-call]
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


def _wide(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def _visible(q: Tensor, call: Call) -> Tensor:
    seq = q.shape[2]
    mask = torch.ones(seq, seq, dtype=torch.bool, device=q.device).tril()
    if call.documents is None:
        return mask
    ids = call.documents.ids
    return mask & (ids[:, None, :, None] == ids[:, None, None, :])


def _plain_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    scores = (_wide(q) @ _wide(expand(k, heads)).mT) * call.scale  # [batch, heads, seq, seq]
    scores.masked_fill_(~_visible(q, call), float("-inf"))
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp()
    if call.dropout is not None:
        weights = weights * call.dropout.keep() / (1.0 - call.dropout.probability)
    return (weights @ _wide(expand(v, heads))).to(q.dtype), lse


def _plain_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = q.shape[1], k.shape[1]
    queries, keys, values = _wide(q), _wide(expand(k, heads)), _wide(expand(v, heads))
    flow = _wide(dout)
    weights = ((queries @ keys.mT) * call.scale - lse[..., None]).exp()
    weights.masked_fill_(~_visible(q, call), 0.0)
    dropped, dweights = weights, flow @ values.mT
    if call.dropout is not None:
        kept = call.dropout.keep().to(weights.dtype) / (1.0 - call.dropout.probability)
        dropped, dweights = weights * kept, dweights * kept
    dscores = weights * (dweights - (flow * _wide(out)).sum(-1, keepdim=True)) * call.scale
    dq, dk, dv = dscores @ keys, dscores.mT @ queries, dropped.mT @ flow
    return dq.to(q.dtype), collapse(dk, kv_heads).to(k.dtype), collapse(dv, kv_heads).to(v.dtype)


def _flash_cpu_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    batch, _, seq, _ = q.shape
    out, lse = torch.empty_like(q), _wide(q.new_empty(q.shape[:3]))
    for block in call.blocks(batch, seq):
        out[block], lse[block] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[block], k[block], v[block], 0.0, True, scale=call.scale
        )
    return out, lse


def _flash_cpu_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for block in call.blocks(q.shape[0], q.shape[2]):
        dq[block], dk[block], dv[block] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout[block], q[block], k[block], v[block], out[block], lse[block], 0.0, True, scale=call.scale
        )
    return dq, dk, dv


def _flash_cpu_accepts(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.bfloat16, torch.float32, torch.float64)
        and q.shape[-1] == v.shape[-1]
        and call.dropout is None
    )


def _always(*_: object) -> bool:
    return True


ATTENTION = Op(
    "attention",
    (
        *attention_cuda.IMPLEMENTATIONS,
        Implementation("flash_cpu", _flash_cpu_forward, _flash_cpu_accepts, _flash_cpu_backward),
        Implementation("plain", _plain_forward, _always, _plain_backward),
    ),
)
