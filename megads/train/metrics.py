"""What a step cost: tokens per second, model TFLOP/s, share of the peak (MFU), memory. How busy experts were.

MFU = flops of the model for the tokens of a step / seconds / ranks / peak of a rank. Model flops count forward and
backward of the weights' products and causal attention, and nothing that is computed twice
(`DecoderSpec.flops_per_token`).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megads.assemble.step import StepResult
from megads.assemble.wiring import Model
from megads.config.root import Config
from megads.data.segment import Segment, segment_at, tokens_by
from megads.model.spec import DecoderSpec
from megads.parallel.mesh import Mesh

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


@dataclass(frozen=True, slots=True)
class Done:
    """A step whose numbers were read: seconds of the clock, loss and gradient norm."""

    step: int
    lr: float
    seconds: float
    loss: float
    norm: float
    result: StepResult


class Meter:
    """Makes the records of one run's steps, as they stand in metrics.jsonl."""

    def __init__(self, config: Config, model: Model, *, mesh: Mesh) -> None:
        self._config = config
        self._spec = model.spec
        self._mesh = mesh
        self._peak = config.profile.peak_tflops or peak_tflops(mesh.device, dtype=model.dtype)

    def record(self, done: Done, history: Sequence[Segment]) -> dict[str, Any]:
        """The metrics of a step."""
        segment = segment_at(history, done.step)
        tokens = segment.batch_size * segment.sequence_length
        flops = self._spec.flops_per_token(segment.sequence_length) * tokens
        tflops = flops / done.seconds / self._mesh.layout.world_size / 1e12  # of one rank
        report = done.result.report
        record = {
            "step": done.step,
            "loss": done.loss,
            "grad_norm": done.norm,
            "lr": done.lr,
            "tokens": tokens_by(history, done.step),
            "seconds": done.seconds,
            "tokens_per_second": tokens / done.seconds,
            "model_tflops": tflops,
            "memory_bytes": peak_memory(self._mesh.device),
            **expert_metrics(done.result, self._spec),
        }
        if self._peak is not None:
            record["mfu"] = tflops / self._peak
        if self._config.optim.precision == "fp16":
            record["loss_scale"] = report.loss_scale.item()
        if self._config.optim.guard is not None:
            record["skipped"] = int(not report.taken.item())
        return record
