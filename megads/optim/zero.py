"""The native engine: flat buckets, ZeRO stage 0 to 2 (Rajbhandari et al. 2020, section 5).

    stage 0   all-reduce gradients      every data-parallel rank updates the whole bucket
    stage 1   reduce-scatter gradients  each updates its slice, keeps state for it alone, and gathers weights
    stage 2   the same, several times   and keeps its slice of the gradients alone

All do the same arithmetic on the same flat memory; stage 0 is a slice that is the whole. Reductions start inside the
backward; the gathering of weights goes on into the next forward, where each module waits for its own.

What a rank sends in a step, for P parameters on it, n data-parallel ranks and M micro-batches (4 bytes a gradient, 2
with `reduce_dtype` bf16; weights in their own dtype); n is `shard_size` if that is given, and the r replicas of a slice
then send 2 x (r - 1) / r x P / n gradients besides, once a step:

    stage 0   2 x (n - 1) / n x P gradients
    stage 1   (n - 1) / n x P gradients, as many weights
    stage 2   ceil(M / reduce_every) x (n - 1) / n x P gradients, (n - 1) / n x P weights

What updates masters is in `update.py`, `staged.py` (state in the host's memory, moments in bfloat16) and `muon.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.clip import clip_factor, global_norm
from megads.optim.engine import Guard, StepReport
from megads.optim.group import Kind, ParameterGroup, check_groups, group_of
from megads.optim.muon import MuonUpdate
from megads.optim.precision import COMPUTE_DTYPES, LossScale
from megads.optim.share import Share
from megads.optim.staged import StagedAdamW
from megads.optim.update import FusedUpdate, Update
from megads.parallel.collectives import Pending, start_all_gather
from megads.parallel.gradient import WHOLE, Bucket, Reduction, make_buckets
from megads.parallel.mesh import Group, Mesh
from megads.parallel.parameter import Piece, parameter_table
from megads.parallel.reducer import Reducer
from megads.parallel.tally import TallyTable

_log = logging.getLogger("megads.optim")


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
        dtype = COMPUTE_DTYPES[config.precision]
        self._reduction = Reduction(
            is_sharded=config.zero_stage > 0,
            is_brief=config.zero_stage == 2,
            dtype=torch.bfloat16 if config.reduce_dtype == "bf16" else None,
        )
        buckets = stage_buckets(stages, mesh, config=config, dtype=dtype, reduction=self._reduction)
        self._all = tuple(bucket for found in buckets.values() for bucket in found)
        self._reducers = {stage: Reducer(found) for stage, found in buckets.items()}
        self._shares = tuple(_share_of(bucket, is_offloaded=config.offload) for bucket in self._all)
        self._updates = make_updates(
            self._shares, [bucket.sum for bucket in self._all], stage=mesh.group("stage"), config=config
        )
        for update in self._updates:
            update.start()
        self._scale = LossScale(mesh.device, config)
        self._gathering: dict[int, Pending] = {}
        _log.info("%s", self._cost())
        for module in {m for blocks in stages.values() for m in blocks.modules()}:
            self._wait_before(module)

    def _cost(self) -> str:
        """What the start of a run says of memory and communication."""
        config, groups = self._config, {bucket.group.size for bucket in self._all}
        sizes = " or ".join(map(str, sorted(groups))) or "1"
        num_bytes = sum(bucket.sum.numel() * bucket.sum.element_size() for bucket in self._all)
        kept = f"{num_bytes / 2**30:.2f} GiB of gradients stay on this rank"
        if config.zero_stage == 0:
            said = f"native ZeRO-0: {kept}, and are all-reduced once a step"
        elif config.zero_stage == 1:
            said = f"native ZeRO-1 over {sizes} ranks: gradients are whole on each, and reduce-scattered once a step"
        else:
            said = (
                f"native ZeRO-2 over {sizes} ranks: {kept}; they are reduce-scattered in {config.reduce_dtype} "
                f"once each {config.reduce_every} micro-batches, each time as many bytes as ZeRO-1 sends in a step"
            )
        where = "; masters and moments lie in the host's memory" if config.offload else ""
        return f"{said}; moments in {config.moment_dtype}{where}"

    @property
    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before the backward."""
        return self._scale.value

    def zero_gradients(self) -> None:
        """Start a step."""
        for reducer in self._reducers.values():
            reducer.zero()
        self._tallies.start()

    @property
    def reduce_every(self) -> int | None:
        """See `Engine`: ZeRO 2 reduces inside the step."""
        return self._config.reduce_every if self._reduction.is_brief else None

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

    def step(self, *, lr: float, guard: Guard | None = None) -> StepReport:
        """Clip by the global norm and update; a step with a gradient that is not finite changes nothing."""
        for reducer in self._reducers.values():
            reducer.finish()
        # of what all ranks of a group hold alike each counts its slice, so over the world every element counts once
        scaled_norm = global_norm(
            [s.bucket.sum[s.owned] for s in self._shares if s.bucket.traits.is_primary],
            [s.bucket.sum for s in self._shares if not s.bucket.traits.is_primary],
            group=self._mesh.group("world"),
            device=self._mesh.device,
        )
        norm = scaled_norm / self._scale.value
        finite = norm.isfinite()
        taken = finite if guard is None else finite & guard.admits(norm)
        factor = clip_factor(norm, self._config.clip) / self._scale.value
        for update in self._updates:
            update.step(lr=lr, factor=factor, finite=taken)
        self._scale.update(finite)
        self._publish(is_written=self._config.offload)
        return StepReport(norm, finite, taken, self._scale.value, self._tallies.finish(is_valid=taken))

    def _publish(self, *, is_written: bool = False) -> None:
        """Bring every rank's weights up to the masters. Gathering goes on in the background.

        Args:
            is_written: whether what this rank updates has been made of its masters already.
        """
        for number in reversed(range(len(self._all))):  # the next forward asks for the last buckets first
            bucket, master = self._all[number], self._shares[number].master
            is_copy = self._config.offload or master.dtype != bucket.values.dtype
            if is_copy and not is_written:
                bucket.held(bucket.values).copy_(master.to(bucket.values.device))
            if self._reduction.is_sharded:
                self._gathering[number] = start_all_gather(bucket.values, bucket.group)

    def _wait_before(self, module: torch.nn.Module) -> None:
        """Let a module's forward wait for the gathering of the buckets that hold its own weights."""
        mine = {id(parameter) for parameter in module.parameters(recurse=False)}
        numbers = [
            number
            for number, bucket in enumerate(self._all)
            if any(id(place.parameter) in mine for place in bucket.places)
        ]
        if numbers and self._reduction.is_sharded:
            module.register_forward_pre_hook(lambda *_: self._wait(numbers))

    def _wait(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            pending = self._gathering.pop(number, None)
            if pending is not None:
                pending.wait()

    def _states(self) -> Iterator[tuple[Share, str, Tensor]]:
        """Everything flat that belongs to a share, by kind."""
        for update in self._updates:
            if isinstance(update, StagedAdamW):
                update.settle()
        for share in self._shares:
            yield share, "model", share.master
        for update in self._updates:
            for share in update.shares:
                for name, flat in update.states(share.master):
                    yield share, f"optim/{name}", flat

    def shares(self) -> tuple[Share, ...]:
        """What this rank updates."""
        return self._shares

    def state(self) -> tuple[Piece, ...]:
        """This rank's share of masters, moments, and what layers keep. Of masters and moments every data-parallel rank
        saves a slice, whatever the stage.
        """
        owned = (
            piece for share, kind, flat in self._states() for piece in share.owned_pieces(flat, kind=kind)
        )
        return (*owned, *self._tallies.primary_pieces())

    def targets(self) -> tuple[Piece, ...]:
        """Everything this rank updates; `load_scalars` makes weights of it."""
        self._wait(tuple(self._gathering))  # it must not read what is filled next
        held = (piece for share, kind, flat in self._states() for piece in share.pieces(flat, kind=kind))
        return (*held, *self._tallies.pieces())

    def scalars(self) -> Mapping[str, Any]:
        """The optimizer's step count (steps that were skipped do not count) and the loss scale."""
        num_steps = max((update.num_steps for update in self._updates), default=0)
        return {"name": self._config.name, "step": num_steps, **self._scale.state()}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave, after `targets` were filled: weights are current from here on."""
        for update in self._updates:
            update.load_steps(int(scalars["step"]))
        self._scale.load(scalars)
        self._publish()


def _share_of(bucket: Bucket, *, is_offloaded: bool) -> Share:
    """What this rank updates of a bucket: the weights themselves, or a copy, float32 or in the host's memory."""
    assert bucket.initial is not None  # read once, here
    is_copy = is_offloaded or bucket.values.dtype != bucket.initial.dtype
    master = bucket.held(bucket.initial if is_copy else bucket.values).detach()
    bucket.initial = None
    holders = bucket.replicas if bucket.reduction.is_sharded else bucket.group  # of the same values
    size = master.numel() // holders.size
    owned = slice(holders.rank * size, (holders.rank + 1) * size)
    if is_offloaded:
        on_host = torch.empty_like(master, device="cpu", pin_memory=master.is_cuda)
        master = on_host.copy_(master)
    elif is_copy and bucket.reduction.is_sharded:
        master = master.clone()
    return Share(
        bucket, master, bucket.group.rank * master.numel() if bucket.reduction.is_sharded else 0, owned
    )


def make_updates(
    shares: Sequence[Share], gradients: Sequence[Tensor], *, stage: Group, config: OptimConfig
) -> tuple[Update, ...]:
    """An update for each kind that the groups of the shares ask for; all ranks of the `stage` call it together."""
    by_kind: dict[Kind, list[tuple[Share, Tensor]]] = {}
    for share, gradient in zip(shares, gradients, strict=True):
        group = share.bucket.traits.group
        assert isinstance(group, ParameterGroup)  # `stage_buckets` made it
        by_kind.setdefault(group.kind, []).append((share, gradient))
    made: list[Update] = []
    for kind, found in by_kind.items():
        theirs, sums = [share for share, _ in found], [gradient for _, gradient in found]
        if kind == "muon":
            made.append(MuonUpdate(theirs, sums, group=stage, config=config))
        elif config.offload or config.moment_dtype == "bf16":
            made.append(StagedAdamW(theirs, sums, config=config))
        else:
            made.append(FusedUpdate(theirs, sums, name=kind, config=config))
    return tuple(made)


def stage_buckets(
    stages: Mapping[int, torch.nn.ModuleList],
    mesh: Mesh,
    *,
    config: OptimConfig,
    dtype: torch.dtype,
    reduction: Reduction = WHOLE,
) -> dict[int, tuple[Bucket, ...]]:
    """Buckets of each stage; a parameter that two stages of this rank share stands in the first one's."""
    check_groups(parameter_table(stages.values()), mesh, config=config)
    seen: set[int] = set()
    buckets = {}
    for stage in sorted(stages):
        parameters = [p for p in parameter_table(stages[stage]) if id(p) not in seen]
        seen.update(map(id, parameters))
        buckets[stage] = make_buckets(
            parameters,
            mesh,
            max_elements=config.bucket_elements,
            dtype=dtype,
            group_of=partial(group_of, config=config),
            reduction=reduction,
        )
    return buckets
