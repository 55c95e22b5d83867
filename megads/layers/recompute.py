"""Recompute: keep a function's input and run it again in the backward, instead of keeping what it made.

Dropout masks are functions of indices and collectives are issued in program order on every rank, so a second run makes
the same values; no generator state is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "full"] | tuple[Literal["attention", "mlp"], ...]
"""Nothing, whole layers, or named parts of each layer, with the norm before them."""


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), of which only the arguments are kept for the backward."""
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
