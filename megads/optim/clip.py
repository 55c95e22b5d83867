"""The global gradient norm and the factor that clips it, on the device: no value visits the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Group


def global_norm(
    counted: Iterable[Tensor], copies: Iterable[Tensor], *, group: Group, device: torch.device
) -> Tensor:
    """Euclidean norm over all elements on all ranks of `group`, in float64.

    Args:
        counted: what this rank contributes; every element of the model must be contributed by one rank alone.
        copies: gradients that another rank contributes. They do not count, but one that is not finite makes the norm
            so: a rank must not update its copy with it.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for gradient in counted:
        total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    for gradient in copies:
        total += 0.0 * torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return all_reduce_(total, group).sqrt()


def clip_factor(norm: Tensor, limit: float | None) -> Tensor:
    """min(1, limit / norm): what all gradients are multiplied by. 1 without a limit."""
    if limit is None:
        return torch.ones_like(norm)
    return (limit / norm.clamp_min(limit)).to(norm.dtype)
