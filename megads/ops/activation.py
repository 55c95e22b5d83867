"""Activations of the feed-forward layer. Bound by memory: each input read once, each output written once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as GPT-2 has it (Hendrycks and Gimpel 2016, section 2)."""
    return F.gelu(x, approximate="tanh")


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020). gate_up: [..., 2 x ffn], gate first -> [..., ffn]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
