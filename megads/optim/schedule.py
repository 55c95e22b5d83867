"""The learning rate as a function of the step and the tokens read by then. No state: resuming is arithmetic.

    warm-up   then `optim.decay`
     /\\           cosine, linear    from lr to min_lr, which is reached at the end
    /   \\___       wsd               lr, and in the last stretch a tail down to min_lr
                   cosine_restarts   cosines from lr to min_lr, one after another
                   inverse_sqrt      lr x sqrt(t / (t + x)), x since the warm-up
                   pieces            a list of stretches in tokens
                   constant, plateau lr (what validation does to it: `plateau.py`)

All is counted in steps, or, as soon as one key of the schedule is given in tokens, in tokens: those that the history of
the run has read by the end of the step. Then a ramp of the batch, a restart or another layout moves no point of it.
What is given in steps beside them (`warmup_steps`, `decay_steps`, the run's last step) is a place in the same history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megads.config.optim import OptimConfig
from megads.config.schedule import LengthConfig, RestartsConfig, TailConfig

TokensBy = Callable[[int], int]
"""Step -> tokens that it and the steps before it read, over all ranks."""

# from 1 to 0 as r goes from 0 to 1: see `config/schedule.py`
SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda r: 1.0 - r,
        "cosine": lambda r: 0.5 * (1.0 + math.cos(math.pi * r)),
        "sqrt": lambda r: 1.0 - math.sqrt(r),
        "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    }
)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a step stands, in steps or tokens: `now`, between the end of the warm-up and that of the decay."""

    now: int
    start: int
    end: int


def counts_tokens(config: OptimConfig) -> bool:
    """Whether some key of the schedule is given in tokens."""
    lengths = (config.tail, config.restarts, config.timescale)
    flat = (config.warmup_tokens, config.decay_tokens, config.pieces)
    return any(value is not None for value in flat) or any(
        length is not None and length.tokens is not None for length in lengths
    )


def learning_rate(step: int, config: OptimConfig, *, total_steps: int, tokens_by: TokensBy) -> float:
    """Learning rate of optimizer step `step` (from 1).

    Linear from 0 to `lr` over the warm-up, reached at its last step; then as `decay` says. A decay with an end has it
    at `decay_steps` or `decay_tokens` (default `total_steps`), and is constant from there.
    """

    def place(step: int) -> int:
        return tokens_by(step) if counts_tokens(config) else step

    if config.warmup_tokens is not None:
        passed, start = tokens_by(step), config.warmup_tokens
    else:
        passed, start = step, config.warmup_steps
    if passed < start:
        return config.lr * passed / start
    return _decayed(
        _Place(
            now=place(step),
            start=config.warmup_tokens or place(config.warmup_steps),
            end=config.decay_tokens or place(config.decay_steps or total_steps),
        ),
        config,
    )


def _decayed(place: _Place, config: OptimConfig) -> float:
    """The learning rate behind the warm-up."""
    if config.decay == "cosine_restarts":
        shape = SHAPES["cosine"](_part_of_cycle(place, config.restarts))
    elif config.decay == "inverse_sqrt":
        timescale = _length(config.timescale) or place.start
        return max(config.min_lr, config.lr * math.sqrt(timescale / (place.now - place.start + timescale)))
    elif config.decay == "wsd" and config.tail is not None:
        start = max(place.start, place.end - _length(config.tail))
        shape = SHAPES[config.tail.shape](_part(place.now, start, place.end))
    elif config.decay == "pieces":
        return _piece_rate(place, config)
    elif config.decay in ("cosine", "linear"):
        shape = SHAPES[config.decay](_part(place.now, place.start, place.end))
    else:
        return config.lr
    return config.min_lr + (config.lr - config.min_lr) * shape


def _length(given: LengthConfig | TailConfig | RestartsConfig | None) -> int:
    """Steps or tokens of a length; 0: none is given."""
    return 0 if given is None else given.tokens or given.steps or 0


def _part(now: int, start: int, end: int) -> float:
    """How much of start .. end is over: 0 .. 1."""
    return min(1.0, max(0, now - start) / max(1, end - start))


def _part_of_cycle(place: _Place, restarts: RestartsConfig | None) -> float:
    passed, length = place.now - place.start, _length(restarts)
    assert restarts is not None  # a rule of the config
    if restarts.growth == 1:
        return passed % length / length
    while passed >= length:
        passed, length = passed - length, length * restarts.growth
    return passed / length


def _piece_rate(place: _Place, config: OptimConfig) -> float:
    """The rate on the piece that holds this place; behind the last it stays."""
    start, rate = place.start, config.lr
    for piece in config.pieces or ():
        target = rate if piece.lr is None else piece.lr
        if piece.tokens is None or place.now <= piece.tokens:
            if piece.shape == "constant" or piece.tokens is None:
                return target
            return target + (rate - target) * SHAPES[piece.shape](_part(place.now, start, piece.tokens))
        start, rate = piece.tokens, target
    return rate
