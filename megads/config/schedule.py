"""Parts of the config section `optim` that shape the learning rate: lengths in steps or tokens, tails, pieces.

The flat keys (`optim.warmup_steps`, `optim.decay`, ...) are in `optim.py`; what they mean together, in
`optim/schedule.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megads.config.section import section

Shape = Literal["linear", "cosine", "sqrt", "exponential"]


@section
class LengthConfig:
    """A length of the schedule: {steps: N} or {tokens: N}."""

    steps: PositiveInt | None = None
    """Optimizer steps."""
    tokens: PositiveInt | None = None
    """Tokens, over all ranks."""


@section
class TailConfig:
    """The decay of `optim.decay` wsd: how the learning rate goes down at the end."""

    shape: Shape = "linear"
    """From 1 to 0 with r, the part of the tail that is over. linear: 1 - r. cosine: (1 + cos(pi r)) / 2. sqrt: 1 -
    sqrt(r) (Haegele et al. 2024). exponential: 2 x 0.5^r - 1."""
    steps: PositiveInt | None = None
    """Its length in steps."""
    tokens: PositiveInt | None = None
    """Its length in tokens."""


@section
class RestartsConfig:
    """The cycles of `optim.decay` cosine_restarts (Loshchilov and Hutter 2017)."""

    steps: PositiveInt | None = None
    """Steps of the first cycle."""
    tokens: PositiveInt | None = None
    """Tokens of the first cycle."""
    growth: PositiveInt = 1
    """How many times longer each cycle is than the one before."""


@section
class PieceConfig:
    """One piece of `optim.decay` pieces."""

    tokens: PositiveInt | None = None
    """Tokens read by its end, counted from the run's first; null: it goes on to the end of the run."""
    shape: Literal["constant", "linear", "cosine", "sqrt", "exponential"] = "constant"
    """constant: `lr` from its first step on; others: the way from the rate before to `lr`, as in `optim.tail`."""
    lr: NonNegativeFloat | None = None
    """Learning rate of a constant piece, or at the end of another; null: that of the piece before."""


@section
class PlateauConfig:
    """What `optim.decay` plateau does when validation no longer improves; the rule of torch's ReduceLROnPlateau."""

    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """What the learning rate is multiplied by, down to `optim.min_lr`."""
    patience: NonNegativeInt = 10
    """Validations without improvement that are let pass."""
    threshold: NonNegativeFloat = 1e-4
    """Part of the best loss by which a loss must be lower to count as an improvement."""
    cooldown: NonNegativeInt = 0
    """Validations after a reduction that do not count."""
