"""Published bubbles of schedules as formulas: what `simulate.py` is held to, and what the `schedule` verb prints.

The bubble is the idle time between a rank's first start and its last stop, on the rank where that span is longest. All
stages cost the same. A formula that holds under a condition is None where the condition does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a schedule is built for.

    Args:
        num_ranks: p.
        num_micro_batches: m.
        num_chunks: v, stages of one direction on a rank.
    """

    num_ranks: int
    num_micro_batches: int
    num_chunks: int = 1


@dataclass(frozen=True, slots=True)
class Work:
    """Durations of one micro-batch on all stages of a rank, in any one unit."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    @property
    def total(self) -> float:
        return self.forward + self.backward

    @property
    def is_equal(self) -> bool:
        """F = I = W."""
        return math.isclose(self.forward, self.input_gradient) and math.isclose(
            self.forward, self.weight_gradient
        )


Bubble = Callable[[Sizes, Work], float | None]


def fill_and_drain(sizes: Sizes, work: Work) -> float:
    """GPipe and 1F1B, any m: (p - 1)(F + B). Narayanan et al. 2021, section 2.2.1."""
    return (sizes.num_ranks - 1) * work.total


def interleaved(sizes: Sizes, work: Work) -> float | None:
    """(p - 1)(F + B) / v, for whole rounds of p micro-batches. Narayanan et al. 2021, section 2.2.2."""
    if sizes.num_chunks > 1 and sizes.num_micro_batches % sizes.num_ranks:
        return None
    return fill_and_drain(sizes, work) / sizes.num_chunks


def zero_bubble_h1(sizes: Sizes, work: Work) -> float | None:
    """(p - 1)(F + I - W), for W <= min(F, I) and m >= p. Qi et al. 2024, table 2 (the condition was found here)."""
    p, f, i, w = sizes.num_ranks, work.forward, work.input_gradient, work.weight_gradient
    return (p - 1) * (f + i - w) if w <= min(f, i) and sizes.num_micro_batches >= p else None


def zero_bubble_h2(sizes: Sizes, work: Work) -> float | None:
    """(p - 1)(F + I - 2W), for W <= min(F, I) and m >= 2p - 1. Qi et al. 2024, table 2 (condition found here)."""
    p, f, i, w = sizes.num_ranks, work.forward, work.input_gradient, work.weight_gradient
    return (p - 1) * (f + i - 2 * w) if w <= min(f, i) and sizes.num_micro_batches >= 2 * p - 1 else None


def zbv(sizes: Sizes, work: Work) -> float | None:
    """No bubble where F = I = W and m >= 2p - 1. Qi et al. 2024, section 6."""
    return 0.0 if work.is_equal and sizes.num_micro_batches >= 2 * sizes.num_ranks - 1 else None


def dualpipe_v(sizes: Sizes, work: Work) -> float | None:
    """(p - 1)(F&B + B - 3W) of one stage, half a rank, where F = I = W, F&B = F + B and m >= 2p.

    DualPipe's README, with PP = 2p stages; not exact for uneven costs.
    """
    is_known = work.is_equal and sizes.num_micro_batches >= 2 * sizes.num_ranks
    return (sizes.num_ranks - 1) * work.forward if is_known else None


def dualpipe(sizes: Sizes, work: Work) -> float | None:
    """(p / 2 - 1)(F&B + B - 3W) where F = I = W, F&B = F + B and m >= 2p. DeepSeek-AI 2024, table 2."""
    is_known = work.is_equal and sizes.num_micro_batches >= 2 * sizes.num_ranks
    return (sizes.num_ranks / 2 - 1) * 2 * work.forward if is_known else None
