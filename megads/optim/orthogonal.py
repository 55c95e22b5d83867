"""The nearest orthogonal matrix, as Newton-Schulz iterations give it: products alone, no decomposition.

    X <- G / |G|          then, each step,          X <- a X + (b + c X X^T) X X^T X

Every singular value s goes to a s + b s^3 + c s^5, and all of them towards 1 (Jordan et al. 2024). The quintic
coefficients rise steeply at 0 and leave values of 0.7 to 1.1; DeepSeek-V4's two last steps bring them to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
EPS = 1e-7

LAST: Mapping[str, tuple[tuple[float, float, float], ...]] = MappingProxyType(
    {"quintic": (), "deepseek_v4": ((2.0, -1.5, 0.5),) * 2}
)
"""What follows the quintic steps, by the name of the coefficients."""


def orthogonalised(stack: Tensor, *, steps: int, coefficients: str) -> Tensor:
    """Each matrix of [n, a, b] with its singular values brought towards 1, in the dtype of `stack`.

    Args:
        steps: quintic ones.
        coefficients: a name of `LAST`.
    """
    x = stack.mT if stack.shape[1] > stack.shape[2] else stack  # the smaller Gram matrix
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norms.clamp(min=EPS)
    for a, b, c in ((QUINTIC,) * steps) + LAST[coefficients]:
        gram = x @ x.mT  # [n, a, a]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if stack.shape[1] > stack.shape[2] else x


def products_cost(rows: int, columns: int) -> int:
    """Multiply-adds of one step for one matrix."""
    small, large = sorted((rows, columns))
    return 2 * small * small * large + small**3
