"""The native engine: flat buckets, ZeRO stage 0 and 1 (Rajbhandari et al. 2020, section 5.1).

    stage 0   all-reduce gradients      every data-parallel rank updates the whole bucket
    stage 1   reduce-scatter gradients  each updates its slice, keeps moments for its slice alone, and gathers weights

Both do the same arithmetic on the same flat memory; stage 0 is a slice that is the whole. The update itself is torch's
fused AdamW (or SGD), which skips the step on the device when a gradient was not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.clip import clip_factor, global_norm
from megads.optim.engine import StepReport
from megads.parallel.collectives import all_gather_
from megads.parallel.gradient import Bucket, make_buckets
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Piece, parameter_table, pieces

MOMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()})


class NativeEngine:
    """Gradients and optimizer state of the parameters of this rank's stages.

    Args:
        stages: stage number -> its blocks.
        config: `optim` section.
    """

    def __init__(self, stages: Mapping[int, torch.nn.Module], mesh: Mesh, *, config: OptimConfig) -> None:
        self._mesh = mesh
        self._config = config
        self._sharded = config.zero_stage == 1
        self._buckets = make_stage_buckets(stages, mesh, max_elements=config.bucket_elements)
        self._all = tuple(bucket for buckets in self._buckets.values() for bucket in buckets)
        self._values = {id(b): self._held(b, b.values).detach() for b in self._all}
        for bucket in self._all:
            self._values[id(bucket)].grad = self._held(bucket, bucket.gradients)
        self._optimizer = self._make_optimizer()

    def _held(self, bucket: Bucket, flat: Tensor) -> Tensor:
        """The part of a bucket's flat memory that this rank updates."""
        return bucket.shard(flat) if self._sharded else flat

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self._config
        groups = [
            {
                "params": [self._values[id(b)] for b in self._all if b.traits.decay is decay],
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
        ]
        groups = [group for group in groups if group["params"]]
        if config.name == "sgd":
            return torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], lr=config.lr, fused=True)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for values in self._values.values():  # present before the first step, so that loading can fill it
            optimizer.state[values] = {
                "step": torch.zeros((), device=values.device),
                "exp_avg": torch.zeros_like(values),
                "exp_avg_sq": torch.zeros_like(values),
            }
        return optimizer

    def zero_gradients(self) -> None:
        """Start a step."""
        for bucket in self._all:
            bucket.gradients.zero_()

    def reduce(self, stage: int) -> None:
        """Sum a stage's gradients over the ranks that share them; tied parameters wait for `step`."""
        for bucket in self._buckets[stage]:
            if bucket.traits.tie is None:
                bucket.reduce(sharded=self._sharded)

    def step(self, *, lr: float) -> StepReport:
        """Clip by the global norm and update; a step with a gradient that is not finite changes nothing."""
        for bucket in self._all:
            if bucket.traits.tie is not None:  # both ends have finished their backward only now
                bucket.reduce(sharded=self._sharded)
        norm = global_norm(
            (self._held(b, b.gradients) for b in self._all if b.traits.is_primary),
            group=self._mesh.group("world" if self._sharded else "model"),
            device=self._mesh.device,
        )
        finite = norm.isfinite()
        factor = clip_factor(norm, self._config.clip)
        for bucket in self._all:
            self._held(bucket, bucket.gradients).mul_(factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        if self._sharded:
            for bucket in self._all:
                all_gather_(bucket.values, bucket.group)
        return StepReport(norm, finite)

    def _moments(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        state = self._optimizer.state.get(self._values[id(bucket)], {})
        for name in MOMENTS[self._config.name]:
            yield f"optim/{name}", state[name]

    def state(self) -> tuple[Piece, ...]:
        """This rank's share of weights and moments. Every data-parallel rank saves a slice, whatever the stage."""
        found: list[Piece] = []
        for bucket in self._all:
            if not bucket.traits.is_primary:
                continue
            share = bucket.values.numel() // bucket.group.size
            first = bucket.group.rank * share
            found += bucket_pieces(bucket, bucket.shard(bucket.values), kind="model", first=first)
            for kind, moment in self._moments(bucket):
                held = moment if self._sharded else bucket.shard(moment)
                found += bucket_pieces(bucket, held, kind=kind, first=first)
        return tuple(found)

    def targets(self) -> tuple[Piece, ...]:
        """Everything this rank holds: whole weights, and the moments it updates."""
        found: list[Piece] = []
        for bucket in self._all:
            found += bucket_pieces(bucket, bucket.values, kind="model", first=0)
            share = bucket.values.numel() // bucket.group.size
            for kind, moment in self._moments(bucket):
                first = bucket.group.rank * share if self._sharded else 0
                found += bucket_pieces(bucket, moment, kind=kind, first=first)
        return tuple(found)

    def scalars(self) -> Mapping[str, Any]:
        """Adam's step count (steps that were skipped do not count)."""
        steps = {int(s["step"]) for s in self._optimizer.state.values() if "step" in s}
        return {"name": self._config.name, "step": max(steps, default=0)}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back Adam's step count."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(scalars["step"]))


def make_stage_buckets(
    stages: Mapping[int, torch.nn.Module], mesh: Mesh, *, max_elements: int
) -> dict[int, tuple[Bucket, ...]]:
    """Buckets of each stage; a parameter that two stages of this rank share stands in the first one's."""
    seen: set[int] = set()
    buckets = {}
    for stage in sorted(stages):
        parameters = [p for p in parameter_table([stages[stage]]) if id(p) not in seen]
        seen.update(map(id, parameters))
        buckets[stage] = make_buckets(parameters, mesh, max_elements=max_elements)
    return buckets


def bucket_pieces(bucket: Bucket, held: Tensor, *, kind: str, first: int) -> Iterator[Piece]:
    """Flat elements [first, first + held.numel()) of a bucket as pieces of logical tensors `kind/name`."""
    last = first + held.numel()
    for place in bucket.places:
        start = max(first, place.start)
        stop = min(last, place.start + place.parameter.numel())
        if start < stop:
            values = held[start - first : stop - first]
            yield from pieces(place.parameter, values, kind=kind, start=start - place.start)
