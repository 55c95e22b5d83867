"""What a cross-check says no to, and the arithmetic of its offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megads.config.root import Config


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says no to.

    Attributes:
        key: the key to change first.
        found: its value and what it does not fit, with the arithmetic.
        allowed: the nearest values that fit.
        do: another way out, if there is one.
    """

    key: str
    found: str
    allowed: str
    do: str | None = None

    def __str__(self) -> str:
        lines = [self.key, f"  found:   {self.found}", f"  allowed: {self.allowed}"]
        return "\n".join([*lines, f"  do:      {self.do}"] if self.do else lines)


Rule = Callable[[Config, int], Finding | None]


def multiples(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def divisors(value: int) -> str:
    return ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)
