"""What came out of a few steps: each rank's pieces and numbers, and all of them as one.

A rank's parts are those that a checkpoint would get from it. Together they must be every element of every logical
tensor once: one that is missing, doubled or misplaced is seen here. How they are made is in `measure.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from megads.parallel.parameter import Piece, ShardedParameter
from megads.parallel.shard import EXPERT_AXES, Box, Shape, block_box
from megads.verify.routing import Routes
from megads.verify.trace import Deviations, Trace, sum_up

MODEL = "model/"

Array = NDArray[np.floating]
Arrays = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a logical tensor, as it leaves its process."""

    name: str
    shape: Shape
    box: Box
    values: Array


@dataclass(frozen=True, slots=True)
class Facts:
    """What a declaration says of a parameter under a layout.

    Attributes:
        kind: how it is cut: `column`, `row` or `vocabulary` over tp, `expert` over ep and etp, or `whole`.
        is_partial: whether ranks of tp each have a part of its gradient's sum.
        is_tied: whether the first and the last stage share it.
        blocks: the fused parts.
    """

    kind: str
    is_partial: bool
    is_tied: bool
    blocks: tuple[Box, ...]

    @classmethod
    def of(cls, parameter: ShardedParameter) -> Facts:
        """Of a parameter on this rank."""
        spec = parameter.spec
        over_tp = [cut for cut in spec.cuts if cut.axis == "tp"]
        kind = "whole"
        if spec.axes & set(EXPERT_AXES):
            kind = "expert"
        elif over_tp:
            kind = "vocabulary" if over_tp[0].pad else "column" if over_tp[0].dim == 0 else "row"
        num_blocks = max((len(cut.blocks) for cut in spec.cuts), default=1) or 1
        blocks = tuple(block_box(spec, number) for number in range(num_blocks))
        return cls(kind, bool(spec.partial), spec.tie is not None, blocks)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came out: logical tensors by name, losses and gradient norms by step.

    Attributes:
        initial, final: weights before and after, float32 or float64, by `model/NAME`.
        gradients: of step 1, before clipping, by NAME.
        facts: declarations by NAME, in the order of the forward.
        trace: of the reference.
        outputs, gradient_flow: deviations of modules' outputs and of their gradients from the reference's.
        disagreements: what ranks say differently although it is one number.
        misplaced: tensors of which elements are missing or are there twice, in the order of the forward.
        routes: of the reference, the choices of experts.
        num_replayed, num_choices: choices that were near-ties and were replaced by the reference's, and all choices.
    """

    initial: Arrays
    gradients: Arrays
    final: Arrays
    facts: dict[str, Facts]
    losses: list[float]
    norms: list[float]
    trace: Trace = field(default_factory=Trace)
    outputs: Deviations = field(default_factory=dict)
    gradient_flow: Deviations = field(default_factory=dict)
    disagreements: tuple[str, ...] = ()
    misplaced: tuple[str, ...] = ()
    routes: Routes = field(default_factory=Routes)
    num_replayed: int = 0
    num_choices: int = 0


@dataclass(frozen=True, slots=True)
class RankResult:
    """What one rank has to say: its parts of the state and its numbers, as in `Outcome`."""

    initial: list[Part]
    gradients: list[Part]
    final: list[Part]
    facts: dict[str, Facts]
    losses: list[float]
    norms: list[float]
    trace: Trace
    outputs: Deviations
    gradient_flow: Deviations
    routes: Routes
    num_replayed: int
    num_choices: int


def merge(ranks: Sequence[RankResult]) -> Outcome:
    """The ranks' results as one."""
    facts: dict[str, Facts] = {}
    for rank in ranks:
        for name, fact in rank.facts.items():
            facts.setdefault(name, fact)
    bad: dict[str, None] = {}
    initial = assemble([rank.initial for rank in ranks], bad)
    gradients = assemble([rank.gradients for rank in ranks], bad)
    final = assemble([rank.final for rank in ranks], bad)
    losses, norms = ranks[0].losses, ranks[0].norms
    disagreements = []
    for number, result in enumerate(ranks):
        for what, mine, theirs in (("loss", losses, result.losses), ("gradient norm", norms, result.norms)):
            step = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
            if step is not None:
                disagreements.append(
                    f"{what} of step {step + 1}: rank 0 {mine[step]!r}, rank {number} {theirs[step]!r}"
                )
    return Outcome(
        _models(initial),
        gradients,
        _models(final),
        facts,
        losses,
        norms,
        ranks[0].trace,
        sum_up([rank.outputs for rank in ranks]),
        sum_up([rank.gradient_flow for rank in ranks]),
        tuple(disagreements),
        tuple(name for name in facts if name in bad) + tuple(bad.keys() - facts.keys()),
        ranks[0].routes,
        sum(rank.num_replayed for rank in ranks),
        sum(rank.num_choices for rank in ranks),
    )


def _models(whole: Arrays) -> Arrays:
    return {name: values for name, values in whole.items() if name.startswith(MODEL)}


def parts_of(pieces: Sequence[Piece]) -> list[Part]:
    """Copies of pieces that can leave the process."""
    return [Part(p.name, p.shape, p.box, _array(p.tensor)) for p in pieces]


def assemble(ranks: Sequence[Sequence[Part]], bad: dict[str, None]) -> Arrays:
    """Logical tensors from every rank's parts; names of those with elements missing or doubled go to `bad`."""
    whole: Arrays = {}
    seen: dict[str, NDArray[np.int8]] = {}
    for parts in ranks:
        for part in parts:
            target = whole.setdefault(part.name, np.zeros(part.shape, dtype=part.values.dtype))
            target[part.box.slices] = part.values
            seen.setdefault(part.name, np.zeros(part.shape, dtype=np.int8))[part.box.slices] += 1
    for name, count in seen.items():
        if not (count == 1).all():
            bad.setdefault(name.rpartition("/")[2])
    return whole


def _array(tensor: torch.Tensor) -> Array:
    """A copy; of bfloat16, which numpy does not have, in float32."""
    values = tensor.detach().cpu()
    return np.array(values.float() if values.dtype == torch.bfloat16 else values)
