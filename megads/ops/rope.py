"""Rotary position embedding (Su et al. 2021), half-split pairs: element i turns with element i + dim/2, as Llama does.

Bound by memory: reads and writes its argument once each way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, *, dim: int, theta: float) -> Tensor:
    """Angles position x theta^(-2i/dim) in float64 precision.

    Args:
        positions: [batch, seq] int64.
        dim: head dim, even.
        theta: base of the frequencies.

    Returns:
        [batch, seq, dim/2] float64.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    return positions[..., None] * (1.0 / theta**exponents)


def rotary(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + dim/2]) by `angles[i]`.

    Args:
        x: [batch, heads, seq, dim].
        angles: [batch, seq, dim/2] from `rotary_angles`.
    """
    cos = angles.cos().to(x.dtype)[:, None]  # [batch, 1, seq, dim/2]
    sin = angles.sin().to(x.dtype)[:, None]
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
