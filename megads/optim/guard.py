"""Which steps are not taken: a loss or a gradient norm that is not finite, or far above those of the last steps.

    window    the losses and norms of the last steps that were taken, on the device
    bound     mean + sigma x standard deviation of each      (as OLMo 2's skipped steps, section 3)
    step      loss -> `expect`     norm -> `admits`: a bool on the device, which gates the optimizer's kernel

The host waits for nothing: it reads a step's verdict when the next one is under way. Every rank has the same losses and
norms and so the same window. What follows from a verdict is decided in `train/verdict.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megads.config.guard import GuardConfig


class SpikeGuard:
    """Attributes:
    bounds: [loss, norm] that the last step had to stay within, float64 on the device; infinite while too few are known.
    """

    def __init__(self, config: GuardConfig, device: torch.device) -> None:
        self._config = config
        self._window = torch.zeros(
            config.window, 2, dtype=torch.float64, device=device
        )  # row t % window: [loss, norm]
        self._num_taken = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(config.window, device=device)
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self.bounds = torch.full((2,), torch.inf, dtype=torch.float64, device=device)

    def expect(self, loss: Tensor) -> None:
        """The loss of the step that `admits` is asked about next: float64 scalar, the same on every rank."""
        self._loss = loss

    def admits(self, norm: Tensor) -> Tensor:
        """Whether the step with this gradient norm is taken: bool scalar on the device. If so it enters the window."""
        now = torch.stack((self._loss, norm.to(torch.float64)))
        is_known = (self._places < self._num_taken)[:, None]
        count = is_known.sum().clamp_min(2)
        mean = self._window.sum(dim=0) / count  # rows that are not known are 0
        variance = torch.where(is_known, self._window - mean, 0.0).square().sum(dim=0) / (count - 1)
        bounds = mean + self._config.sigma * variance.sqrt()
        has_enough = 2 * self._num_taken >= self._config.window
        self.bounds = torch.where(has_enough, bounds, torch.inf)
        is_sound = (now.isfinite() & (now <= self.bounds)).all()
        is_place = (self._places == self._num_taken % self._config.window)[:, None]
        self._window = torch.where(is_place & is_sound, now, self._window)
        self._num_taken = self._num_taken + is_sound
        return is_sound

    def state(self) -> Mapping[str, Any]:
        """JSON values; waits for the device."""
        num_taken = int(self._num_taken.item())
        return {"taken": num_taken, "window": self._window[: min(num_taken, self._config.window)].tolist()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave, of a window of any size: its last steps."""
        rows, num_taken = state["window"], int(state["taken"])
        size = self._config.window
        if num_taken > len(rows) and len(rows) != size:  # a ring of another size: oldest first
            first = num_taken % len(rows)
            rows = [*rows[first:], *rows[:first]]
        if len(rows) != size:
            rows = rows[-size:]
            num_taken = len(rows)
        self._window.zero_()
        if rows:
            self._window[: len(rows)] = self._window.new_tensor(rows)
        self._num_taken.fill_(num_taken)
