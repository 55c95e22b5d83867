"""One optimizer step: micro-batches through the pipeline, one global count, one update.

    count tokens over all ranks -> run the schedule, seeded with weight / count -> loss -> engine: reduce, clip, update

The loss is (sum over ranks) / (count over ranks), so it is the same number under every layout and micro-batch size. So
is every other term that the gradient is of; what is reported as the loss is the plain language loss alone. With label
smoothing or a z-loss `trained_loss`, which has them, is trained on instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.objective.language import count_tokens
from megads.optim.engine import Engine, StepReport
from megads.optim.guard import SpikeGuard
from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Mesh
from megads.pipeline.executor import Executor, local_sum

NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})


class Stop(Protocol):
    """What may ask a rank to end its run after a step (`train/stop.py`)."""

    @property
    def is_raised(self) -> bool:
        """Whether this rank was asked to stop."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step computed, on the device.

    Attributes:
        loss: mean over all tokens that count, float64 scalar, the same on every rank.
        num_tokens: tokens that count, over all ranks, float64 scalar.
        extras: the other terms by name, without their weight: means over all tokens (that count, if the term is one of
            labels) and sources, float64 scalars.
        report: of the optimizer.
        num_stops: ranks that were asked to stop before this step's end, float64 scalar, the same on every rank.
        bounds: [loss, norm] that a guard let the step have, float64; None: there is none.
    """

    loss: Tensor
    num_tokens: Tensor
    extras: Mapping[str, Tensor]
    report: StepReport
    num_stops: Tensor
    bounds: Tensor | None


def train_step(
    batch: Batch,
    *,
    executor: Executor,
    engine: Engine,
    mesh: Mesh,
    lr: float,
    stop: Stop | None = None,
    guard: SpikeGuard | None = None,
    weights: Mapping[str, float] = NO_WEIGHTS,
) -> StepResult:
    """Run one optimizer step on this rank's rows of the global batch.

    Args:
        batch: this data-parallel rank's rows, whole, on the device.
        lr: learning rate of this step.
        stop: whether this rank was asked to stop, looked at when the backward has ended; None: it never is.
        guard: keeps a step whose loss or gradient norm is out of line from being taken; None: what is finite is.
        weights: of terms that have another one in this step than in general (`DecoderSpec.weights_at`).
    """
    context = mesh.group("cp")
    batch = batch.context_part(context.rank, context.size)
    num_tokens = count_tokens(batch, mesh).clamp_min(1.0)  # a batch may be masked altogether
    num_positions = batch.tokens.numel() * mesh.group("dp_cp").size
    engine.zero_gradients()
    units: dict[str, Tensor | int] = {"label": num_tokens, "position": num_positions}
    seeds = {
        term.name: engine.loss_scale * weights.get(term.name, term.weight) / units[term.unit]
        for term in executor.terms
    }
    totals = executor.run(batch, seeds=seeds, engine=engine)
    is_asked = stop is not None and stop.is_raised
    asked = torch.full((), float(is_asked), dtype=torch.float64, device=mesh.device)
    parts = [local_sum(totals, term.name, mesh=mesh, is_cut=term.is_cut) for term in executor.terms]
    loss, *others, num_stops = all_reduce_(torch.stack((*parts, asked)), mesh.group("world")).unbind()
    extras = {
        term.name: total / (units[term.unit] * term.num_sources)
        for term, total in zip(executor.terms[1:], others, strict=True)
    }
    loss = loss / num_tokens
    if guard is not None:
        guard.expect(loss)
    report = engine.step(lr=lr, guard=guard)
    bounds = None if guard is None else guard.bounds
    return StepResult(loss, num_tokens, extras, report, num_stops, bounds)
