"""DeepSpeed's engine around flat parameters: its configuration, process groups and start. Imports deepspeed, alone.

What megads owns is switched off: the mean over data-parallel ranks (the loss is divided once, by the global token
count), the norm and clipping, the loss scale, and at stage 3 the gathering of parameters. The engine that trains with
it is `deepspeed_engine.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from megads.config.optim import OptimConfig
from megads.errors import ConfigError
from megads.parallel.mesh import Mesh, communicator


class _Groups:
    """Process groups by the names under which DeepSpeed asks for them (its `mpu`).

    What it sums over the "model" group are norms that nobody reads. They are one a parameter group, of which the stages
    of a pipeline may have different numbers; so they stay inside a stage.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._data = communicator(mesh.group("dp_cp"))
        self._tensor = communicator(mesh.group("tp"))

    def get_data_parallel_group(self) -> Any:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._mesh.group("dp_cp").rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.group("dp_cp").size

    def get_model_parallel_group(self) -> Any:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._mesh.group("tp").rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.group("tp").size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.group("tp").rank


def deepspeed_config(config: OptimConfig) -> dict[str, Any]:
    """The user's DeepSpeed keys, with those that megads owns (`assemble/deepspeed_keys.py`)."""
    keys: dict[str, Any] = dict(config.deepspeed)
    return {
        "communication_data_type": "fp32",  # as the native engine; the user's key goes before it
        **keys,
        **_precision(config),
        "zero_optimization": _zero(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused kernels update on the host too, and need no compiler
        "train_micro_batch_size_per_gpu": 1,  # counts samples for messages that are not shown
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # default 1.0
        **({} if config.zero_stage == 3 else {"gradient_allreduce_op": "sum"}),  # 3 knows the mean alone
    }


def _precision(config: OptimConfig) -> dict[str, Any]:
    """Of what DeepSpeed sees: at stage 0 float32 masters, else weights in the dtype that computes."""
    if config.zero_stage == 0 or config.precision == "fp32":
        return {}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}}
    if config.precision == "fp16":
        return {"fp16": {"enabled": True, "loss_scale": 1.0}, **(sums if config.zero_stage == 3 else {})}
    own: dict[str, Any] = {"bf16": {"enabled": True, "check_grad_overflow": False}}
    return {
        **own,
        **(sums if config.zero_stage > 1 else {}),
    }  # at 1 DeepSpeed would take another optimizer for them


def _zero(config: OptimConfig) -> dict[str, Any]:
    keys: dict[str, Any] = dict(config.deepspeed.get("zero_optimization", {}))  # type: ignore[arg-type]
    owned: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": config.bucket_elements}
    if config.zero_stage == 3:
        owned["stage3_param_persistence_threshold"] = 0  # megads gathers
    elif config.zero_stage and not offloads_optimizer(config):  # which cannot do without the norm
        owned["compute_grad_norm"] = False
    return {**keys, **owned}


def offloads_optimizer(config: OptimConfig) -> bool:
    """Whether masters and moments lie in the host's memory."""
    zero: Any = config.deepspeed.get("zero_optimization", {})
    return bool((zero.get("offload_optimizer") or {}).get("device", "none") != "none")


def load_deepspeed(device: torch.device) -> ModuleType:
    """The package, told what to run on.

    Raises:
        ConfigError: it is not installed.
    """
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
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor", category=FutureWarning)
    if device.type == "cpu":
        # a kernel for inference, which DeepSpeed would compile here for half a minute, and fail without a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


def initialize(
    twins: torch.nn.Module, optimizer: torch.optim.Optimizer, *, mesh: Mesh, config: OptimConfig
) -> Any:
    """DeepSpeed's engine around flat parameters; `optimizer` updates what it makes of them from here on.

    All ranks call it together.

    Raises:
        ConfigError: deepspeed is not installed, or refuses a key.
    """
    deepspeed = load_deepspeed(mesh.device)
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
