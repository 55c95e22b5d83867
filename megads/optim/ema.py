"""Running averages of the masters (EMA): a second set of weights that is evaluated and exported.

    after each step that was taken      average <- average + (1 - decay) x (master - average)        for every decay

The rule is torch's (`torch.optim.swa_utils.get_ema_multi_avg_fn`). An average is cut as the masters are, in their dtype
and on their device, costs one copy of them a decay, and is in checkpoints under the kind of `kind_of`:
`ema_0.999/NAME`. It begins as the weights are when it begins: before the first step, or where a run that goes on has a
new decay.

`AveragingEngine` is any engine with averages: what it does not say here it hands to that engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megads.optim.engine import Engine, Guard, StepReport
from megads.optim.share import Share
from megads.parallel.parameter import Piece


def kind_of(decay: float) -> str:
    """The kind of an average in checkpoints, which is also its name on command lines."""
    return f"ema_{decay}"


class SharedEngine(Engine, Protocol):
    """An engine that says what this rank updates."""

    def shares(self) -> tuple[Share, ...]:
        """What this rank updates."""


class Ema:
    """Averages of some shares' masters, one for each decay."""

    def __init__(self, shares: Sequence[Share], decays: Sequence[float]) -> None:
        self._shares = tuple(shares)
        self._averages = {
            decay: tuple(torch.zeros_like(share.master, requires_grad=False) for share in self._shares)
            for decay in decays
        }
        self._begun: set[float] = set()

    @property
    def begun(self) -> tuple[float, ...]:
        """The decays whose averages have a value."""
        return tuple(decay for decay in self._averages if decay in self._begun)

    @torch.no_grad()
    def begin(self) -> None:
        """Let the averages without a value be the masters."""
        for decay in self._averages.keys() - self._begun:
            for share, average in zip(self._shares, self._averages[decay], strict=True):
                average.copy_(share.master)
            self._begun.add(decay)

    @torch.no_grad()
    def update(self, taken: Tensor) -> None:
        """After a step: bool scalar on the device, False: no average moves."""
        for decay, averages in self._averages.items():
            weight = taken.to(torch.float64) * (1.0 - decay)
            for share, average in zip(self._shares, averages, strict=True):
                average.lerp_(share.master, weight.to(average))

    def states(self) -> Iterator[tuple[Share, str, Tensor]]:
        """Every average of every share, flat, by kind."""
        for decay, averages in self._averages.items():
            for share, average in zip(self._shares, averages, strict=True):
                yield share, kind_of(decay), average

    def load(self, saved: Sequence[float]) -> None:
        """The averages of these decays have been filled."""
        self._begun = {decay for decay in saved if decay in self._averages}


class AveragingEngine:
    """An engine whose masters are averaged.

    Args:
        engine: does all else.
        decays: of the averages, each one once.
    """

    def __init__(self, engine: SharedEngine, decays: Sequence[float]) -> None:
        self._engine = engine
        self._ema = Ema(engine.shares(), decays)
        self.zero_gradients = engine.zero_gradients
        self.reduce_every = engine.reduce_every
        self.arm = engine.arm
        self.complete = engine.complete
        self.reduce = engine.reduce

    @property
    def loss_scale(self) -> Tensor:
        """See `Engine`."""
        return self._engine.loss_scale

    def step(self, *, lr: float, guard: Guard | None = None) -> StepReport:
        """See `Engine`; then the averages follow."""
        self._ema.begin()
        report = self._engine.step(lr=lr, guard=guard)
        self._ema.update(report.taken)
        return report

    def state(self) -> tuple[Piece, ...]:
        """See `Engine`."""
        self._ema.begin()
        averages = self._ema.states()
        owned = (p for share, kind, flat in averages for p in share.owned_pieces(flat, kind=kind))
        return (*self._engine.state(), *owned)

    def targets(self) -> tuple[Piece, ...]:
        """See `Engine`. A checkpoint may lack averages: they begin with the next step."""
        averages = self._ema.states()
        held = (p for share, kind, flat in averages for p in share.pieces(flat, kind=kind))
        return (*self._engine.targets(), *held)

    def scalars(self) -> Mapping[str, Any]:
        """See `Engine`; `ema`: the decays of the averages."""
        return {**self._engine.scalars(), "ema": list(self._ema.begun)}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """See `Engine`; an average that they do not name begins with the next step."""
        self._engine.load_scalars(scalars)
        self._ema.load([float(decay) for decay in scalars.get("ema", ())])
