"""One pipeline stage: blocks on this rank, their forward and backward for one micro-batch at a time.

Blocks are callables `(payload, batch) -> BlockOutput`: a payload, the fixed tuple of tensors that goes on to the next
block, and extras, the sums that enter the loss wherever they arise (the language loss on the last stage, balance losses
on any). What blocks compute is not known here.

After its forward a stage keeps the *edge* of its output in the autograd graph, not the output: the transport frees the
tensor once it is sent. A backward is whole (B), or split into the part that other stages wait for (I) and the rest (W),
which is what the layers left in the `WeightQueue`; either way the same work runs in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megads.data.sequence import Batch
from megads.parallel.weight_queue import WeightQueue

Payload = tuple[Tensor, ...]
T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that stops after each of its steps, so that other work can be run between them."""


def finish(steps: Steps[T]) -> T:
    """Run what is left; returns the result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: T = stop.value
            return result


@dataclass(frozen=True, slots=True)
class Extra:
    """One term of the loss: its sum over this micro-batch and how many summands it has (both scalars).

    A sum without a gradient is reported and not trained on.
    """

    name: str
    sum: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True)
class Term:
    """How the extras of one name enter the loss: weight x their sum over everything / the global number of `unit`.

    Attributes:
        weight: of each source's mean.
        unit: tokens whose label counts, or all tokens.
        num_sources: blocks of the model that have such an extra.
        is_cut: whether each tensor-parallel rank has a part of the sum; else all have the same.
    """

    name: str
    weight: float
    unit: Literal["label", "position"]
    num_sources: int
    is_cut: bool


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """What a block hands on."""

    payload: Payload
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the backward of one micro-batch needs."""

    inputs: Payload
    edges: tuple[GradientEdge, ...]
    extras: tuple[Extra, ...]


def _parts(blocks: tuple[torch.nn.Module, ...]) -> tuple[tuple[torch.nn.Module, ...], ...]:
    """The blocks of each step."""
    starts = [n for n, block in enumerate(blocks) if n == 0 or not getattr(block, "uses_previous", False)]
    return tuple(blocks[start:stop] for start, stop in itertools.pairwise([*starts, len(blocks)]))


class Stage:
    """Blocks `blocks` as stage number `number`; the first stage gets an empty payload, the last returns one.

    Args:
        queue: where the blocks' layers put their weight gradients.
        in_steps: cut the graph between blocks, so that `*_steps` stop after each one; else they are one step. A block
            whose `uses_previous` is true adds to weights of the block before it, and is one step with it: cut apart,
            the gradients of these weights would be called complete, and be on their way, after the first of two parts.
    """

    def __init__(
        self, number: int, blocks: Sequence[torch.nn.Module], *, queue: WeightQueue, in_steps: bool = False
    ) -> None:
        self.number = number
        self.blocks = tuple(blocks)
        self._parts = _parts(self.blocks) if in_steps else (self.blocks,)
        self._queue = queue
        self._saved: dict[int, list[_Saved]] = {}
        self._live: set[int] = set()

    @property
    def num_live(self) -> int:
        """Micro-batches whose forward has begun and whose backward, or the weights' part of it, has not ended."""
        return len(self._live)

    def forward(self, payload: Payload, batch: Batch, *, micro_batch: int) -> BlockOutput:
        """Run the blocks. With gradients enabled, remember what `backward` of this micro-batch needs.

        Returns:
            the outgoing payload, detached, and the extras, detached.
        """
        return finish(self.forward_steps(payload, batch, micro_batch=micro_batch))

    def forward_steps(self, payload: Payload, batch: Batch, *, micro_batch: int) -> Steps[BlockOutput]:
        """`forward`, step by step."""
        keeping = torch.is_grad_enabled()
        if keeping:
            self._live.add(micro_batch)
        saved: list[_Saved] = []
        extras: list[Extra] = []
        for part in self._parts:
            inputs = tuple(t.requires_grad_() if keeping and t.is_floating_point() else t for t in payload)
            current = inputs
            terms: list[Extra] = []
            for block in part:
                output: BlockOutput = block(current, batch)
                current = output.payload
                terms.extend(output.extras)
            if keeping:
                saved.append(_Saved(inputs, tuple(get_gradient_edge(t) for t in current), tuple(terms)))
            payload = tuple(t.detach() for t in current)
            extras.extend(Extra(e.name, e.sum.detach(), e.count) for e in terms)
            del current, output  # while others run, the graph alone keeps what the backward needs
            yield
        if keeping:
            self._saved[micro_batch] = saved
        return BlockOutput(payload, tuple(extras))

    def backward(self, gradients: Payload, seeds: Mapping[str, Tensor], *, micro_batch: int) -> Payload:
        """Accumulate parameter gradients of one micro-batch (B).

        Args:
            gradients: of the outgoing payload, from the next stage; empty on the last.
            seeds: for each extra the derivative of the loss by its sum: weight / global count.

        Returns:
            gradients of the incoming payload; empty on the first stage.
        """
        return finish(self.backward_steps(gradients, seeds, micro_batch=micro_batch))

    def backward_input(self, gradients: Payload, seeds: Mapping[str, Tensor], *, micro_batch: int) -> Payload:
        """The part of `backward` that other stages wait for (I); `backward_weight` is the rest."""
        return finish(self.backward_steps(gradients, seeds, micro_batch=micro_batch, defers=True))

    def backward_weight(self, *, micro_batch: int, done: Callable[[Tensor], None] | None = None) -> None:
        """The weight gradients that `backward_input` put off (W).

        Args:
            done: is told each parameter of `waiting` as its gradient is complete.
        """
        self._queue.run(self.number, micro_batch, done=done)
        self._live.remove(micro_batch)

    def waiting(self, *, micro_batch: int) -> tuple[Tensor, ...]:
        """The parameters whose gradients `backward_weight` will add to."""
        return self._queue.waiting(self.number, micro_batch)

    def backward_steps(
        self,
        gradients: Payload,
        seeds: Mapping[str, Tensor],
        *,
        micro_batch: int,
        defers: bool = False,
    ) -> Steps[Payload]:
        """`backward`, or with `defers` `backward_input`, step by step."""
        parts = self._saved.pop(micro_batch)
        while parts:
            saved = parts.pop()
            trained = [e for e in saved.extras if e.sum.requires_grad]
            roots = [*saved.edges, *(get_gradient_edge(e.sum) for e in trained)]
            flows = [*gradients, *(seeds[e.name].to(e.sum.dtype) for e in trained)]
            with self._queue.deferring(self.number, micro_batch) if defers else nullcontext():
                torch.autograd.backward(roots, flows)
            gradients = tuple(t.grad for t in saved.inputs if t.grad is not None)
            del saved, trained, roots, flows
            yield
        if not defers:
            self._live.remove(micro_batch)
        return gradients
