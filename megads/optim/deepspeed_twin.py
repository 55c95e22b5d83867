"""What the ZeRO stages of the DeepSpeed engine have in common: flat parameters beside buckets, and what a rank holds.

    bucket.values  | layers.1... |  layers.0... | pad |      the model's parameters are views
    twin             one flat parameter for DeepSpeed
    partition        DeepSpeed's flat float32 memory on this rank: slices of many twins, in its optimizer's groups
    held             the slice of a partition that is this rank's share of a bucket

The optimizer's parameter groups hold partitions, which DeepSpeed puts in the place of the twins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megads.optim.share import Share
from megads.parallel.collectives import all_reduce_
from megads.parallel.gradient import Bucket
from megads.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True)
class Held:
    """A share of a bucket, and where its elements are in the optimizer.

    Attributes:
        share: its master is `partition[span]`.
        partition: flat, a key of the optimizer's state.
    """

    share: Share
    partition: Tensor
    span: slice


class Twins(Protocol):
    """One ZeRO stage: when DeepSpeed gets gradients, and where weights and state are."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's, which DeepSpeed calls."""

    @property
    def cost(self) -> str:
        """What the start of a run says about memory."""

    @property
    def num_summands(self) -> int:
        """Of what `reduce` gives the mean of; 1: it gives sums."""

    def held(self) -> tuple[Held, ...]:
        """What this rank updates."""

    def start(self) -> None:
        """Begin a step: no gradient counts any more."""

    def reduce(self) -> Sequence[Tensor]:
        """Gradients of `held`, flat, reduced over all ranks that share the parameters."""

    def update(self) -> None:
        """Let DeepSpeed step, and make weights of the masters."""

    def publish(self) -> None:
        """Make weights of masters that were loaded."""


def sum_outside(bucket: Bucket, mesh: Mesh) -> None:
    """Sum a bucket's gradients over the ranks that DeepSpeed does not know: of other tensor-parallel ranks, of ties."""
    axes = (*bucket.traits.partial, *(("ends",) if bucket.traits.tie is not None else ()))
    for axis in axes:
        all_reduce_(bucket.gradients, mesh.group(axis))


def take_initial(share: Share) -> None:
    """Fill a master with the values that its bucket came with."""
    initial = share.bucket.initial
    assert initial is not None  # dropped when all shares have theirs
    share.master.copy_(initial[share.start : share.start + share.master.numel()])
