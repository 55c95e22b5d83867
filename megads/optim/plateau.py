"""A learning rate that goes down when validation no longer improves: the rule of torch's ReduceLROnPlateau.

Every rank sees the same validation losses and so comes to the same rate. What it remembers is in every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megads.config.schedule import PlateauConfig


class Plateau:
    """Attributes:
    num_reductions: how often the rate has gone down.
    """

    def __init__(self, config: PlateauConfig) -> None:
        self._config = config
        self._best: float | None = None
        self._num_bad = 0
        self._cooldown = 0
        self.num_reductions = 0

    @property
    def factor(self) -> float:
        """What the learning rate is multiplied by now."""
        return float(self._config.factor**self.num_reductions)

    def observe(self, loss: float) -> bool:
        """Take in a validation loss; returns whether the rate goes down now."""
        bound = math.inf if self._best is None else self._best * (1.0 - self._config.threshold)
        if loss < bound:
            self._best, self._num_bad = loss, 0
        else:
            self._num_bad += 1
        if self._cooldown > 0:
            self._cooldown -= 1
            self._num_bad = 0
        if self._num_bad <= self._config.patience:
            return False
        self.num_reductions += 1
        self._cooldown, self._num_bad = self._config.cooldown, 0
        return True

    def state(self) -> Mapping[str, Any]:
        """JSON values."""
        return {
            "best": self._best,
            "bad": self._num_bad,
            "cooldown": self._cooldown,
            "reductions": self.num_reductions,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self._best = None if state["best"] is None else float(state["best"])
        self._num_bad, self._cooldown = int(state["bad"]), int(state["cooldown"])
        self.num_reductions = int(state["reductions"])
