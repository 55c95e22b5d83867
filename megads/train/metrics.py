"""What a step cost: tokens per second, model TFLOP/s, share of the peak (MFU), memory. How busy experts were.

MFU = flops of the model for the tokens of a step / seconds / ranks / peak of a rank. Model flops count forward and
backward of the weights' products and causal attention, and nothing that is computed twice
(`DecoderSpec.flops_per_token`).
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from megads.assemble.step import StepResult
from megads.model.spec import DecoderSpec

# dense bf16 peaks of the vendors' data sheets, by a part of the device's name
CPU_SECONDS = 0.3  # for which the matrix product is timed
GPU_PEAK_TFLOPS = (("H200", 989.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0), ("RTX 4090", 165.0))


def peak_tflops(device: torch.device, *, dtype: torch.dtype) -> float | None:
    """Peak TFLOP/s of one rank: a known GPU's data sheet, or a matrix product timed on this CPU; None if unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for part, peak in GPU_PEAK_TFLOPS if part in name), None)
    size = 512
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    best = float("inf")
    begin = time.perf_counter()
    while time.perf_counter() - begin < CPU_SECONDS:  # the best of many: other ranks share the cores
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def peak_memory(device: torch.device) -> int:
    """Most bytes this rank has held: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def expert_metrics(result: StepResult, spec: DecoderSpec) -> dict[str, float]:
    """Losses of the routers, means over tokens and layers, and how the load of each layer with experts was shared.

    `layers.N/load_max` and `load_min` are the tokens of the busiest and the idlest expert in units of the mean;
    `layers.N/dropped`, with a capacity, is the share of the choices that found no room. Waits for the step.
    """
    found = {name: value.item() for name, value in result.extras.items()}
    if spec.moe is None:
        return found
    for layer, row in zip(spec.expert_layers, result.report.tallies.tolist(), strict=True):
        *loads, dropped = row
        mean = sum(loads) / len(loads)
        found[f"layers.{layer}/load_max"] = max(loads) / mean
        found[f"layers.{layer}/load_min"] = min(loads) / mean
        if spec.moe.capacity is not None:
            found[f"layers.{layer}/dropped"] = dropped / sum(loads)
    return found
