"""LayerNorm and RMSNorm over the last dim: reference and aten's fused path.

Both are bound by memory: forward reads x and writes y (2 tensors), backward reads x, dy and writes dx (3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.ops.registry import Implementation, Op


def _always(*_: object, **__: object) -> bool:
    return True


def _rms_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def _rms_aten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _layer_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * scale).to(x.dtype) * weight + bias


def _layer_aten(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


RMS_NORM = Op(
    "rms_norm",
    (Implementation("aten", _rms_aten, _always), Implementation("reference", _rms_reference, _always)),
)
LAYER_NORM = Op(
    "layer_norm",
    (Implementation("aten", _layer_aten, _always), Implementation("reference", _layer_reference, _always)),
)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019, eq. 4).

    Args:
        x: [..., hidden].
        weight: [hidden].
        eps: under the square root.
    """
    return RMS_NORM(x, weight, eps)  # type: ignore[no-any-return]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim (Ba et al. 2016).

    Args:
        x: [..., hidden].
        weight, bias: [hidden].
        eps: under the square root.
    """
    return LAYER_NORM(x, weight, bias, eps)  # type: ignore[no-any-return]
