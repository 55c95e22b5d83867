"""Train a few steps under a layout on forked ranks and bring back what must not depend on the layout.

    ranks   build -> step 1 (watched) -> ... -> step N     weights, moments and losses, as the pieces a checkpoint gets
    parent  pieces -> logical tensors                      a piece that is missing, doubled or misplaced is seen here

The gradient of step 1 is read off what the optimizer made of it, whichever engine that was: Adam's first moment, or
Muon's momentum, is then (1 - beta) x gradient after clipping, which is undone with the norm that the engine itself
reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.assemble.step import StepResult, train_step
from megads.assemble.wiring import Model, build_engine, build_executors, build_model, layout_of
from megads.config.root import Config
from megads.optim.clip import clip_factor
from megads.optim.engine import Engine
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.parameter import stored_name
from megads.pipeline.executor import Executor
from megads.verify.batch import Masks, synthetic_batch
from megads.verify.outcome import Facts, Outcome, Part, RankResult, merge, parts_of
from megads.verify.ranks import STALL, fork_ranks
from megads.verify.routing import RouteKeeper
from megads.verify.trace import Tracer

LR = 1e-3
MOMENTS = ("optim/exp_avg/", "optim/momentum/")
MAX_SKIPS = 24  # steps that fp16's loss scale may skip before the first good one


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
        stall: float | None = None,
    ) -> Trainee:
        """All ranks call it. `model.vocab` must not be null; `device`: None is the CPU; `stall`: as `build_mesh`."""
        assert config.model.vocab is not None
        layout = layout_of(config, control.size)
        mesh = build_mesh(layout, control.rank, device=device, timeout=stall)
        model = build_model(config, mesh, vocab=config.model.vocab)
        engine = build_engine(config, model, mesh=mesh)
        return cls(config, mesh, model, engine, build_executors(config, model, mesh=mesh).train, masks)

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
            lr=LR,
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
class Watch:
    """What is looked at besides the state.

    Attributes:
        against: the reference: modules are compared with its, and near-ties of routers go its way (in fp64 none); None:
            this run is the reference.
        modules: whether modules are watched in step 1.
    """

    against: Outcome | None = None
    modules: bool = True


def measure(
    config: Config,
    world_size: int,
    *,
    steps: int,
    masks: Masks = "unequal",
    watch: Watch | None = None,
    timeout: float = 300.0,
    stall: float = STALL,
) -> Outcome:
    """Train `steps` steps of `config` on `world_size` ranks, on synthetic batches.

    Args:
        config: with `model.vocab`, and AdamW or Muon; needs no corpus and no tokenizer.
        watch: None: modules are not watched.
        timeout, stall: as `fork_ranks`.

    Raises:
        RanksError: a rank failed.
        ConfigError: a rank refused the config.
    """

    def work(control: Control) -> RankResult:
        return record(config, control, steps=steps, masks=masks, watch=watch, stall=stall)

    return merge(fork_ranks(work, world_size, timeout=timeout, stall=stall))


def record(
    config: Config,
    control: Control,
    *,
    steps: int,
    masks: Masks = "unequal",
    watch: Watch | None = None,
    device: torch.device | None = None,
    stall: float | None = None,
) -> RankResult:
    """A rank's part of `measure`; `device`: None is the CPU; `stall`: as `build_mesh`."""
    trainee = Trainee.build(config, control, masks=masks, device=device, stall=stall)
    initial = trainee.parts()
    shape = (config.batch.global_size, config.data.sequence_length)
    against = None if watch is None else watch.against
    tracer = Tracer(trainee.model, trainee.mesh, shape, None if against is None else against.trace)
    keeper = RouteKeeper(trainee.model, shape, None if against is None else against.routes)
    is_kept = watch is not None and (against is None or config.optim.precision != "fp64")
    with keeper if is_kept else nullcontext():
        with tracer if watch is not None and watch.modules else nullcontext():
            results = [trainee.first_step()]
        gradients = _gradients(config, trainee.parts(), norm=results[0].report.grad_norm)
        for number in range(2, steps + 1):
            keeper.step = number
            results.append(trainee.step(number))
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
        keeper.routes,
        keeper.num_replayed,
        keeper.num_choices,
    )


def _gradients(config: Config, first: Sequence[Part], *, norm: Tensor) -> list[Part]:
    """The gradients that made the moments in `first`, by NAME; those of a rank that reported `norm`."""
    factor = float(clip_factor(norm, config.optim.clip))
    decays = (config.optim.betas[0], config.optim.muon.momentum)
    return [
        Part(p.name.removeprefix(kind), p.shape, p.box, p.values / p.values.dtype.type((1.0 - decay) * factor))
        for kind, decay in zip(MOMENTS, decays, strict=True)
        for p in first
        if p.name.startswith(kind)
    ]
