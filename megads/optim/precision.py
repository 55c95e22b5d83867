"""Low-precision training: which dtype computes, and fp16's dynamic loss scale.

    precision   weights, activations   gradients, masters, moments
    fp64        float64                float64
    fp32        float32                float32
    bf16        bfloat16               float32
    fp16        float16                float32, loss scaled

The loss scale lives on the device and changes there: a step whose gradients are not finite is skipped by every rank and
stage alike (the norm that decides is global), halves the scale, and good steps in a row double it
(Micikevicius et al. 2018; the rule of `torch.amp.GradScaler`; factors and numbers in `config/loss_scale.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megads.config.optim import OptimConfig

COMPUTE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


def initial_dtype(precision: str) -> torch.dtype:
    """The dtype of masters and gradients, in which weights are drawn."""
    return torch.float64 if precision == "fp64" else torch.float32


class LossScale:
    """The factor on the loss: constant 1, or dynamic for fp16.

    Attributes:
        value: float32 scalar on the device.
    """

    def __init__(self, device: torch.device, config: OptimConfig) -> None:
        self._is_dynamic = config.precision == "fp16"
        self._config = config.loss_scale
        self.value: Tensor = torch.tensor(self._config.initial if self._is_dynamic else 1.0, device=device)
        self._good: Tensor = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, finite: Tensor) -> None:
        """After a step: `finite` says whether it was taken."""
        if not self._is_dynamic:
            return
        good = torch.where(finite, self._good + 1, 0)
        grows = good >= self._config.interval
        scaled = torch.where(grows, self.value * self._config.growth, self.value)
        grown = torch.where(scaled.isfinite(), scaled, self.value)
        self.value = torch.where(finite, grown, self.value * self._config.backoff)
        self._good = torch.where(grows, 0, good).to(torch.int32)

    def state(self) -> Mapping[str, Any]:
        """JSON values."""
        return {"loss_scale": self.value.item(), "good_steps": int(self._good.item())}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; a scale that this precision does not have is left out."""
        if self._is_dynamic and "loss_scale" in state:
            self.value.fill_(float(state["loss_scale"]))
            self._good.fill_(int(state["good_steps"]))
