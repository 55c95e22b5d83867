"""LayerNorm and RMSNorm over the last dim.

    csrc        megads' own kernels (RMSNorm on CUDA): rows read once, deterministic weight gradient
    aten        torch's
    apex        NVIDIA's; behind aten, which is no slower: runs only when forced
    reference   defines the op: fp32 arithmetic (fp64 for fp64), rounded once

Both norms are bound by memory: forward reads x and writes y (2 tensors), backward reads x, dy and writes dx (3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megads.ops import extension
from megads.ops.registry import Implementation, Op

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HIDDEN = 16384  # of the kernels in csrc


def _always(*_: object, **__: object) -> bool:
    return True


def _rms_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)


def _rms_aten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _layer_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * scale * weight + bias).to(x.dtype)


def _layer_aten(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class _CompiledRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, rstd = torch.ops.megads.rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = torch.ops.megads.rms_norm_backward(gradients[0].contiguous(), x, weight, rstd)
        return dx, dweight, None


def _rms_csrc(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _CompiledRmsNorm.apply(x, weight, eps)  # type: ignore[no-any-return,no-untyped-call]


def _is_for_kernels(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and x.dtype in KERNEL_DTYPES and weight.dtype == x.dtype


def _csrc_accepts(x: Tensor, weight: Tensor, eps: float) -> bool:
    return _is_for_kernels(x, weight) and x.shape[-1] <= MAX_HIDDEN and extension.has_csrc()


def _rms_apex(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return extension.apex_norms().rms_norm(x, weight, weight.shape, eps)


def _layer_apex(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return extension.apex_norms().layer_norm(x, weight, bias, weight.shape, eps)


def _apex_accepts(x: Tensor, weight: Tensor, *_: object) -> bool:
    return _is_for_kernels(x, weight) and extension.has_apex()


RMS_NORM = Op(
    "rms_norm",
    (
        Implementation("csrc", _rms_csrc, _csrc_accepts),
        Implementation("aten", _rms_aten, _always),
        Implementation("apex", _rms_apex, _apex_accepts),
        Implementation("reference", _rms_reference, _always),
    ),
)
LAYER_NORM = Op(
    "layer_norm",
    (
        Implementation("aten", _layer_aten, _always),
        Implementation("apex", _layer_apex, _apex_accepts),
        Implementation("reference", _layer_reference, _always),
    ),
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
