"""Where a difference begins, and what most likely made it: rules over the evidence, as data.

    initial weights -> forward, module by module -> loss -> backward, module by module -> gradients of parameters
                    -> gradient norm -> updated weights -> losses of later steps

The first of these that is wrong says in which part of a step to look; which modules are wrong there, and whether all
are wrong by one factor that is the size of an axis, says which collective. A rule that is wrong misleads a person, so
the mutation suite (`tests/verify`) holds every one of them against code that is broken in that way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megads.assemble.wiring import layout_of
from megads.config.root import Config
from megads.verify.compare import Comparison, Row
from megads.verify.trace import Deviation

AXES = ("dp_cp", "tp", "dp", "cp", "pp", "ep", "etp", "edp")


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


@dataclass(frozen=True, slots=True)
class Evidence:
    """A failed comparison, seen from the layout.

    Attributes:
        sizes: axis -> ranks.
        factor: what every wrong gradient is multiplied by, if it is one number; None: it is not.
        wrong: names of parameters with a wrong gradient.
    """

    comparison: Comparison
    config: Config
    sizes: Mapping[str, int]
    factor: float | None
    wrong: frozenset[str]

    def facts_of(self, name: str) -> str:
        """How a parameter is cut."""
        return self.comparison.outcome.facts[name].kind

    def are_exactly(self, names: Iterable[str]) -> bool:
        """Whether these are the wrong parameters; a few of them may be right by chance (a gradient of zero)."""
        names = frozenset(names)
        return bool(self.wrong) and self.wrong <= names and 4 * len(self.wrong) >= 3 * len(names)

    def of_kind(self, *kinds: str) -> list[str]:
        """Parameters that are cut in one of these ways."""
        return [name for name, fact in self.comparison.outcome.facts.items() if fact.kind in kinds]

    @property
    def axis_of_factor(self) -> str | None:
        """The axis whose size the factor is, or one over it."""
        if self.factor is None:
            return None
        for axis in AXES:
            size = self.sizes[axis]
            if size > 1 and min(abs(self.factor - size), abs(1 / self.factor - size)) < 1e-6 * size:
                return axis
        return None


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


@dataclass(frozen=True, slots=True)
class _Rule:
    """If a name matches and an axis has more than one rank, this is likely."""

    name: str
    axis: str
    likely: str

    def fits(self, name: str, evidence: Evidence) -> bool:
        if self.axis == "stages":
            is_there = evidence.sizes["pp"] > 1
        elif self.axis == "documents":
            is_there = evidence.config.data.document_mask
        elif self.axis == "attention_dropout":
            is_there = evidence.config.model.attention_dropout > 0
        elif self.axis == "experts":
            is_there = evidence.config.model.experts is not None
        elif self.axis == "recompute":
            is_there = evidence.config.parallel.recompute != "none"
        else:
            is_there = not self.axis or evidence.sizes[self.axis] > 1
        return is_there and re.search(self.name, name) is not None


FORWARD = (
    _Rule(r"embedding\.word$", "tp", "sum of the vocabulary-cut embedding over tp (layers/embedding.py)"),
    _Rule(
        r"embedding\.position$",
        "",
        "positions of this rank's part of the sequence: cut over cp or tp (layers/embedding.py, data/sequence.py)",
    ),
    _Rule(
        r"dropout$", "", "dropout mask: keyed by a local rank, row, column or head instead of the global one"
    ),
    _Rule(
        r"attention(\.out)?$",
        "cp",
        "attention over cp: which keys a rank meets, their mask, the merge of parts, or the tokens' positions "
        "(layers/context.py); with tp > 1 also the all-reduce of attention.out over tp (layers/linear.py)",
    ),
    _Rule(
        r"attention(\.out)?$",
        "attention_dropout",
        "all-reduce (reduce-scatter with sequence parallelism) of the row-parallel product over tp (layers/linear.py), "
        "or the mask of attention dropout: the global head, row and key that it is keyed by (layers/dropout.py)",
    ),
    _Rule(
        r"(attention\.out|down|attention|mlp|shared)$",
        "tp",
        "all-reduce (reduce-scatter with sequence parallelism) of the row-parallel product over tp, or a "
        "column-parallel layer before it: its all-gather along the sequence, its fused blocks (layers/linear.py)",
    ),
    _Rule(
        r"(mlp|experts)$",
        "ep",
        "experts: all-to-all dispatch and its way back over ep, or the choice of experts (layers/dispatch.py)",
    ),
    _Rule(r"(mlp|experts)$", "etp", "experts: sum of their cut products over etp (layers/experts.py)"),
    _Rule(r"norm$", "stages", "send/receive of the residual stream between stages (pipeline/transport.py)"),
    _Rule(r"attention", "documents", "attention mask and positions of documents (ops/attention.py)"),
)

BACKWARD = (
    _Rule(r"mlp_norm$", "ep", "backward of the dispatch to experts: all-to-all over ep (layers/dispatch.py)"),
    _Rule(
        r"mlp_norm$",
        "experts",
        "backward of experts: the tokens that each rank of tp routes (parallel/tokens.py), the balance loss and its "
        "load over the whole sequence, summed over tp and cp (layers/router.py)",
    ),
    _Rule(
        r"head\.norm$",
        "tp",
        "all-reduce over tp of the input gradient of the head, a column-parallel layer (layers/linear.py), or the "
        "gradient of the vocabulary-parallel cross entropy (objective/language.py)",
    ),
    _Rule(
        r"attention_norm$",
        "cp",
        "backward of attention over cp: gradients of keys and values on their way home (layers/context.py); with "
        "tp > 1 also the all-reduce of the column-parallel layer's input gradient over tp",
    ),
    _Rule(
        r"norm$",
        "tp",
        "all-reduce (reduce-scatter with sequence parallelism) over tp of the input gradient of the column-parallel "
        "layer behind it, or all-gather of the row-parallel layer's (layers/linear.py)",
    ),
    _Rule(
        r"(^|\.)layers\.\d+$", "stages", "send/receive of gradients between stages (pipeline/transport.py)"
    ),
    _Rule(
        r"",
        "recompute",
        "a recomputed forward that is not the first one: dropout, bias, or order of collectives",
    ),
)


def _likely(rules: Iterable[_Rule], name: str, evidence: Evidence, *, otherwise: str) -> str:
    return next((rule.likely for rule in rules if rule.fits(name, evidence)), otherwise)


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
        _likely(FORWARD, name, evidence, otherwise=otherwise),
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


def _scaled(evidence: Evidence) -> str | None:
    """What it means that all gradients are wrong by one factor."""
    axis, factor = evidence.axis_of_factor, evidence.factor
    if factor is None or not evidence.are_exactly(evidence.comparison.outcome.facts):
        return None
    if axis in (None, "pp"):  # no number is divided by the pipeline's ranks
        return "what the backward is seeded with: weight / global token count (assemble/step.py), or the loss scale"
    size = evidence.sizes[axis]
    if factor > 1:
        return (
            f"everything is {size} = ranks of {axis} too large: token count of one rank instead of the sum over {axis} "
            "(assemble/step.py, objective/language.py), or gradients summed twice (parallel/gradient.py)"
        )
    return (
        f"everything is {size} = ranks of {axis} too small: a mean instead of a sum over {axis} "
        "(parallel/gradient.py), or tokens counted more than once (objective/language.py)"
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
        _scaled(evidence) or _likely(BACKWARD, name, evidence, otherwise=otherwise),
    )


@dataclass(frozen=True, slots=True)
class _Class:
    """If exactly these parameters are wrong, this is likely. Of several that fit, the smallest class is meant."""

    names: Callable[[Evidence], list[str]]
    likely: str


def _named(pattern: str) -> Callable[[Evidence], list[str]]:
    return lambda evidence: [n for n in evidence.comparison.outcome.facts if re.search(pattern, n)]


OTHERWISE = (
    "the weight gradient of these modules alone, or the bucket that they share (parallel/gradient.py, "
    "parallel/weight_queue.py)"
)
CLASSES = (
    _Class(
        lambda evidence: list(evidence.comparison.outcome.facts),
        "all parameters: reduction of gradients over dp_cp (parallel/gradient.py)",
    ),
    _Class(
        lambda evidence: [n for n, f in evidence.comparison.outcome.facts.items() if f.is_tied],
        "only the tied embedding: sum of its gradients between the first and the last stage over ends "
        "(parallel/gradient.py)",
    ),
    _Class(
        lambda evidence: [n for n, f in evidence.comparison.outcome.facts.items() if f.is_partial],
        "only parameters that meet a part of the sequence (norms, biases, router): sum of their partial gradients over "
        "tp (parallel/gradient.py)",
    ),
    _Class(
        _named(r"router"),
        "only routers: sum of their partial gradients over tp, or the balance loss (router.py)",
    ),
    _Class(
        lambda evidence: evidence.of_kind("expert"),
        "only experts: reduction of their gradients over edp, the ranks with the same experts (parallel/gradient.py)",
    ),
    _Class(
        lambda evidence: evidence.of_kind("column", "row", "vocabulary", "whole"),
        "all but experts: reduction of gradients over dp_cp (parallel/gradient.py)",
    ),
    _Class(
        _named(r"(out|down)\.bias$"),
        "only biases of row-parallel layers: added or counted once a rank of tp instead of once (layers/linear.py)",
    ),
    _Class(
        _named(r"embedding\.word"),
        "only the vocabulary-cut embedding: which rows are this rank's, and what of the rest leaves a gradient "
        "(layers/embedding.py)",
    ),
    _Class(
        _named(r"embedding\.position"),
        "only learned positions: which positions are this rank's, or their partial sum over tp",
    ),
    _Class(
        _named(r"\.bias$"), "only biases: a bias or its gradient counted once a rank of tp instead of once"
    ),
    _Class(
        lambda evidence: evidence.of_kind("row"),
        "only row-parallel weights: gradient of their output, gathered over tp along the sequence (layers/linear.py)",
    ),
    _Class(
        lambda evidence: evidence.of_kind("column"),
        "only column-parallel weights: their input, gathered over tp along the sequence (layers/linear.py)",
    ),
    _Class(
        lambda evidence: evidence.of_kind("column", "vocabulary"),
        "only column-parallel weights: their input, gathered over tp along the sequence (layers/linear.py)",
    ),
    _Class(
        lambda evidence: evidence.of_kind("vocabulary"),
        "only the vocabulary-cut weights: which rows are this rank's (layers/embedding.py), or the sum of the tied "
        "ones over ends",
    ),
)


def _gradients(evidence: Evidence) -> Finding | None:
    rows = evidence.comparison.wrong_gradients
    if not rows:
        return None
    row = rows[0]
    fitting = [known for known in CLASSES if evidence.are_exactly(known.names(evidence))]
    closest = min(fitting, key=lambda known: len(known.names(evidence)), default=None)
    likely = _scaled(evidence) or (OTHERWISE if closest is None else closest.likely)
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
