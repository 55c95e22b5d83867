"""Where a difference begins: the first thing in the order of a step that is wrong.

    initial weights -> forward, module by module -> loss -> backward, module by module -> gradients of parameters
                    -> gradient norm -> updated weights -> losses of later steps

What it points to is said by the rules of `likely.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megads.assemble.wiring import layout_of
from megads.config.root import Config
from megads.verify.compare import Comparison, Row
from megads.verify.likely import (
    AXES,
    BACKWARD,
    FORWARD,
    Evidence,
    likely_of_factor,
    likely_of_module,
    likely_of_parameters,
)
from megads.verify.trace import Deviation


@dataclass(frozen=True, slots=True)
class Finding:
    """What a failed comparison says first.

    Attributes:
        where: module path or quantity, and in which part of the step.
        error, bound: of it.
        likely: the collective or the code that it points to.
    """

    where: str
    error: float
    bound: float
    likely: str


def diagnose(comparison: Comparison, config: Config, *, world_size: int) -> Finding:
    """The first difference of a comparison that is not equal."""
    evidence = _evidence(comparison, config, world_size)
    for step in (_declared, _drawn, _forward, _loss, _backward, _gradients, _norm, _updated, _later, _told):
        found = step(evidence)
        if found is not None:
            return found
    raise AssertionError("nothing differs")


def _evidence(comparison: Comparison, config: Config, world_size: int) -> Evidence:
    layout = layout_of(config, world_size)
    sizes = {axis: max(map(len, layout.groups(axis))) for axis in AXES}
    rows = comparison.wrong_gradients
    factors = [row.deviation.factor for row in rows]
    first = factors[0] if factors else None
    is_one = first is not None and all(f is not None and abs(f - first) < 1e-6 * abs(first) for f in factors)
    return Evidence(
        comparison, config, sizes, first if is_one else None, frozenset(row.parameter for row in rows)
    )


def _declared(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    if comparison.missing:
        return Finding(
            f"{comparison.missing[0]}: a parameter that only one of them has",
            float("inf"),
            0.0,
            "blocks dealt to stages (pipeline/partition.py), or a name that depends on the rank",
        )
    if comparison.outcome.misplaced:
        name = comparison.outcome.misplaced[0]
        return Finding(
            f"{name}: elements saved twice or by nobody ({len(comparison.outcome.misplaced)} tensors)",
            float("inf"),
            0.0,
            "which rank's copy counts in the gradient norm and is saved (is_primary), or the slices of ZeRO "
            "(parallel/parameter.py, parallel/gradient.py)",
        )
    return None


def _drawn(evidence: Evidence) -> Finding | None:
    rows = evidence.comparison.wrong_initial
    if not rows:
        return None
    return Finding(
        f"{rows[0].name}: initial weight ({len(rows)} of {len(evidence.comparison.rows)} differ)",
        float("inf"),
        0.0,
        "how the parameter is cut, ZeRO's slices, or a random stream whose key or index is the rank's "
        "(parallel/shard.py, parallel/parameter.py, parallel/gradient.py)",
    )


def _first(
    order: Iterable[str], found: Mapping[str, Deviation], *, bound: float
) -> tuple[str, Deviation] | None:
    """The first module in `order` whose deviation is too large."""
    for name in order:
        deviation = found.get(name)
        if deviation is not None and not deviation.error <= bound:
            return name, deviation
    return None


def _forward(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    bound = comparison.bounds.output
    found = _first(comparison.reference.trace.outputs, comparison.outcome.outputs, bound=bound)
    if found is None:
        return None
    name, deviation = found
    otherwise = "what this module reads: tokens, positions, weights, or rows of the batch"
    return Finding(
        f"{name}: output in the forward of step 1{_by(deviation.factor)}",
        deviation.error,
        bound,
        likely_of_module(name, evidence, rules=FORWARD, otherwise=otherwise),
    )


def _by(factor: float | None) -> str:
    return "" if factor is None or abs(factor - 1) < 1e-6 else f", {factor:.6g} times what it should be"


def _loss(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    if 1 not in comparison.wrong_losses:
        return None
    ratio = comparison.outcome.losses[0] / comparison.reference.losses[0]
    modules = " (modules before the head agree)" if comparison.outcome.outputs else ""
    return Finding(
        f"loss of step 1: {ratio:.9g} times what it should be{modules}",
        comparison.losses[0],
        comparison.bounds.loss,
        "token count of one rank instead of the sum over dp_cp, a sum over ranks that is missing or doubled "
        "(assemble/step.py, pipeline/executor.py), or the vocabulary-parallel cross entropy over tp: its maximum, sum "
        "or target (objective/language.py)",
    )


def _backward(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    bound = comparison.bounds.output
    found = _first(comparison.reference.trace.gradients, comparison.outcome.gradient_flow, bound=bound)
    if found is None:
        return None
    name, deviation = found
    otherwise = (
        "what the backward is seeded with: weight / global token count (assemble/step.py), or the gradient of the loss"
        if name.startswith("head.")
        else "the backward of what reads this module's output"
    )
    return Finding(
        f"{name}: gradient of its output in the backward of step 1{_by(deviation.factor)}",
        deviation.error,
        bound,
        likely_of_factor(evidence) or likely_of_module(name, evidence, rules=BACKWARD, otherwise=otherwise),
    )


def _gradients(evidence: Evidence) -> Finding | None:
    rows = evidence.comparison.wrong_gradients
    if not rows:
        return None
    row = rows[0]
    likely = likely_of_factor(evidence) or likely_of_parameters(evidence)
    others = f" ({len(rows)} of {len(evidence.comparison.rows)} differ)"
    return Finding(
        f"{row.name}: gradient of step 1{_by(row.deviation.factor)}{others}",
        row.gradient,
        evidence.comparison.bounds.gradient,
        likely,
    )


def _norm(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    if not comparison.is_norm_wrong:
        return None
    ratio = comparison.outcome.norms[0] / comparison.reference.norms[0]
    return Finding(
        f"gradient norm of step 1: {ratio:.9g} times what it should be (all gradients agree)",
        comparison.norm,
        comparison.bounds.norm,
        "elements counted twice or not at all in the norm: its sum over world, copies on ranks of tp, ZeRO's slices "
        "(optim/clip.py, optim/zero.py)",
    )


def _updated(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    rows: tuple[Row, ...] = comparison.wrong_weights
    if not rows or 2 in comparison.wrong_losses:
        return None
    return Finding(
        f"{rows[0].name}: updated weight ({len(rows)} of {len(comparison.rows)} differ)",
        rows[0].weight,
        comparison.bounds.weight,
        "the update itself: clipping, weight decay, what moves without a gradient (optim/zero.py, parallel/tally.py)",
    )


def _later(evidence: Evidence) -> Finding | None:
    comparison = evidence.comparison
    if not comparison.wrong_losses:
        return None
    step = comparison.wrong_losses[0]
    return Finding(
        f"loss of step {step} (all of step {step - 1} agrees)",
        comparison.losses[step - 1],
        comparison.bounds.loss,
        "weights that the forward reads are not those that were updated: all-gather over dp_cp after ZeRO's update, or "
        "the copy from masters (optim/zero.py)",
    )


def _told(evidence: Evidence) -> Finding | None:
    said = evidence.comparison.outcome.disagreements
    return (
        Finding(
            f"ranks disagree: {said[0]}",
            float("inf"),
            0.0,
            "the last all-reduce of a number over world (assemble/step.py, optim/clip.py)",
        )
        if said
        else None
    )
