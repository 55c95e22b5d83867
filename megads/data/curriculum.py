"""Schedules of the sequence length: which length each step has.

Lives here: the difficulty values of DeepSpeed's `CurriculumScheduler` (`fixed_linear`, `fixed_root`,
`fixed_discrete`), number for number, and where they change. Does not live here: what a change does to the data (plan,
segment). Imports nothing, so that cross-checks may use it.

    fixed_linear, fixed_root    start + (end - start) * (step / steps) ** (1 / root), down to a multiple of unit
    fixed_discrete              lengths[i] while step <= until[i], then end
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Curriculum(Protocol):
    """Length as a function of the step; it never shrinks."""

    def length(self, step: int) -> int:
        """Tokens of a sample in `step` (from 1)."""

    def next_change(self, step: int) -> int | None:
        """The first step after `step` with another length; None: there is none."""


@dataclass(frozen=True, slots=True)
class Constant:
    """One length for all steps."""

    end: int

    def length(self, step: int) -> int:
        return self.end

    def next_change(self, step: int) -> int | None:
        return None


@dataclass(frozen=True, slots=True)
class Root:
    """From `start` to `end` in `steps` steps, along a root of the given degree; degree 1 is linear.

    An `end` that is no multiple of `unit` is reached later: where the next multiple would be.
    """

    start: int
    end: int
    steps: int
    unit: int
    degree: int = 1

    def length(self, step: int) -> int:
        share: float = (float(step) / self.steps) ** (1.0 / self.degree)
        length = math.floor(share * (self.end - self.start) + self.start)
        first = -(-self.start // self.unit) * self.unit
        return min(max(length - length % self.unit, first), self.end)

    def next_change(self, step: int) -> int | None:
        now = self.length(step)
        if now == self.end:
            return None
        before, after = step, step + 1
        while self.length(after) == now:
            before, after = after, after + (after - step)
        while after - before > 1:
            middle = (before + after) // 2
            before, after = (middle, after) if self.length(middle) == now else (before, middle)
        return after


@dataclass(frozen=True, slots=True)
class Discrete:
    """`lengths[i]` up to step `until[i]`, and `end` after the last."""

    lengths: tuple[int, ...]
    until: tuple[int, ...]
    end: int

    def length(self, step: int) -> int:
        for length, last in zip(self.lengths, self.until, strict=True):
            if step <= last:
                return length
        return self.end

    def next_change(self, step: int) -> int | None:
        later = (last + 1 for last in self.until if last >= step)
        return next((first for first in later if self.length(first) != self.length(step)), None)


def all_lengths(curriculum: Curriculum) -> tuple[int, ...]:
    """Every length that some step has, in order."""
    step: int | None = 1
    lengths = []
    while step is not None:
        lengths.append(curriculum.length(step))
        step = curriculum.next_change(step)
    return tuple(lengths)
