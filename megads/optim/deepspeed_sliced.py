"""DeepSpeed's stages 1 and 2: gradients accumulate in megads' float32 buckets; once a step DeepSpeed gets the sum.

    backwards -> bucket.gradients -> sum over tp, ends -> twin.grad -> DeepSpeed: sum over dp, AdamW, gather -> weights
                 float32, whole      ours                 compute dtype, rounded once

A twin's hooks fire in a backward that starts at the twins themselves. The model's parameters are views of the twins'
memory, so they are current after a step. A rank's part of a twin is known from `_hp_mapping`, DeepSpeed's own map from
a parameter to its place in the flat float32 partition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.deepspeed_twin import Held, sum_outside, take_initial
from megads.optim.deepspeed_zero import initialize, offloads_optimizer
from megads.optim.precision import COMPUTE_DTYPES
from megads.optim.share import Share
from megads.optim.update import make_optimizer
from megads.optim.zero import stage_buckets
from megads.parallel.mesh import Mesh


class SlicedTwins:
    """`Twins` whose optimizer state is cut over the data-parallel ranks; weights are whole on each."""

    num_summands = 1

    def __init__(self, stages: Mapping[int, torch.nn.ModuleList], mesh: Mesh, *, config: OptimConfig) -> None:
        self._mesh = mesh
        self._config = config
        self._offloads = offloads_optimizer(config)
        dtype = COMPUTE_DTYPES[config.precision]
        buckets = stage_buckets(stages, mesh, config=config, dtype=dtype)
        self._buckets = tuple(bucket for found in buckets.values() for bucket in found)
        self._twins = torch.nn.ParameterList(torch.nn.Parameter(bucket.values) for bucket in self._buckets)
        # ZeRO puts its flat partitions in the place of the twins in this optimizer's groups
        self.optimizer = make_optimizer(
            list(self._twins),
            [bucket.traits.group for bucket in self._buckets],
            name=config.name,
            config=config,
        )
        self._engine = initialize(self._twins, self.optimizer, mesh=mesh, config=config)
        for held in self.held():  # DeepSpeed took the masters from the rounded weights
            take_initial(held.share)
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            bucket.move(twin.data)
            bucket.initial = None

    @property
    def cost(self) -> str:
        """See `Twins`."""
        size = sum(bucket.gradients.numel() * bucket.gradients.element_size() for bucket in self._buckets)
        return (
            f"gradients are whole on each, in float32 ({size / 2**30:.2f} GiB on this rank), and reach DeepSpeed in "
            f"{self._config.precision}"
        )

    def held(self) -> tuple[Held, ...]:
        """See `Twins`."""
        found = []
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            mapping = twin._hp_mapping
            if mapping is not None:
                partition = self.optimizer.param_groups[mapping.param_group_index]["params"][0]
                here, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
                span = slice(here, here + size)
                start = int(mapping.lp_fragment_address.start)
                share = Share(bucket, partition.detach()[span], start, slice(0, size))
                found.append(Held(share, partition, span))
        return tuple(found)

    def start(self) -> None:
        """See `Twins`."""
        for bucket in self._buckets:
            bucket.gradients.zero_()

    def reduce(self) -> Sequence[Tensor]:
        """See `Twins`."""
        for bucket in self._buckets:
            sum_outside(bucket, self._mesh)
        self._engine.set_gradient_accumulation_boundary(True)
        dtype = self._twins[0].dtype
        torch.autograd.backward(list(self._twins), [bucket.gradients.to(dtype) for bucket in self._buckets])
        self._engine.allreduce_gradients()
        if self._offloads and self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)  # copies to the host are under way
        return [
            twin._hp_mapping.get_lp_grad_fragment(twin._index_in_param_group)
            for twin in self._twins
            if twin._hp_mapping is not None
        ]

    def update(self) -> None:
        """See `Twins`."""
        self._engine.step()

    def publish(self) -> None:
        """See `Twins`."""
        self._engine.optimizer.update_lp_params()
