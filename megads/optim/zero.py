"""The native engine: flat buckets, ZeRO stage 0 and 1 (Rajbhandari et al. 2020, section 5.1).

    stage 0   all-reduce gradients      every data-parallel rank updates the whole bucket
    stage 1   reduce-scatter gradients  each updates its slice, keeps state for it alone, and gathers weights

Both do the same arithmetic on the same flat memory; stage 0 is a slice that is the whole. Reductions start inside
the step's last backward; the gathering of stage 1 goes on into the next forward, where each module waits for its own
weights.
The update is torch's fused AdamW (or SGD), which skips the step on the device when a gradient was not finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.clip import clip_factor, global_norm
from megads.optim.engine import StepReport
from megads.optim.precision import COMPUTE_DTYPES, LossScale
from megads.parallel.collectives import Pending, start_all_gather
from megads.parallel.gradient import Bucket, Reducer, make_buckets
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Piece, parameter_table, pieces
from megads.parallel.tally import TallyTable

MOMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()})


class NativeEngine:
    """Gradients and optimizer state of the parameters of this rank's stages.

    Args:
        stages: stage number -> its blocks, with initial weights in float32 (float64 for fp64).
        config: `optim` section.
        tallies: the modules whose state moves by what they count; None: there are none.
    """

    def __init__(
        self,
        stages: Mapping[int, torch.nn.ModuleList],
        mesh: Mesh,
        *,
        config: OptimConfig,
        tallies: TallyTable | None = None,
    ) -> None:
        self._mesh = mesh
        self._tallies = tallies or TallyTable((), mesh, rows=0, columns=0)
        self._config = config
        self._sharded = config.zero_stage == 1
        dtype = COMPUTE_DTYPES[config.precision]
        buckets = stage_buckets(stages, mesh, max_elements=config.bucket_elements, dtype=dtype)
        self._all = tuple(bucket for found in buckets.values() for bucket in found)
        self._reducers = {stage: Reducer(found, sharded=self._sharded) for stage, found in buckets.items()}
        self._masters = tuple(self._master(bucket) for bucket in self._all)
        decays = [bucket.traits.decay for bucket in self._all]
        self._optimizer = make_optimizer(self._masters, decays, config=config)
        start_moments(self._optimizer)
        self._scale = LossScale(mesh.device, is_dynamic=config.precision == "fp16")
        self._gathering: dict[int, Pending] = {}
        for module in {m for blocks in stages.values() for m in blocks.modules()}:
            self._wait_before(module)

    def _held(self, bucket: Bucket, flat: Tensor) -> Tensor:
        """The part of a bucket's flat memory that this rank updates."""
        return bucket.shard(flat) if self._sharded else flat

    def _master(self, bucket: Bucket) -> Tensor:
        """The values that the optimizer updates: the weights themselves, or a float32 copy of low-precision ones."""
        assert bucket.initial is not None  # read once, here
        is_copy = bucket.values.dtype != bucket.initial.dtype
        source = bucket.initial if is_copy else bucket.values
        master = self._held(bucket, source).detach()
        master = master.clone() if is_copy else master
        master.grad = self._held(bucket, bucket.gradients)
        bucket.initial = None
        return master

    @property
    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before the backward."""
        return self._scale.value

    def zero_gradients(self) -> None:
        """Start a step."""
        for bucket in self._all:
            bucket.gradients.zero_()
        self._tallies.start()

    def arm(self, stage: int, *, waiting: Sequence[Tensor] | None = None) -> None:
        """What comes next completes the gradients of a stage: buckets are reduced as they become complete."""
        self._reducers[stage].arm(waiting=waiting)

    def complete(self, stage: int, parameter: Tensor) -> None:
        """One of the parameters that `arm` was told of has its gradient."""
        self._reducers[stage].complete(parameter)

    def reduce(self, stage: int) -> None:
        """A stage's gradients are complete on this rank: start what was not started."""
        self._reducers[stage].flush()

    @property
    def num_early_reductions(self) -> int:
        """Buckets whose reduction began inside the last backward of the last step."""
        return sum(reducer.num_early for reducer in self._reducers.values())

    def step(self, *, lr: float) -> StepReport:
        """Clip by the global norm and update; a step with a gradient that is not finite changes nothing."""
        for reducer in self._reducers.values():
            reducer.finish()
        held = [self._held(bucket, bucket.gradients) for bucket in self._all]
        # of what all ranks of a group hold alike each counts its slice, so over the world every element counts once
        scaled_norm = global_norm(
            [b.shard(b.gradients) for b in self._all if b.traits.is_primary],
            [g for g, b in zip(held, self._all, strict=True) if not b.traits.is_primary],
            group=self._mesh.group("world"),
            device=self._mesh.device,
        )
        norm = scaled_norm / self._scale.value
        finite = norm.isfinite()
        factor = clip_factor(norm, self._config.clip) / self._scale.value
        for gradient in held:
            gradient.mul_(factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._scale.update(finite)
        self._publish()
        return StepReport(norm, finite, self._scale.value, self._tallies.finish(is_valid=finite))

    def _publish(self) -> None:
        """Bring every rank's weights up to the masters. Gathering goes on in the background."""
        for number in reversed(range(len(self._all))):  # the next forward asks for the last buckets first
            bucket, master = self._all[number], self._masters[number]
            if master.dtype != bucket.values.dtype:
                self._held(bucket, bucket.values).copy_(master)
            if self._sharded:
                self._gathering[number] = start_all_gather(bucket.values, bucket.group)

    def _wait_before(self, module: torch.nn.Module) -> None:
        """Let a module's forward wait for the gathering of the buckets that hold its own weights."""
        mine = {id(parameter) for parameter in module.parameters(recurse=False)}
        numbers = [
            number
            for number, bucket in enumerate(self._all)
            if any(id(place.parameter) in mine for place in bucket.places)
        ]
        if numbers and self._sharded:
            module.register_forward_pre_hook(lambda *_: self._wait(numbers))

    def _wait(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            pending = self._gathering.pop(number, None)
            if pending is not None:
                pending.wait()

    def _moments(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        for name in MOMENTS[self._config.name]:
            yield f"optim/{name}", self._optimizer.state[master][name]

    def _states(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Everything flat that belongs to a master, by kind."""
        yield "model", master
        yield from self._moments(master)

    def state(self) -> tuple[Piece, ...]:
        """This rank's share of masters, moments, and what layers keep. Of masters and moments every data-parallel rank
        saves a slice, whatever the stage.
        """
        found: list[Piece] = []
        for bucket, master in zip(self._all, self._masters, strict=True):
            if bucket.traits.is_primary:
                first = bucket.group.rank * (bucket.values.numel() // bucket.group.size)
                for kind, flat in self._states(master):
                    held = flat if self._sharded else bucket.shard(flat)
                    found += bucket_pieces(bucket, held, kind=kind, first=first)
        return (*found, *self._tallies.primary_pieces())

    def targets(self) -> tuple[Piece, ...]:
        """Everything this rank updates; `load_scalars` makes weights of it."""
        found: list[Piece] = []
        for bucket, master in zip(self._all, self._masters, strict=True):
            share = bucket.values.numel() // bucket.group.size
            first = bucket.group.rank * share if self._sharded else 0
            for kind, flat in self._states(master):
                found += bucket_pieces(bucket, flat, kind=kind, first=first)
        return (*found, *self._tallies.pieces())

    def scalars(self) -> Mapping[str, Any]:
        """Adam's step count (steps that were skipped do not count) and the loss scale."""
        steps = {int(s["step"]) for s in self._optimizer.state.values() if "step" in s}
        return {"name": self._config.name, "step": max(steps, default=0), **self._scale.state()}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave, after `targets` were filled: weights are current from here on."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(scalars["step"]))
        self._scale.load(scalars)
        self._publish()


def make_optimizer(
    parameters: Sequence[Tensor], decays: Sequence[bool], *, config: OptimConfig
) -> torch.optim.Optimizer:
    """torch's fused AdamW or SGD over flat parameters, of which those marked in `decays` get weight decay."""
    groups = [
        {
            "params": [p for p, has_decay in zip(parameters, decays, strict=True) if has_decay is decay],
            "weight_decay": config.weight_decay if decay and config.name == "adamw" else 0.0,
        }
        for decay in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state, which torch makes in the first step, so that loading can fill it."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for master in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        optimizer.state[master] = {
            "step": torch.zeros((), device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }


def stage_buckets(
    stages: Mapping[int, torch.nn.ModuleList], mesh: Mesh, *, max_elements: int, dtype: torch.dtype
) -> dict[int, tuple[Bucket, ...]]:
    """Buckets of each stage; a parameter that two stages of this rank share stands in the first one's."""
    seen: set[int] = set()
    buckets = {}
    for stage in sorted(stages):
        parameters = [p for p in parameter_table(stages[stage]) if id(p) not in seen]
        seen.update(map(id, parameters))
        buckets[stage] = make_buckets(parameters, mesh, max_elements=max_elements, dtype=dtype)
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
