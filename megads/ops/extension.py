"""The only loader of compiled code beside torch's own: megads' library `_csrc.so` and NVIDIA Apex.

Nothing is loaded when megads is imported, only when an op first asks. What was found is told once; a library that is
there but cannot be used is a warning with the reason, never silence.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = Path(__file__).with_name("_csrc.so")

_log = logging.getLogger("megads.ops")


def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


def _rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


# what each operator of csrc/bindings.cpp returns, without its values: for torch.compile and fake tensors
FAKES = (("rms_norm_forward", _rms_norm_forward), ("rms_norm_backward", _rms_norm_backward))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_csrc() -> bool:
    """Whether megads' compiled operators `torch.ops.megads.*` can be called; loads them at the first call."""
    return load(LIBRARY)


@functools.cache
def load(path: Path) -> bool:
    """Load a library of megads' operators, once; whether they can be called."""
    if not path.is_file():
        _log.info(
            "megads' CUDA kernels were not built (python setup.py build_ext --inplace); torch's own run"
        )
        return False
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        for name, fake in FAKES:
            getattr(torch.ops.megads, name)
            torch.library.register_fake(f"megads::{name}", fake)
    except (OSError, RuntimeError, AttributeError) as error:  # another torch, another platform, an old build
        _log.warning(
            "megads' CUDA kernels are built but cannot be used; torch's own run: %s: %s", path, error
        )
        return False
    _log.info("megads' CUDA kernels: %s", path)
    return True


@dataclass(frozen=True, slots=True)
class Apex:
    """Apex's norms: rms_norm(x, weight, shape, eps), layer_norm(x, weight, bias, shape, eps)."""

    rms_norm: Callable[..., Tensor]
    layer_norm: Callable[..., Tensor]


@functools.cache
def apex_norms() -> Apex:
    """NVIDIA Apex's norms.

    Raises:
        ImportError, AttributeError, RuntimeError: they are not built, or are of another version or device.
    """
    from apex.normalization.fused_layer_norm import (
        fused_layer_norm_affine,
        fused_rms_norm_affine,
    )

    return Apex(fused_rms_norm_affine, fused_layer_norm_affine)


@functools.cache
def has_apex() -> bool:
    """Whether `apex_norms` can be called, and agree with torch on this GPU.

    The compiled module decides: a package named `apex` may be an unrelated one, or NVIDIA's without its kernels.
    """
    if find_spec("fused_layer_norm_cuda") is None:
        return False
    try:
        norms = apex_norms()
        x, weight = torch.randn(2, 3, 64, device="cuda").unbind()
        scale, shape = weight[0], (64,)
        torch.testing.assert_close(norms.rms_norm(x, scale, shape, 1e-5), F.rms_norm(x, shape, scale, 1e-5))
        torch.testing.assert_close(
            norms.layer_norm(x, scale, scale, shape, 1e-5), F.layer_norm(x, shape, scale, scale, 1e-5)
        )
    except (ImportError, AttributeError, RuntimeError, AssertionError) as error:
        _log.warning("NVIDIA Apex is installed but its norms cannot be used: %s", error)
        return False
    return True
