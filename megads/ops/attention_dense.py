"""Kernels that know causal and full blocks only, run over what documents leave of a call.

A kernel is a pair of functions on dense blocks; `dense_implementation` makes an implementation of attention of it: one
call where documents hide nothing, else one call a rectangle. Queries that see no key get output 0 and log-sum-exp
-inf, whatever kernels would say of them. `with_even_values` is for kernels that want values as wide as keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.ops.attention_call import Call
from megads.ops.registry import Implementation

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Kernel:
    """Attention of dense blocks [batch, heads, seq, dim], keys and values with the same number of heads or fewer.

    Attributes:
        forward: (q, k, v, is_causal, scale) -> (out, lse).
        backward: (q, k, v, out, lse, dout, is_causal, scale) -> (dq, dk, dv). out and lse may be those of more keys
            than the block has.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Gradients]


def dense_implementation(name: str, kernel: Kernel, *, accepts: Callable[..., bool]) -> Implementation:
    """An implementation of attention that runs `kernel` once a rectangle."""

    def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        if call.is_dense:
            return kernel.forward(q, k, v, call.is_causal, call.scale)
        out = empty_output(q, v).zero_()
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide(q.dtype), device=q.device)
        for part in call.rectangles:
            i, j = part.of_queries, part.of_keys
            out[i], lse[i] = kernel.forward(q[i], k[j], v[j], call.is_causal, call.scale)
        return out, lse

    def _backward(
        q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, dout: Tensor
    ) -> Gradients:
        if call.is_dense:
            return kernel.backward(q, k, v, out, lse, dout, call.is_causal, call.scale)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for part in call.rectangles:
            i, j = part.of_queries, part.of_keys
            dq[i], dk[j], dv[j] = kernel.backward(
                q[i], k[j], v[j], out[i], lse[i], dout[i], call.is_causal, call.scale
            )
        return dq, dk, dv

    return Implementation(name, _forward, accepts, _backward)


def fill_values(x: Tensor, dim: int) -> Tensor:
    """Values, or what is made of them, filled up with zeros to the width of keys; they add nothing."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def with_even_values(kernel: Kernel) -> Kernel:
    """A kernel that wants values as wide as keys, for values that may be narrower."""

    def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = kernel.forward(q, k, fill_values(v, q.shape[-1]), is_causal, scale)
        return out[..., : v.shape[-1]], lse

    def _backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, is_causal: bool, scale: float
    ) -> Gradients:
        values, made, flow = (fill_values(x, q.shape[-1]) for x in (v, out, dout))
        dq, dk, dv = kernel.backward(q, k, values, made, lse, flow, is_causal, scale)
        return dq, dk, dv[..., : v.shape[-1]]

    return Kernel(_forward, _backward)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which softmax is computed and blocks are added up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_output(q: Tensor, v: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """[batch, heads, queries, v_dim], in memory as [queries, batch, heads, v_dim], as the layers want it."""
    batch, heads, seq, _ = q.shape
    return q.new_empty(seq, batch, heads, v.shape[-1], dtype=dtype).permute(1, 2, 0, 3)
