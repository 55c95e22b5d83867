"""Two outcomes, and whether one is the other to rounding: the bounds of promise 1, number by number.

    fp64        everything to 1e-12: the sharp test
    fp32        losses 1e-6 relative, gradients |dg| <= 1e-5 max(|g|, 1e-4 x global norm) for each fused part
    bf16, fp16  at most twice the error of one process in the same precision

A gradient is compared part by part of a fused weight (q, k, v), and never element by element: GPT-2's key bias has
gradient zero, so what is there is noise. Updated weights are compared by how far they moved. Why something differs is
asked in `diagnose.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from megads.parallel.shard import Box
from megads.verify.measure import LR
from megads.verify.outcome import MODEL, Array, Outcome
from megads.verify.trace import Deviation

NOISE = 1e-4  # share of the global norm below which a gradient's own size no longer counts


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest relative errors: of losses, gradients of step 1, its norm, the way of the weights, modules' outputs."""

    loss: float
    gradient: float
    norm: float
    weight: float
    output: float


BOUNDS: Mapping[str, Bounds] = MappingProxyType(
    {
        "fp64": Bounds(loss=1e-12, gradient=1e-12, norm=1e-12, weight=1e-9, output=1e-11),
        "fp32": Bounds(loss=1e-6, gradient=1e-5, norm=1e-5, weight=1e-3, output=1e-4),
    }
)
LOW_LOSS = 1e-3  # in bf16 and fp16 one process may hit a loss by luck; twice this is allowed in any case


@dataclass(frozen=True, slots=True)
class Row:
    """One fused part of one parameter.

    Attributes:
        name: of the parameter; `NAME#1` is its second fused part.
        parameter: its name.
        gradient: error of the gradient of step 1.
        deviation: of that gradient.
        weight: error of the weight's way from its initial value to the end.
        is_initial_equal: whether the initial weight has the same bits.
    """

    name: str
    parameter: str
    gradient: float
    deviation: Deviation
    weight: float
    is_initial_equal: bool

    @property
    def module(self) -> str:
        """`layers.0.attention.qkv` of `layers.0.attention.qkv.weight`."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An outcome beside the reference.

    Attributes:
        rows: by parameter, in the order of the forward.
        losses: relative errors by step.
        norm: relative error of the gradient norm of step 1.
        bounds: what is allowed.
        missing: parameters that only one of them has.
    """

    rows: tuple[Row, ...]
    losses: tuple[float, ...]
    norm: float
    bounds: Bounds
    missing: tuple[str, ...]
    outcome: Outcome
    reference: Outcome

    @property
    def wrong_losses(self) -> tuple[int, ...]:
        """Steps, from 1."""
        return tuple(n for n, error in enumerate(self.losses, 1) if not error <= self.bounds.loss)

    @property
    def wrong_gradients(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.gradient <= self.bounds.gradient)

    @property
    def wrong_weights(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.weight <= self.bounds.weight)

    @property
    def wrong_initial(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.is_initial_equal)

    @property
    def is_norm_wrong(self) -> bool:
        return not self.norm <= self.bounds.norm

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs by more than rounding."""
        return not (
            self.missing
            or self.outcome.misplaced
            or self.outcome.disagreements
            or self.wrong_initial
            or self.wrong_losses
            or self.wrong_gradients
            or self.is_norm_wrong
            or self.wrong_weights
        )


def compare(outcome: Outcome, reference: Outcome, *, bounds: Bounds) -> Comparison:
    """Set an outcome beside the fp64 outcome of one process."""
    total = sum(float(np.square(g.astype(np.float64)).sum()) for g in reference.gradients.values()) ** 0.5
    num_steps = len(outcome.losses)
    rows: list[Row] = []
    missing = sorted(outcome.facts.keys() ^ reference.facts.keys())
    for name, fact in reference.facts.items():
        if name in outcome.facts and name in outcome.gradients:
            for number, box in enumerate(fact.blocks):
                label = f"{name}#{number}" if len(fact.blocks) > 1 else name
                rows.append(_row(label, name, box, outcome=outcome, reference=reference, total=total))
        elif name not in missing:
            missing.append(name)
    for key in reference.final.keys() - {MODEL + name for name in reference.facts}:
        rows.append(_state_row(key, outcome=outcome, reference=reference))
    return Comparison(
        tuple(rows),
        tuple(
            abs(mine / theirs - 1.0)
            for mine, theirs in zip(outcome.losses, reference.losses[:num_steps], strict=True)
        ),
        abs(outcome.norms[0] / reference.norms[0] - 1.0),
        bounds,
        tuple(missing),
        outcome,
        reference,
    )


def _row(label: str, name: str, box: Box, *, outcome: Outcome, reference: Outcome, total: float) -> Row:
    mine, theirs = (o.gradients[name][box.slices].astype(np.float64) for o in (outcome, reference))
    deviation = Deviation.of(mine, theirs)
    scale = max(deviation.reference**0.5, NOISE * total)
    start, goal = (reference.initial[MODEL + name][box.slices], reference.final[MODEL + name][box.slices])
    initial, final = (o[MODEL + name][box.slices] for o in (outcome.initial, outcome.final))
    return Row(
        label,
        name,
        deviation.difference**0.5 / scale,
        deviation,
        _way_error(initial, final, start=start, goal=goal),
        bool(np.array_equal(initial, start.astype(initial.dtype))),
    )


def _state_row(key: str, *, outcome: Outcome, reference: Outcome) -> Row:
    """What moves without a gradient (a router's bias)."""
    name = key.removeprefix(MODEL)
    if key not in outcome.final:
        return Row(name, name, 0.0, Deviation(), float("inf"), False)
    initial, final = outcome.initial[key], outcome.final[key]
    start, goal = reference.initial[key], reference.final[key]
    error = _way_error(initial, final, start=start, goal=goal)
    return Row(name, name, 0.0, Deviation(), error, bool(np.array_equal(initial, start)))


def _way_error(initial: Array, final: Array, *, start: Array, goal: Array) -> float:
    """Difference of two ways, as a share of the right one (of a hundredth of lr an element, if that is more)."""
    right = goal.astype(np.float64) - start
    way = final.astype(np.float64) - initial
    least = 0.01 * LR * right.size**0.5
    return float(np.linalg.norm(way - right) / max(float(np.linalg.norm(right)), least))


def bounds_of(alone: Comparison) -> Bounds:
    """What is allowed in a low precision: twice the errors of one process in it.

    Args:
        alone: one process in that precision beside the fp64 one.
    """
    return Bounds(
        loss=2 * max(*alone.losses, LOW_LOSS),
        gradient=2 * max(row.gradient for row in alone.rows),
        norm=2 * max(alone.norm, max(row.gradient for row in alone.rows)),
        weight=2 * max(row.weight for row in alone.rows),
        output=float("inf"),
    )
