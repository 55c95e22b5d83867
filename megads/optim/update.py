"""What makes new masters of gradients: one `Update` for each kind of optimizer that an engine holds.

    engine: sum, norm, clip factor, finite  -->  update: masters, moments  -->  engine: weights

The factor (clipping, the loss scale undone) and the gate lie on the device and are read by the kernel that updates, so
gradients are not passed over a second time and the host waits for nothing. Here are AdamW and SGD, torch's fused ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.group import ParameterGroup
from megads.optim.share import Share

MOMENTS: Mapping[str, tuple[str, ...]] = MappingProxyType({"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()})


class Update(Protocol):
    """Updates the masters of some shares, all in one way."""

    @property
    def shares(self) -> tuple[Share, ...]:
        """What it updates."""

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of what is kept for each element beside its master."""

    @property
    def num_steps(self) -> int:
        """Steps that were taken; those that were skipped do not count."""

    def start(self) -> None:
        """Make the moments, so that loading can fill them before the first step."""

    def load_steps(self, num_steps: int) -> None:
        """Go on from this many steps."""

    def step(self, *, lr: float, factor: Tensor, finite: Tensor) -> None:
        """Take one step.

        Args:
            factor: what gradients are multiplied by, float64 scalar on the device.
            finite: bool scalar on the device; False: nothing changes.
        """

    def states(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The moments of one of the masters by name, each flat and as long."""


class FusedUpdate:
    """AdamW (Loshchilov and Hutter 2019) or plain SGD, in torch's kernels over many tensors.

    Args:
        gradients: of each share, flat, in the dtype of its master; they are changed by a step.
        name: "adamw" or "sgd".
    """

    def __init__(
        self, shares: Sequence[Share], gradients: Sequence[Tensor], *, name: str, config: OptimConfig
    ) -> None:
        masters = [share.master for share in shares]
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        self.shares: tuple[Share, ...] = tuple(shares)
        self._gradients = tuple(gradients)
        self._optimizer = make_optimizer(
            masters, [share.bucket.traits.group for share in shares], name=name, config=config
        )
        self.moments: tuple[str, ...] = MOMENTS[name]

    @property
    def num_steps(self) -> int:
        """0 for SGD, which does not count."""
        return max((int(s["step"]) for s in self._optimizer.state.values()), default=0)

    def start(self) -> None:
        """See `Update`."""
        start_moments(self._optimizer)

    def load_steps(self, num_steps: int) -> None:
        """See `Update`."""
        for state in self._optimizer.state.values():
            state["step"].fill_(float(num_steps))

    def step(self, *, lr: float, factor: Tensor, finite: Tensor) -> None:
        """See `Update`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._gradients and self._gradients[0].dtype == torch.float64:
            for gradient in self._gradients:  # the kernels take a factor in float32 alone
                gradient.mul_(factor)
        else:
            self._optimizer.grad_scale = (1.0 / factor).float()  # type: ignore[attr-defined]
        self._optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self._optimizer.step()

    def states(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        """See `Update`."""
        for name in self.moments:
            yield name, self._optimizer.state[master][name]


def make_optimizer(
    parameters: Sequence[Tensor], groups: Sequence[Hashable], *, name: str, config: OptimConfig
) -> torch.optim.Optimizer:
    """torch's fused AdamW or SGD over flat parameters, each updated as its group says.

    A learning rate is to be multiplied by the "lr_scale" of the optimizer's group.
    """
    members: dict[ParameterGroup, list[Tensor]] = {}
    for parameter, group in zip(parameters, groups, strict=True):
        assert isinstance(group, ParameterGroup)  # `stage_buckets` made it
        members.setdefault(group, []).append(parameter)
    made: list[dict[str, Any]] = [
        {"params": found, "lr_scale": g.lr_scale, "weight_decay": g.weight_decay, "eps": g.eps}
        for g, found in members.items()
    ]
    if name == "sgd":
        return torch.optim.SGD(made, lr=config.lr, fused=True)
    return torch.optim.AdamW(made, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


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
