"""What an optimizer engine promises the trainer. Engines: `zero.py` (native, the reference), `deepspeed_engine.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megads.parallel.parameter import Piece


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did; tensors stay on the device.

    Attributes:
        grad_norm: global gradient norm before clipping, float64 scalar.
        finite: bool scalar; False: a gradient was not finite, and the step changed nothing.
        taken: bool scalar; False: the step changed nothing, for that reason or because a guard did not admit it.
        loss_scale: of the next step, scalar.
        tallies: what layers counted in the step over all ranks (`parallel/tally.py`), [rows, columns] float64; no rows
            where nothing is counted.
    """

    grad_norm: Tensor
    finite: Tensor
    taken: Tensor
    loss_scale: Tensor
    tallies: Tensor


class Guard(Protocol):
    """What may keep a step from being taken (`optim/guard.py`)."""

    def admits(self, norm: Tensor) -> Tensor:
        """Whether the step with this gradient norm is taken: bool scalar on the device, alike on all ranks."""


class Engine(Protocol):
    """Owns gradients and optimizer state of this rank's parameters."""

    @property
    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before the backward, a scalar on the device."""

    def zero_gradients(self) -> None:
        """Start a step."""

    @property
    def reduce_every(self) -> int | None:
        """Micro-batches of a stage after which its gradients are to be reduced; None: at the end of the step alone."""

    def arm(self, stage: int, *, waiting: Sequence[Tensor] | None = None) -> None:
        """What comes next completes the gradients of a stage, and reductions may start inside it.

        A last W names the parameters that it has `waiting` and tells each to `complete`; None: a whole backward.
        """

    def complete(self, stage: int, parameter: Tensor) -> None:
        """One of the parameters that were waiting has its gradient."""

    def reduce(self, stage: int) -> None:
        """Gradients of a stage are complete on this rank: sum them over the ranks that share them."""

    def step(self, *, lr: float, guard: Guard | None = None) -> StepReport:
        """Clip, update, and make every rank's weights current, if gradients are finite and `guard` admits it."""

    def state(self) -> tuple[Piece, ...]:
        """What this rank saves: over all ranks every element of weights and optimizer state exactly once."""

    def targets(self) -> tuple[Piece, ...]:
        """What this rank needs when loading: all that it holds."""

    def scalars(self) -> Mapping[str, Any]:
        """State that is no tensor, as JSON values."""

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave."""
