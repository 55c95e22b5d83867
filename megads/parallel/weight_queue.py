"""Weight gradients as work that may wait: what splits a backward into input gradients (I) and weight gradients (W).

A layer's backward computes the gradient of its input at once and puts the product that makes its weight's gradient
here. Outside a split backward the work runs at once; inside, it is kept for the stage and micro-batch until W asks for
it, in the order of the backward, so sums are the same under every schedule:

    B          backward of the graph:  dx, then dW at once
    I ... W    backward of the graph:  dx, dW kept  ...  the kept dW, in order

Nothing of the forward is run twice (Qi et al. 2023, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Work = Callable[[], None]


class WeightQueue:
    """Runs weight-gradient work at once, or keeps it while a backward is split. One for all layers of a rank."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[Work]] = {}
        self._open: list[Work] | None = None

    def put(self, work: Work) -> None:
        """Run `work`, which adds to one parameter's `.grad`, now or when its W comes. It may issue collectives."""
        if self._open is None:
            work()
        else:
            self._open.append(work)

    @contextmanager
    def deferring(self, stage: int, micro_batch: int) -> Iterator[None]:
        """Inside, keep the work for `run(stage, micro_batch)`."""
        self._open = self._kept.setdefault((stage, micro_batch), [])
        try:
            yield
        finally:
            self._open = None

    def run(self, stage: int, micro_batch: int) -> None:
        """Do what was kept for a stage and micro-batch, in the order of its backward."""
        with torch.no_grad():
            for work in self._kept.pop((stage, micro_batch), ()):
                work()

    @property
    def num_kept(self) -> int:
        """Pieces of work that wait."""
        return sum(map(len, self._kept.values()))
