"""The DeepSpeed engine: DeepSpeed's ZeRO-1 and ZeRO-2 under megads' own executor. The only file that imports deepspeed.

The executor may run any schedule because DeepSpeed sees nothing of it. Gradients accumulate in megads' float32
buckets; once a step DeepSpeed gets the sum:

    backwards -> bucket.gradients -> sum over tp, ends -> twin.grad -> DeepSpeed: sum over dp, AdamW, gather -> weights
                 float32, whole      ours                 compute dtype, rounded once

A *twin* is one flat parameter a bucket, the only kind that DeepSpeed knows; its hooks fire in a backward that starts at
the twins themselves. The model's parameters are views of the twins' memory, so they are current after a step.

DeepSpeed sums, updates and gathers. What it would do twice or otherwise is switched off: the mean over data-parallel
ranks (the loss is divided once, by the global token count), its norm and clipping (summed per parameter group, which
stages of a pipeline may have in different numbers) and its loss scale. Norm, clip factor, gate and scale are the native
engine's, and reach the update through torch's fused optimizer (`grad_scale`, `found_inf`).

State is seen through `_hp_mapping`, DeepSpeed's own map from a parameter to its place in the flat float32 partition:
pieces are views of that partition, so a checkpoint does not tell which engine wrote it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.errors import ConfigError
from megads.optim.clip import clip_factor, global_norm
from megads.optim.engine import StepReport
from megads.optim.precision import COMPUTE_DTYPES, LossScale
from megads.optim.share import bucket_pieces
from megads.optim.update import MOMENTS, make_optimizer, start_moments
from megads.optim.zero import stage_buckets
from megads.parallel.collectives import all_reduce_
from megads.parallel.gradient import Bucket
from megads.parallel.mesh import Mesh, communicator
from megads.parallel.parameter import Piece

_log = logging.getLogger("megads.optim")


class DeepSpeedEngine:
    """Gradients and optimizer state of the parameters of this rank's stages, updated by DeepSpeed.

    All ranks make it together.

    Args:
        stages: stage number -> its blocks, with initial weights in float32.
        config: `optim` section; its `deepspeed` keys go to DeepSpeed as they are.

    Raises:
        ConfigError: deepspeed is not installed, or refuses a key.
    """

    def __init__(self, stages: Mapping[int, torch.nn.ModuleList], mesh: Mesh, *, config: OptimConfig) -> None:
        self._mesh = mesh
        self._config = config
        dtype = COMPUTE_DTYPES[config.precision]
        buckets = stage_buckets(stages, mesh, max_elements=config.bucket_elements, dtype=dtype)
        self._buckets = tuple(bucket for found in buckets.values() for bucket in found)
        self._twins = torch.nn.ParameterList(torch.nn.Parameter(bucket.values) for bucket in self._buckets)
        self._scale = LossScale(mesh.device, is_dynamic=config.precision == "fp16")
        decays = [bucket.traits.decay for bucket in self._buckets]
        # ZeRO puts its flat partitions in the place of the twins in this optimizer's groups
        self._optimizer = make_optimizer(list(self._twins), decays, name=config.name, config=config)
        self._engine = _initialize(self._twins, self._optimizer, mesh, config)
        start_moments(self._optimizer)
        for share in self._shares():  # DeepSpeed took the masters from the rounded weights
            assert share.bucket.initial is not None
            initial = share.bucket.initial[share.start : share.start + share.master.numel()]
            share.master.detach().copy_(initial)
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            bucket.move(twin.data)
            bucket.initial = None
        size = sum(bucket.gradients.numel() * bucket.gradients.element_size() for bucket in self._buckets)
        _log.info(
            "DeepSpeed ZeRO-%d: optimizer state is cut into %d; gradients are whole on each, in float32 "
            "(%.2f GiB on this rank), and reach DeepSpeed in %s",
            config.zero_stage,
            mesh.group("dp_cp").size,
            size / 2**30,
            config.precision,
        )

    @property
    def loss_scale(self) -> Tensor:
        """What the loss is multiplied by before the backward."""
        return self._scale.value

    def zero_gradients(self) -> None:
        """Start a step."""
        for bucket in self._buckets:
            bucket.gradients.zero_()

    def arm(self, stage: int, *, waiting: Sequence[Tensor] | None = None) -> None:
        """Nothing: DeepSpeed reduces in `step`."""

    def complete(self, stage: int, parameter: Tensor) -> None:
        """Nothing: DeepSpeed reduces in `step`."""

    def reduce(self, stage: int) -> None:
        """Nothing: DeepSpeed reduces in `step`."""

    def step(self, *, lr: float) -> StepReport:
        """Reduce, clip by the global norm and update; a step with a gradient that is not finite changes nothing."""
        self._deliver()
        norm = self._scaled_norm() / self._scale.value
        finite = norm.isfinite()
        factor = clip_factor(norm, self._config.clip) / self._scale.value
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.grad_scale = (1.0 / factor).float()  # type: ignore[attr-defined]
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._engine.step()
        self._scale.update(finite)
        return StepReport(norm, finite, self._scale.value, torch.zeros(0, 0))

    def _deliver(self) -> None:
        """Give DeepSpeed the gradients and have them summed over the data-parallel ranks."""
        for bucket in self._buckets:
            axes = (*bucket.traits.partial, *(("ends",) if bucket.traits.tie is not None else ()))
            for axis in axes:
                all_reduce_(bucket.gradients, self._mesh.group(axis))
        self._engine.set_gradient_accumulation_boundary(True)
        dtype = self._twins[0].dtype
        torch.autograd.backward(list(self._twins), [bucket.gradients.to(dtype) for bucket in self._buckets])
        self._engine.allreduce_gradients()

    def _scaled_norm(self) -> Tensor:
        """Global norm of the loss-scaled gradients."""
        reduced = [
            (share.bucket.traits.is_primary, share.mapping.get_lp_grad_fragment(share.index))
            for share in self._shares()
        ]
        return global_norm(
            [gradient for is_primary, gradient in reduced if is_primary],
            [gradient for is_primary, gradient in reduced if not is_primary],
            group=self._mesh.group("world"),
            device=self._mesh.device,
        )

    def _shares(self) -> Iterator[_Share]:
        """What this rank updates of each bucket, if anything."""
        for bucket, twin in zip(self._buckets, self._twins, strict=True):
            if twin._hp_mapping is not None:
                partition = self._optimizer.param_groups[twin._hp_mapping.param_group_index]["params"][0]
                yield _Share(bucket, twin._hp_mapping, twin._index_in_param_group, partition)

    def _pieces(self, share: _Share) -> Iterator[Piece]:
        """Masters and moments of a share, as views."""
        yield from bucket_pieces(share.bucket, share.master.detach(), kind="model", first=share.start)
        for name in MOMENTS[self._config.name]:
            moment = self._optimizer.state[share.partition][name][share.span]
            yield from bucket_pieces(share.bucket, moment, kind=f"optim/{name}", first=share.start)

    def state(self) -> tuple[Piece, ...]:
        """This rank's share of masters and moments."""
        shares = (share for share in self._shares() if share.bucket.traits.is_primary)
        return tuple(piece for share in shares for piece in self._pieces(share))

    def targets(self) -> tuple[Piece, ...]:
        """Everything this rank updates; `load_scalars` makes weights of it."""
        return tuple(piece for share in self._shares() for piece in self._pieces(share))

    def scalars(self) -> Mapping[str, Any]:
        """Adam's step count (steps that were skipped do not count) and the loss scale."""
        steps = {int(state["step"]) for state in self._optimizer.state.values() if "step" in state}
        return {"name": self._config.name, "step": max(steps, default=0), **self._scale.state()}

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave, after `targets` were filled: weights are current from here on."""
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(scalars["step"]))
        self._scale.load(scalars)
        self._engine.optimizer.update_lp_params()


@dataclass(frozen=True, slots=True)
class _Share:
    """The part of a bucket that this rank updates.

    Attributes:
        mapping: DeepSpeed's `tensor_fragment`.
        index: where DeepSpeed keeps the gradient.
        partition: the flat float32 values of this rank in the parameter group.
    """

    bucket: Bucket
    mapping: Any
    index: int
    partition: Tensor

    @property
    def start(self) -> int:
        """First element, in the bucket."""
        return int(self.mapping.lp_fragment_address.start)

    @property
    def span(self) -> slice:
        """The elements, in the partition."""
        address = self.mapping.hp_fragment_address
        return slice(address.start, address.start + address.numel)

    @property
    def master(self) -> Tensor:
        """The float32 values, a view of the partition."""
        return self.partition[self.span]


class _Groups:
    """Process groups by the names under which DeepSpeed asks for them (its `mpu`)."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._data = communicator(mesh.group("dp_cp"))
        self._model = communicator(mesh.group("model"))

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._mesh.group("dp_cp").rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.group("dp_cp").size

    def get_model_parallel_group(self) -> Any:
        return self._model

    def get_model_parallel_rank(self) -> int:
        return self._mesh.group("model").rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.group("model").size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.group("tp").rank


def deepspeed_config(config: OptimConfig) -> dict[str, Any]:
    """The user's DeepSpeed keys, with those that megads owns (`assemble/deepspeed_keys.py`)."""
    precision: dict[str, Any] = {}
    if config.precision == "fp16":
        precision["fp16"] = {"enabled": True, "loss_scale": 1.0}
    elif config.precision == "bf16":
        precision["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if config.zero_stage == 2:  # with stage 1 DeepSpeed would take another optimizer
            precision["data_types"] = {"grad_accum_dtype": "fp32"}
    keys: dict[str, Any] = dict(config.deepspeed)
    zero = {
        **keys.pop("zero_optimization", {}),
        "stage": config.zero_stage,
        "reduce_bucket_size": config.bucket_elements,
        "compute_grad_norm": False,
    }
    return {
        "communication_data_type": "fp32",  # as the native engine; the user's key goes before it
        **keys,
        **precision,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": 1,  # counts samples for messages that are not shown
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # default 1.0
        "gradient_allreduce_op": "sum",
    }


def _load_deepspeed(device: torch.device) -> ModuleType:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "optim.engine=deepspeed needs the package deepspeed",
            found=error,
            do='pip install -e ".[deepspeed]", or optim.engine=native',
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor", category=FutureWarning)
    if device.type == "cpu":
        # a kernel for inference, which DeepSpeed would compile here for half a minute, and fail without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


def _initialize(
    twins: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, config: OptimConfig
) -> Any:
    """DeepSpeed's engine around the twins; `optimizer` updates its partitions from here on."""
    deepspeed = _load_deepspeed(mesh.device)
    if not {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys():
        os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)  # which device DeepSpeed takes
    groups = _Groups(mesh)
    try:
        with contextlib.redirect_stdout(None):
            engine, *_ = deepspeed.initialize(
                model=twins,
                optimizer=optimizer,
                config=deepspeed_config(config),
                mpu=groups,
                dist_init_required=False,
            )
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            "DeepSpeed refuses its configuration", found=error, do="change optim.deepspeed or optim.precision"
        ) from error
    return engine
