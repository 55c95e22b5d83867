"""Activations of the feed-forward layer. Bound by memory: each input read once, each output written once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as GPT-2 has it (Hendrycks and Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone; the gradients are those that autograd finds, bit for bit."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,), (dy,) = ctx.saved_tensors, gradients
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        d_gate, d_up = result.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return result


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). gate_up: [..., 2 x ffn], gate first -> [..., ffn]."""
    return _SwiGLU.apply(gate_up)  # type: ignore[no-any-return,no-untyped-call]
