"""One pipeline stage: blocks on this rank, their forward and backward for one micro-batch at a time.

Blocks are callables `(payload, batch) -> BlockOutput`: a payload, the fixed tuple of tensors that goes on to the next
block, and extras, the sums that enter the loss wherever they arise (the language loss on the last stage, balance losses
on any). What blocks compute is not known here.

After its forward a stage keeps the *edge* of its output in the autograd graph, not the output: the transport frees the
tensor once it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megads.data.sequence import Batch

Payload = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Extra:
    """One term of the loss: its sum over this micro-batch and how many summands it has (both scalars)."""

    name: str
    sum: Tensor
    count: Tensor


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


class Stage:
    """Blocks `blocks` as stage number `number`; the first stage gets an empty payload, the last returns one."""

    def __init__(self, number: int, blocks: Sequence[torch.nn.Module]) -> None:
        self.number = number
        self.blocks = tuple(blocks)
        self._saved: dict[int, _Saved] = {}

    @property
    def num_live(self) -> int:
        """Micro-batches whose backward is still to come."""
        return len(self._saved)

    def forward(self, payload: Payload, batch: Batch, *, micro_batch: int) -> BlockOutput:
        """Run the blocks. With gradients enabled, remember what `backward` of this micro-batch needs.

        Returns:
            the outgoing payload, detached, and the extras, detached.
        """
        keeping = torch.is_grad_enabled()
        inputs = tuple(t.requires_grad_() if keeping and t.is_floating_point() else t for t in payload)
        current = inputs
        extras: list[Extra] = []
        for block in self.blocks:
            output: BlockOutput = block(current, batch)
            current = output.payload
            extras.extend(output.extras)
        if keeping:
            edges = tuple(get_gradient_edge(t) for t in current)
            self._saved[micro_batch] = _Saved(inputs, edges, tuple(extras))
        return BlockOutput(
            tuple(t.detach() for t in current), tuple(Extra(e.name, e.sum.detach(), e.count) for e in extras)
        )

    def backward(self, gradients: Payload, seeds: Mapping[str, Tensor], *, micro_batch: int) -> Payload:
        """Accumulate parameter gradients of one micro-batch.

        Args:
            gradients: of the outgoing payload, from the next stage; empty on the last.
            seeds: for each extra the derivative of the loss by its sum: weight / global count.

        Returns:
            gradients of the incoming payload; empty on the first stage.
        """
        saved = self._saved.pop(micro_batch)
        roots = [*saved.edges, *(get_gradient_edge(e.sum) for e in saved.extras)]
        flows = [*gradients, *(seeds[e.name].to(e.sum.dtype) for e in saved.extras)]
        torch.autograd.backward(roots, flows)
        return tuple(t.grad for t in saved.inputs if t.grad is not None)
