"""Train a few steps under a layout on forked ranks and bring back what must not depend on the layout.

    ranks   build -> step 1 (watched) -> ... -> step N     weights, moments and losses, as the pieces a checkpoint gets
    parent  pieces -> logical tensors                      a piece that is missing, doubled or misplaced is seen here

The gradient of step 1 is read off what the optimizer made of it, whichever engine that was: Adam's first moment is then
(1 - beta1) x gradient, and plain SGD moves weights by lr x gradient; either way after clipping, which is undone with
the norm that the engine itself reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megads.assemble.step import StepResult, train_step
from megads.assemble.wiring import Model, build_engine, build_executors, build_model, layout_of
from megads.config.root import Config
from megads.optim.clip import clip_factor
from megads.optim.engine import Engine
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.parameter import Piece, ShardedParameter, stored_name
from megads.parallel.shard import EXPERT_AXES, Box, Shape, block_box
from megads.pipeline.executor import Executor
from megads.verify.batch import Masks, synthetic_batch
from megads.verify.ranks import fork_ranks
from megads.verify.trace import Deviations, Trace, Tracer, sum_up

LR = 1e-3
LR_SGD = 1.0  # large, so that the movement of a weight shows its gradient
MOMENT = "optim/exp_avg/"
MODEL = "model/"
MAX_SKIPS = 24  # steps that fp16's loss scale may skip before the first good one

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


@dataclass(frozen=True, slots=True)
class Trainee:
    """A model and all that trains it, on one rank."""

    config: Config
    mesh: Mesh
    model: Model
    engine: Engine
    executor: Executor
    masks: Masks = "unequal"

    @classmethod
    def build(
        cls,
        config: Config,
        control: Control,
        *,
        masks: Masks = "unequal",
        device: torch.device | None = None,
    ) -> Trainee:
        """All ranks call it. `model.vocab` must not be null; `device`: None is the CPU."""
        assert config.model.vocab is not None
        mesh = build_mesh(layout_of(config, control.size), control.rank, device=device)
        model = build_model(config, mesh, vocab=config.model.vocab)
        engine = build_engine(config, model, mesh=mesh)
        return cls(config, mesh, model, engine, build_executors(config, model, mesh=mesh).train, masks)

    @property
    def lr(self) -> float:
        return LR_SGD if self.config.optim.name == "sgd" else LR

    def step(self, number: int) -> StepResult:
        """Train on the batch of a step."""
        batch = synthetic_batch(self.config, number, masks=self.masks)
        rows = self.config.batch.global_size // self.mesh.layout.data
        first = self.mesh.group("dp").rank * rows
        return train_step(
            batch.rows(first, first + rows).to(self.mesh.device),
            executor=self.executor,
            engine=self.engine,
            mesh=self.mesh,
            lr=self.lr,
        )

    def first_step(self) -> StepResult:
        """Train on the batch of step 1 until a step was not skipped: fp16 finds its loss scale."""
        for _ in range(MAX_SKIPS):
            result = self.step(1)
            if bool(result.report.finite):
                break
        return result

    def parts(self) -> list[Part]:
        """This rank's share of weights and moments."""
        return parts_of(self.engine.state())


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


@dataclass(frozen=True, slots=True)
class Watch:
    """Whether modules are watched in step 1.

    Attributes:
        against: the reference to compare them with; None: this run is the reference.
    """

    against: Trace | None = None


def measure(
    config: Config,
    world_size: int,
    *,
    steps: int,
    masks: Masks = "unequal",
    watch: Watch | None = None,
    timeout: float = 300.0,
    stall: float = 20.0,
) -> Outcome:
    """Train `steps` steps of `config` on `world_size` ranks, on synthetic batches.

    Args:
        config: with `model.vocab`; needs no corpus and no tokenizer.
        watch: None: modules are not watched.
        timeout, stall: as `fork_ranks`.

    Raises:
        RanksError: a rank failed.
        ConfigError: a rank refused the config.
    """

    def work(control: Control) -> RankResult:
        return record(config, control, steps=steps, masks=masks, watch=watch)

    return merge(fork_ranks(work, world_size, timeout=timeout, stall=stall))


def record(
    config: Config,
    control: Control,
    *,
    steps: int,
    masks: Masks = "unequal",
    watch: Watch | None = None,
    device: torch.device | None = None,
) -> RankResult:
    """A rank's part of `measure`; `device`: None is the CPU."""
    trainee = Trainee.build(config, control, masks=masks, device=device)
    initial = trainee.parts()
    shape = (config.batch.global_size, config.data.sequence_length)
    tracer = Tracer(trainee.model, trainee.mesh, shape, None if watch is None else watch.against)
    with nullcontext() if watch is None else tracer:
        results = [trainee.first_step()]
    gradients = _gradients(config, initial, trainee.parts(), norm=results[0].report.grad_norm)
    results += [trainee.step(number) for number in range(2, steps + 1)]
    return RankResult(
        initial,
        gradients,
        trainee.parts(),
        {stored_name(parameter): Facts.of(parameter) for parameter in trainee.model.parameters},
        [result.loss.item() for result in results],
        [result.report.grad_norm.item() for result in results],
        tracer.trace,
        tracer.outputs,
        tracer.gradients,
    )


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
    )


def _models(whole: Arrays) -> Arrays:
    return {name: values for name, values in whole.items() if name.startswith(MODEL)}


def _gradients(config: Config, initial: Sequence[Part], first: Sequence[Part], *, norm: Tensor) -> list[Part]:
    """The gradients that made `first` of `initial`, by NAME; this rank's, whose norm is `norm`."""
    factor = float(clip_factor(norm, config.optim.clip))
    if config.optim.name == "sgd":
        return [
            Part(
                after.name.removeprefix(MODEL),
                after.shape,
                after.box,
                (before.values.astype(np.float64) - after.values) / (LR_SGD * factor),
            )
            for before, after in zip(initial, first, strict=True)
            if after.name.startswith(MODEL)
        ]
    share = (1.0 - config.optim.betas[0]) * factor
    return [
        Part(p.name.removeprefix(MOMENT), p.shape, p.box, p.values / p.values.dtype.type(share))
        for p in first
        if p.name.startswith(MOMENT)
    ]


def parts_of(pieces: Sequence[Piece]) -> list[Part]:
    """Copies of pieces that can leave the process."""
    return [Part(p.name, p.shape, p.box, p.tensor.detach().cpu().numpy().copy()) for p in pieces]


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
