"""Keys of DeepSpeed's configuration that `optim.deepspeed` may not hold: megads' own key, or why not.

They are set by the engine (`optim/deepspeed_zero.py`), or would change what it has switched off or relies on. All other
keys are the user's (`communication_data_type`, `zero_optimization.overlap_comm`, `comms_logger`, ...).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_ONE_COUNT = "the loss is divided once, by the global count of tokens"
_OFFLOAD = "zero_optimization.offload_optimizer or offload_param"
_GATHER = "megads gathers weights block by block"
_UNSEEN = "DeepSpeed does not see the model"
_EXACT = "a layout changes nothing but speed and memory"

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
        "zero_force_ds_cpu_optimizer": "torch's fused kernels update on the host too",
        "zero_optimization.stage": "optim.zero_stage",
        "zero_optimization.reduce_bucket_size": "optim.bucket_elements",
        "zero_optimization.compute_grad_norm": "megads computes the norm that it clips by",
        "zero_optimization.round_robin_gradients": "checkpoints need parameters in their order",
        "zero_optimization.cpu_offload": _OFFLOAD,
        "zero_optimization.cpu_offload_param": _OFFLOAD,
        "zero_optimization.cpu_offload_use_pin_memory": _OFFLOAD,
        "zero_optimization.zenflow": _OFFLOAD,
        "zero_optimization.stage3_param_persistence_threshold": _GATHER,
        "zero_optimization.stage3_model_persistence_threshold": _GATHER,
        "zero_optimization.stage3_prefetch_bucket_size": _GATHER,
        "zero_optimization.stage3_max_live_parameters": _GATHER,
        "zero_optimization.stage3_max_reuse_distance": _GATHER,
        "zero_optimization.stage3_module_granularity_threshold": _GATHER,
        "zero_optimization.stage3_use_all_reduce_for_fetch_params": _GATHER,
        "zero_optimization.stage3_gather_16bit_weights_on_model_save": "tools/convert_checkpoint.py --to hf",
        "zero_optimization.allgather_sequential": _GATHER,
        "zero_optimization.leaf_module": _GATHER,
        "zero_optimization.zero_hpz_partition_size": _GATHER,
        "zero_optimization.mics_shard_size": _GATHER,
        "zero_optimization.mics_hierarchical_params_gather": _GATHER,
        "zero_optimization.zero_quantized_weights": _EXACT,
        "zero_optimization.zero_quantized_nontrainable_weights": _EXACT,
        "zero_optimization.zero_quantized_gradients": _EXACT,
        "activation_checkpointing": "parallel.recompute",
        "pipeline": "parallel.pipeline and parallel.schedule",
        "tensor_parallel": "parallel.tensor",
        "sequence_parallel_size": "parallel.sequence",
        "expert_parallel": "megads lays out the ranks",
        "elasticity": "a checkpoint loads under any number of ranks",
        "checkpoint": "checkpoint.*",
        "compile": _UNSEEN,
        "compression_training": _UNSEEN,
        "eigenvalue": _UNSEEN,
        "progressive_layer_drop": _UNSEEN,
        "hybrid_engine": _UNSEEN,
        "sparse_attention": _UNSEEN,
        "flops_profiler": f"{_UNSEEN}; metrics.jsonl has model_tflops",
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
