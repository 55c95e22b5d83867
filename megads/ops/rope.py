"""Rotary position embedding (Su et al. 2021), and how its frequencies are stretched for longer contexts.

    half-split    element i turns with element i + dim/2    as Llama and most do
    interleaved   element 2i turns with element 2i + 1      as the paper and DeepSeek do

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
class YarnScaling:
    """Frequencies of YaRN (Peng et al. 2023, section 3.2): fast pairs are kept, slow ones stretched.

        pair            0 ... low      low ... high      high ... dim/2
        frequency       as it was  |  in between  |  / factor

    Attributes:
        factor: by how much slow pairs turn slower.
        original_positions: length of the context before it was stretched.
        many_turns, few_turns: how often the pairs low and high turn over that length.
        rounds: whether low is rounded down to a whole pair, and high up.
        magnitude: what cosines and sines are multiplied by (section 3.3).
    """

    factor: float
    original_positions: int
    many_turns: float = 32.0
    few_turns: float = 1.0
    rounds: bool = True
    magnitude: float = 1.0

    def frequencies(self, plain: Tensor, *, theta: float) -> Tensor:
        """[pairs] radians a position, as they were -> as they are stretched."""
        num_pairs = plain.shape[0]

        def pair(turns: float) -> float:
            return num_pairs * math.log(self.original_positions / (2 * math.pi * turns)) / math.log(theta)

        low, high = pair(self.many_turns), pair(self.few_turns)
        if self.rounds:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num_pairs - 1)
        width = high - low or 0.001
        index = torch.arange(num_pairs, dtype=plain.dtype, device=plain.device)
        stretched = ((index - low) / width).clamp(0.0, 1.0)
        return plain * (1 - stretched) + plain / self.factor * stretched


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1: by how much attention is sharpened in a context stretched by `factor`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How positions turn queries and keys.

    Attributes:
        theta: base of the frequencies.
        scaling: how they are changed for contexts longer than a model was first trained on; None: not.
        is_interleaved: whether neighbours are a pair; else the halves are.
    """

    theta: float
    scaling: Llama3Scaling | YarnScaling | None = None
    is_interleaved: bool = False

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.magnitude if isinstance(self.scaling, YarnScaling) else 1.0


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
    if isinstance(rope.scaling, YarnScaling):
        frequencies = rope.scaling.frequencies(frequencies, theta=rope.theta)
    elif rope.scaling is not None:
        frequencies = rope.scaling.frequencies(frequencies)
    return positions[..., None] * frequencies


def rotary(x: Tensor, angles: Tensor, *, rope: RopeSpec) -> Tensor:
    """Rotate the pairs of x, pair i by `angles[i]`.

    Args:
        x: [batch, heads, seq, dim].
        angles: [batch, seq, dim/2] from `rotary_angles`.
    """
    cos = (angles.cos() * rope.magnitude).to(x.dtype)[:, None]  # [batch, 1, seq, dim/2]
    sin = (angles.sin() * rope.magnitude).to(x.dtype)[:, None]
    if rope.is_interleaved:
        left, right = x.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
        return torch.stack((left * cos - right * sin, right * cos + left * sin), dim=-1).flatten(-2)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
