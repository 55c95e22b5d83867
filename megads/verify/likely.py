"""What a difference points to: rules over the evidence, as data.

    forward or backward of a module   FORWARD, BACKWARD: its name, and an axis that has more than one rank -> collective
    gradients of parameters alone     CLASSES: which of them exactly -> collective
    all gradients by one factor       the factor is the size of an axis -> a count, a mean or a sum over it

A rule that is wrong misleads a person: the mutation suite (`tests/verify`) holds each against code that is broken so.
In which part of a step a difference begins is found in `diagnose.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megads.config.root import Config
from megads.verify.compare import Comparison

AXES = ("dp_cp", "tp", "dp", "cp", "pp", "ep", "etp", "edp")


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


@dataclass(frozen=True, slots=True)
class Rule:
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
    Rule(r"embedding\.word$", "tp", "sum of the vocabulary-cut embedding over tp (layers/embedding.py)"),
    Rule(
        r"embedding\.position$",
        "",
        "positions of this rank's part of the sequence: cut over cp or tp (layers/embedding.py, data/sequence.py)",
    ),
    Rule(
        r"dropout$", "", "dropout mask: keyed by a local rank, row, column or head instead of the global one"
    ),
    Rule(
        r"attention(\.out)?$",
        "cp",
        "attention over cp: which keys a rank meets, their mask, the merge of parts, or the tokens' positions "
        "(layers/context.py); with tp > 1 also the all-reduce of attention.out over tp (layers/linear.py)",
    ),
    Rule(
        r"attention(\.out)?$",
        "attention_dropout",
        "all-reduce (reduce-scatter with sequence parallelism) of the row-parallel product over tp (layers/linear.py), "
        "or the mask of attention dropout: the global head, row and key that it is keyed by (layers/dropout.py)",
    ),
    Rule(
        r"(attention\.out|down|attention|mlp|shared)$",
        "tp",
        "all-reduce (reduce-scatter with sequence parallelism) of the row-parallel product over tp, or a "
        "column-parallel layer before it: its all-gather along the sequence, its fused blocks (layers/linear.py)",
    ),
    Rule(
        r"(mlp|experts)$",
        "ep",
        "experts: all-to-all dispatch and its way back over ep, or the choice of experts (layers/dispatch.py)",
    ),
    Rule(r"(mlp|experts)$", "etp", "experts: sum of their cut products over etp (layers/experts.py)"),
    Rule(r"norm$", "stages", "send/receive of the residual stream between stages (pipeline/transport.py)"),
    Rule(r"attention", "documents", "attention mask and positions of documents (ops/attention.py)"),
)

BACKWARD = (
    Rule(r"mlp_norm$", "ep", "backward of the dispatch to experts: all-to-all over ep (layers/dispatch.py)"),
    Rule(
        r"mlp_norm$",
        "experts",
        "backward of experts: the tokens that each rank of tp routes (parallel/tokens.py), the balance loss and its "
        "load over the whole sequence, summed over tp and cp (layers/router.py)",
    ),
    Rule(
        r"head\.norm$",
        "tp",
        "all-reduce over tp of the input gradient of the head, a column-parallel layer (layers/linear.py), or the "
        "gradient of the vocabulary-parallel cross entropy (objective/language.py)",
    ),
    Rule(
        r"attention_norm$",
        "cp",
        "backward of attention over cp: gradients of keys and values on their way home (layers/context.py); with "
        "tp > 1 also the all-reduce of the column-parallel layer's input gradient over tp",
    ),
    Rule(
        r"norm$",
        "tp",
        "all-reduce (reduce-scatter with sequence parallelism) over tp of the input gradient of the column-parallel "
        "layer behind it, or all-gather of the row-parallel layer's (layers/linear.py)",
    ),
    Rule(r"(^|\.)layers\.\d+$", "stages", "send/receive of gradients between stages (pipeline/transport.py)"),
    Rule(
        r"",
        "recompute",
        "a recomputed forward that is not the first one: dropout, bias, or order of collectives",
    ),
)


def likely_of_module(name: str, evidence: Evidence, *, rules: Iterable[Rule], otherwise: str) -> str:
    """What it means that a module is the first that is wrong."""
    return next((rule.likely for rule in rules if rule.fits(name, evidence)), otherwise)


def likely_of_factor(evidence: Evidence) -> str | None:
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


@dataclass(frozen=True, slots=True)
class ParameterClass:
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
    ParameterClass(
        lambda evidence: list(evidence.comparison.outcome.facts),
        "all parameters: reduction of gradients over dp_cp (parallel/gradient.py)",
    ),
    ParameterClass(
        lambda evidence: [n for n, f in evidence.comparison.outcome.facts.items() if f.is_tied],
        "only the tied embedding: sum of its gradients between the first and the last stage over ends "
        "(parallel/gradient.py)",
    ),
    ParameterClass(
        lambda evidence: [n for n, f in evidence.comparison.outcome.facts.items() if f.is_partial],
        "only parameters that meet a part of the sequence (norms, biases, router): sum of their partial gradients over "
        "tp (parallel/gradient.py)",
    ),
    ParameterClass(
        _named(r"router"),
        "only routers: sum of their partial gradients over tp, or the balance loss (router.py)",
    ),
    ParameterClass(
        lambda evidence: evidence.of_kind("expert"),
        "only experts: reduction of their gradients over edp, the ranks with the same experts (parallel/gradient.py)",
    ),
    ParameterClass(
        lambda evidence: evidence.of_kind("column", "row", "vocabulary", "whole"),
        "all but experts: reduction of gradients over dp_cp (parallel/gradient.py)",
    ),
    ParameterClass(
        _named(r"(out|down)\.bias$"),
        "only biases of row-parallel layers: added or counted once a rank of tp instead of once (layers/linear.py)",
    ),
    ParameterClass(
        _named(r"embedding\.word"),
        "only the vocabulary-cut embedding: which rows are this rank's, and what of the rest leaves a gradient "
        "(layers/embedding.py)",
    ),
    ParameterClass(
        _named(r"embedding\.position"),
        "only learned positions: which positions are this rank's, or their partial sum over tp",
    ),
    ParameterClass(
        _named(r"\.bias$"), "only biases: a bias or its gradient counted once a rank of tp instead of once"
    ),
    ParameterClass(
        lambda evidence: evidence.of_kind("row"),
        "only row-parallel weights: gradient of their output, gathered over tp along the sequence (layers/linear.py)",
    ),
    ParameterClass(
        lambda evidence: evidence.of_kind("column"),
        "only column-parallel weights: their input, gathered over tp along the sequence (layers/linear.py)",
    ),
    ParameterClass(
        lambda evidence: evidence.of_kind("column", "vocabulary"),
        "only column-parallel weights: their input, gathered over tp along the sequence (layers/linear.py)",
    ),
    ParameterClass(
        lambda evidence: evidence.of_kind("vocabulary"),
        "only the vocabulary-cut weights: which rows are this rank's (layers/embedding.py), or the sum of the tied "
        "ones over ends",
    ),
)


def likely_of_parameters(evidence: Evidence) -> str:
    """What it means that exactly these parameters have a wrong gradient while every module's is right."""
    fitting = [known for known in CLASSES if evidence.are_exactly(known.names(evidence))]
    closest = min(fitting, key=lambda known: len(known.names(evidence)), default=None)
    return OTHERWISE if closest is None else closest.likely
