"""The learning rate of a run: its schedule over the history, and what validation has done to it.

What the schedule is a function of is arithmetic (`optim/schedule.py`); the only state is that of `optim/plateau.py`. It
is in every checkpoint, as `schedule`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megads.config.root import Config
from megads.config.schedule import PlateauConfig
from megads.data.segment import Segment, tokens_by
from megads.optim.plateau import Plateau
from megads.optim.schedule import learning_rate

_log = logging.getLogger("megads.train")


class Pace:
    """The learning rates of one run."""

    def __init__(self, config: Config) -> None:
        self._optim = config.optim
        self._steps = config.run.steps
        has_plateau = config.optim.decay == "plateau"
        self._plateau = Plateau(config.optim.plateau or PlateauConfig()) if has_plateau else None

    def rate(self, step: int, history: Sequence[Segment]) -> float:
        """The learning rate of a step."""
        lr = learning_rate(step, self._optim, total_steps=self._steps, tokens_by=partial(tokens_by, history))
        if self._plateau is None or not self._plateau.num_reductions:
            return lr
        return min(lr, max(self._optim.min_lr, lr * self._plateau.factor))

    def observe(self, losses: Sequence[float], *, step: int) -> None:
        """Take in the losses of a validation, one a corpus, alike on all ranks: their mean is what counts."""
        if self._plateau is not None and losses and self._plateau.observe(sum(losses) / len(losses)):
            _log.info(
                "step %d: validation no longer improves; the learning rate is now %g of its schedule",
                step,
                self._plateau.factor,
            )

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {} if self._plateau is None else dict(self._plateau.state())

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; that of a schedule without state changes nothing."""
        if self._plateau is not None and state:
            self._plateau.load(state)
