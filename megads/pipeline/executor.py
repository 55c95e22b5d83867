"""The one loop that runs any schedule on one rank.

    for each cell of this rank's row:   F, B, I, W: a stage    SEND, RECV: the transport    REDUCE: the engine

An overlapped pair runs block by block, a block of its forward before each block of its backward. On a GPU each stage
then has a stream of its own, so that one's compute goes on while the other waits for what it sent or gathers:

    stage 0 (F)   | block | all-to-all | block |              the host issues F, B, F, B, ... in one fixed order, so
    stage 3 (B)           | block      | all-to-all | block   all ranks issue the same collectives in the same order

The loss is a weighted sum of extras, each divided by its *global* count: the backward of every micro-batch is
seeded with weight / count, so gradients only ever need to be summed, over micro-batches and over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Mesh
from megads.pipeline.action import Action, Kind, Overlap, Schedule
from megads.pipeline.stage import Extra, Payload, Stage, Steps, Term
from megads.pipeline.transport import Arrival, TensorSpec, Transport


@dataclass(frozen=True, slots=True)
class Total:
    """One extra summed over this rank's stages and micro-batches: sum (float64) and count, both scalars."""

    sum: Tensor
    count: Tensor


def global_sum(totals: Mapping[str, Total], name: str, *, mesh: Mesh) -> Tensor:
    """The sum of one extra over all stages and data-parallel ranks: float64 scalar, the same on every rank."""
    return all_reduce_(local_sum(totals, name, mesh=mesh), mesh.group("world"))


def local_sum(totals: Mapping[str, Total], name: str, *, mesh: Mesh, is_cut: bool = False) -> Tensor:
    """This rank's part of the sum of one extra over the world: float64 scalar.

    Args:
        is_cut: whether each tensor-parallel rank has a part of it; else all have the same.
    """
    value = torch.zeros((), dtype=torch.float64, device=mesh.device)
    if name in totals and (is_cut or mesh.group("tp").rank == 0):
        value += totals[name].sum
    return value


def forwards(schedule: Schedule) -> Schedule:
    """The forward half of a compute-only schedule, for evaluation."""
    rows = tuple(
        tuple(action for cell in row for action in cell.actions if action.kind is Kind.F)
        for row in schedule.rows
    )
    return replace(schedule, rows=rows)


class GradientOwner(Protocol):
    """The part of an optimizer engine that the loop talks to."""

    @property
    def reduce_every(self) -> int | None:
        """Micro-batches of a stage after which its gradients are to be reduced; None: at the end of the step alone."""

    def arm(self, stage: int, *, waiting: Sequence[Tensor] | None = None) -> None:
        """What comes next completes the gradients of `stage`, of the step or of some of its micro-batches.

        Args:
            waiting: parameters that are told to `complete` one by one, while all others are complete (a W); None: a
                backward, in which a parameter is complete when autograd calls its post-accumulate hook.
        """

    def complete(self, stage: int, parameter: Tensor) -> None:
        """One of the parameters that were waiting has its gradient."""

    def reduce(self, stage: int) -> None:
        """The gradients of `stage` that `arm` spoke of are complete on this rank."""


class Executor:
    """Runs one rank's row of a lowered schedule.

    Args:
        schedule: lowered.
        rank: this rank in the pipeline.
        stages: the stages this rank holds, by number.
        transport: to the pipeline's other ranks.
        payload: what crosses a stage boundary for a micro-batch of a given number of rows and sequence length.
        terms: of the loss, over all stages of the model.

    Attributes:
        peak_live: the most (stage, micro-batch) pairs that were alive at a time in the last run.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        *,
        stages: Mapping[int, Stage],
        transport: Transport,
        payload: Callable[[int, int], tuple[TensorSpec, ...]],
        terms: tuple[Term, ...],
    ) -> None:
        self.terms = terms
        self.peak_live = 0
        self._schedule = schedule
        self._row = schedule.rows[rank]
        self._stages = stages
        self._transport = transport
        self._payload = payload
        is_overlapped = any(isinstance(cell, Overlap) for cell in self._row)
        self._streams: dict[int, torch.cuda.Stream] = (
            {number: torch.cuda.Stream(transport.device) for number in stages}  # type: ignore[no-untyped-call]
            if is_overlapped and transport.device.type == "cuda"
            else {}
        )
        self._completing: dict[int, list[Action]] = {}  # by stage: after each, a micro-batch's gradients are there
        for cell in self._row:
            for action in cell.actions:
                if action.kind in (Kind.B, Kind.W):
                    self._completing.setdefault(action.stage, []).append(action)

    def run(
        self,
        batch: Batch,
        *,
        seeds: Mapping[str, Tensor] | None = None,
        engine: GradientOwner | None = None,
    ) -> dict[str, Total]:
        """Run all micro-batches of `batch`, this data-parallel rank's rows.

        Args:
            seeds: for each extra weight / global count; needed by schedules with a backward.
            engine: is told before a stage's last backward, and when its gradients are complete on this rank.

        Returns:
            the extras of this rank's stages.
        """
        every = None if engine is None else engine.reduce_every
        work = _Run(self, batch, seeds or {}, engine=engine, reductions=self._reductions(every))
        self.peak_live = 0
        for cell in self._row:
            for _ in zip_longest(*(work.steps(action) for action in cell.actions)):
                live = sum(stage.num_live for stage in self._stages.values())
                self.peak_live = max(self.peak_live, live)
            work.add_up()
        self._transport.drain()
        return work.totals


    def _reductions(self, every: int | None) -> dict[Action, bool]:
        """After which actions the gradients of their stage are reduced, and whether that is the last time in a step."""
        return {
            action: number == len(actions)
            for actions in self._completing.values()
            for number, action in enumerate(actions, 1)
            if number == len(actions) or (every is not None and number % every == 0)
        }


_OVER = object()


class _Run:
    """What one pass over a row holds: values made or arriving, totals."""

    def __init__(
        self,
        executor: Executor,
        batch: Batch,
        seeds: Mapping[str, Tensor],
        *,
        engine: GradientOwner | None,
        reductions: Mapping[Action, bool],
    ) -> None:
        self._schedule = executor._schedule
        self._stages = executor._stages
        self._transport = executor._transport
        self._reductions = reductions
        self._streams = executor._streams
        self._batch = batch
        self._seeds = seeds
        self._engine = engine
        rows, seq = batch.tokens.shape
        self._rows = rows // self._schedule.num_micro_batches
        self._specs = executor._payload(self._rows, seq)
        self._made: dict[Action, Payload] = {}
        self._arrivals: dict[Action, Arrival] = {}
        self._extras: list[Extra] = []
        self.totals: dict[str, Total] = {}

    def steps(self, action: Action) -> Steps[None]:
        """One action, in steps between which another may run."""
        if action.kind is Kind.F:
            yield from self._aside(action.stage, self._forward(action))
        elif action.kind in (Kind.B, Kind.I):
            yield from self._aside(action.stage, self._backward(action))
        elif action.kind is Kind.W:
            yield from self._aside(action.stage, self._backward_weight(action))
        elif action.kind is Kind.REDUCE:
            if self._engine is not None:
                self._engine.reduce(action.stage)
        elif action.kind.is_send:
            made = Action(Kind.F if action.kind is Kind.SEND_F else Kind.B, action.stage, action.micro_batch)
            self._transport.send(self._made.pop(made), self._specs, peer=self._schedule.peer(action))
        else:
            self._arrivals[action] = self._transport.receive(self._specs, peer=self._schedule.peer(action))

    def _aside(self, stage: int, steps: Steps[None]) -> Steps[None]:
        """The steps on the stage's own stream, if it has one, between what was issued before and what comes after."""
        stream = self._streams.get(stage)
        if stream is None:
            yield from steps
            return
        main = torch.cuda.current_stream()
        stream.wait_stream(main)
        is_over = False
        while not is_over:
            with torch.cuda.stream(stream):
                is_over = next(steps, _OVER) is _OVER
            if not is_over:
                yield
        main.wait_stream(stream)

    def _take(self, receive: Action, made: Action) -> Payload:
        """A value from another rank if it was received, else from the neighbouring stage on this rank."""
        arrival = self._arrivals.pop(receive, None)
        payload = self._made.pop(made) if arrival is None else arrival.wait()
        if (
            self._streams
        ):  # made on another stream, whose memory must not be used again before this one is done
            for tensor in payload:
                tensor.record_stream(torch.cuda.current_stream())
        return payload

    def _forward(self, action: Action) -> Steps[None]:
        stage, micro_batch = action.stage, action.micro_batch
        payload: Payload = ()
        if stage > 0:
            payload = self._take(
                Action(Kind.RECV_F, stage, micro_batch), Action(Kind.F, stage - 1, micro_batch)
            )
        rows = self._batch.rows(micro_batch * self._rows, (micro_batch + 1) * self._rows)
        output = yield from self._stages[stage].forward_steps(payload, rows, micro_batch=micro_batch)
        if stage < self._schedule.num_stages - 1:
            self._made[action] = output.payload
        self._extras.extend(output.extras)

    def _backward(self, action: Action) -> Steps[None]:
        stage, micro_batch = action.stage, action.micro_batch
        gradients: Payload = ()
        if stage < self._schedule.num_stages - 1:
            gradients = self._take(
                Action(Kind.RECV_B, stage, micro_batch), Action(Kind.B, stage + 1, micro_batch)
            )
        if self._engine is not None and action in self._reductions:
            self._engine.arm(stage)
        made = yield from self._stages[stage].backward_steps(
            gradients, self._seeds, micro_batch=micro_batch, defers=action.kind is Kind.I
        )
        self._end_backward(action)
        if stage > 0:
            self._made[action.result] = made

    def _backward_weight(self, action: Action) -> Steps[None]:
        stage, micro_batch = self._stages[action.stage], action.micro_batch
        done = None
        if self._engine is not None and action in self._reductions:
            self._engine.arm(action.stage, waiting=stage.waiting(micro_batch=micro_batch))
            done = partial(self._engine.complete, action.stage)
        stage.backward_weight(micro_batch=micro_batch, done=done)
        self._end_backward(action)
        yield

    def _end_backward(self, action: Action) -> None:
        """Have gradients reduced that are complete, unless they are the step's: for them there is REDUCE."""
        if self._engine is not None and not self._reductions.get(action, True):
            self._engine.reduce(action.stage)

    def add_up(self) -> None:
        """Add the extras of the cell that has ended to the totals."""
        for extra in self._extras:
            old, new = self.totals.get(extra.name), Total(extra.sum.double(), extra.count)
            self.totals[extra.name] = new if old is None else Total(old.sum + new.sum, old.count + new.count)
        self._extras.clear()
