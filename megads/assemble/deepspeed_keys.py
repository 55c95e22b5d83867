"""Keys of DeepSpeed's configuration that `optim.deepspeed` may not hold: megads' own key, or why not.

They are set by the engine (`optim/deepspeed_zero.py`), or would change what it has switched off or relies on. All other
keys are the user's (`communication_data_type`, `zero_optimization.overlap_comm`, `comms_logger`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_ONE_COUNT = "the loss is divided once, by the global count of tokens"
_NO_OFFLOAD = "optimizer state stays where the update runs"

OWNED: Mapping[str, str] = MappingProxyType(
    {
        "train_batch_size": "batch.global",
        "train_micro_batch_size_per_gpu": "batch.micro",
        "gradient_accumulation_steps": "batch.global and batch.micro",
        "managed_gradient_accumulation": "megads accumulates gradients",
        "gradient_clipping": "optim.clip",
        "gradient_allreduce_op": _ONE_COUNT,
        "gradient_predivide_factor": _ONE_COUNT,
        "prescale_gradients": _ONE_COUNT,
        "optimizer": "optim.name, optim.betas, optim.eps, optim.weight_decay",
        "scheduler": "optim.lr, optim.min_lr, optim.warmup_steps, optim.decay",
        "fp16": "optim.precision",
        "bf16": "optim.precision",
        "amp": "optim.precision",
        "torch_autocast": "optim.precision",
        "data_types": "optim.precision",
        "zero_allow_untested_optimizer": "optim.name",
        "zero_optimization.stage": "optim.zero_stage",
        "zero_optimization.reduce_bucket_size": "optim.bucket_elements",
        "zero_optimization.compute_grad_norm": "megads computes the norm that it clips by",
        "zero_optimization.round_robin_gradients": "checkpoints need parameters in their order",
        "zero_optimization.offload_optimizer": _NO_OFFLOAD,
        "zero_optimization.cpu_offload": _NO_OFFLOAD,
        "zero_optimization.zenflow": _NO_OFFLOAD,
        "activation_checkpointing": "parallel.recompute",
        "pipeline": "parallel.pipeline and parallel.schedule",
        "tensor_parallel": "parallel.tensor",
        "sequence_parallel_size": "parallel.sequence",
        "expert_parallel": "megads lays out the ranks",
        "elasticity": "a checkpoint loads under any number of ranks",
        "checkpoint": "checkpoint.*",
        "compile": "DeepSpeed does not see the model",
        "compression_training": "DeepSpeed does not see the model",
        "flops_profiler": "DeepSpeed does not see the model; metrics.jsonl has model_tflops",
        "autotuning": "megads fixes the batch and the ZeRO stage",
        "data_efficiency": "data.*",
        "curriculum_learning": "data.*",
    }
)


def owned_keys(keys: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of a DeepSpeed configuration that are in `OWNED`, with dots between levels."""
    found = []
    for key, value in keys.items():
        name = prefix + key
        if name in OWNED:
            found.append(name)
        elif isinstance(value, Mapping):
            found += owned_keys(value, f"{name}.")
    return found
