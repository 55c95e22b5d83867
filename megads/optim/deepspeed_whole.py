"""DeepSpeed's stage 0: gradients are summed by its all-reduce, and every rank updates everything.

    backwards -> bucket.gradients -> sum over tp, ends -> DeepSpeed: sum over dp, AdamW on float32 twins -> weights

DeepSpeed sees float32 parameters in every precision: the masters. It knows no low-precision weights without ZeRO that
would keep float32 sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.deepspeed_twin import Held, sum_outside
from megads.optim.deepspeed_zero import initialize
from megads.optim.precision import COMPUTE_DTYPES
from megads.optim.share import Share
from megads.optim.update import make_optimizer
from megads.optim.zero import stage_buckets
from megads.parallel.gradient import Bucket
from megads.parallel.mesh import Mesh


class WholeTwins:
    """`Twins` that are float32 masters, whole on each rank."""

    num_summands = 1

    def __init__(self, stages: Mapping[int, torch.nn.ModuleList], mesh: Mesh, *, config: OptimConfig) -> None:
        self._mesh = mesh
        dtype = COMPUTE_DTYPES[config.precision]
        buckets = stage_buckets(stages, mesh, config=config, dtype=dtype)
        self._buckets = tuple(bucket for found in buckets.values() for bucket in found)
        self._twins = torch.nn.ParameterList(torch.nn.Parameter(_master(b)) for b in self._buckets)
        self.optimizer = make_optimizer(
            list(self._twins),
            [bucket.traits.group for bucket in self._buckets],
            name=config.name,
            config=config,
        )
        self._engine = initialize(self._twins, self.optimizer, mesh=mesh, config=config)

    @property
    def cost(self) -> str:
        """See `Twins`."""
        return "gradients and optimizer state are whole on each rank"

    def held(self) -> tuple[Held, ...]:
        """See `Twins`."""
        found = []
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            size = bucket.values.numel() // bucket.group.size
            first = bucket.group.rank * size
            share = Share(bucket, twin.detach(), 0, slice(first, first + size))
            found.append(Held(share, twin, slice(0, twin.numel())))
        return tuple(found)

    def start(self) -> None:
        """See `Twins`."""
        for bucket in self._buckets:
            bucket.gradients.zero_()

    def reduce(self) -> Sequence[Tensor]:
        """See `Twins`."""
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            sum_outside(bucket, self._mesh)
            twin.grad = bucket.gradients
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()
        return [bucket.gradients for bucket in self._buckets]

    def update(self) -> None:
        """See `Twins`."""
        self._engine.step()
        self.publish()

    def publish(self) -> None:
        """See `Twins`."""
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            if bucket.values.dtype != twin.dtype:
                bucket.values.copy_(twin.detach())


def _master(bucket: Bucket) -> Tensor:
    """The weights themselves, or the float32 values that low-precision ones were made of."""
    initial, bucket.initial = bucket.initial, None
    assert initial is not None  # read once, here
    return bucket.values if bucket.values.dtype == initial.dtype else initial
