"""Rotary position embedding (Su et al. 2021), half-split pairs: element i turns with element i + dim/2, as Llama does.

Bound by memory: reads and writes its argument once each way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Frequencies of Llama 3.1 (Grattafiori et al. 2024, section 3.4.2): slow pairs are stretched, fast ones kept.

        turns over the original context     few_turns        many_turns
        frequency                      / factor  |  in between  |  as it was

    Attributes:
        factor: by how much slow pairs turn slower.
        original_positions: length of the context before it was stretched.
        few_turns, many_turns: how often a pair turns over that length; between the two the change is linear.
    """

    factor: float
    original_positions: int
    few_turns: float
    many_turns: float

    def frequencies(self, plain: Tensor) -> Tensor:
        """[pairs] radians a position, as they were -> as they are stretched."""
        turns = plain * (self.original_positions / (2 * math.pi))
        kept = ((turns - self.few_turns) / (self.many_turns - self.few_turns)).clamp(0.0, 1.0)
        return plain * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How positions turn queries and keys.

    Attributes:
        theta: base of the frequencies.
        scaling: how they are changed for contexts longer than a model was first trained on; None: not.
    """

    theta: float
    scaling: Llama3Scaling | None = None


def rotary_angles(positions: Tensor, rope: RopeSpec, *, dim: int) -> Tensor:
    """Angles position x frequency in float64 precision; the frequency of pair i is theta^(-2i/dim), maybe scaled.

    Args:
        positions: [batch, seq] int64.
        dim: of what is turned, even.

    Returns:
        [batch, seq, dim/2] float64.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling is not None:
        frequencies = rope.scaling.frequencies(frequencies)
    return positions[..., None] * frequencies


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
