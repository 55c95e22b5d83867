"""Weights in FP8 with a scale for every block of 128 x 128, as DeepSeek-V3 is published (its report, section 3.3).

    NAME             [out, in] float8_e4m3fn                          w = value x scale of its block
    NAME_scale_inv   [ceil(out / 128), ceil(in / 128)] fp32

               128   128   44                        blocks at the edges are as large as what is left
         128 | s00 | s01 | s02
          72 | s10 | s11 | s12

A scale is the largest magnitude in the block / 448, or the next power of two above (`ue8m0`, DeepSeek-V3.1). So weights
that were read and not changed since are written as the numbers that were read, bit for bit but where a power of two has
another one that does as well. Which tensors of a model are stored so is said by its family; files are read and written
in `hf.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.errors import CheckpointError
from megads.parallel.shard import Shape

BLOCK = 128
LARGEST = 448.0  # of float8_e4m3fn
LEAST = 1e-4  # what the largest magnitude of a block counts as if it is smaller, so that no scale is 0
SCALE_SUFFIX = "_scale_inv"

ScaleKind = Literal["float", "ue8m0"]


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix as it is stored: float8_e4m3fn [out, in], and the scales of its blocks in fp32."""

    values: Tensor
    scales: Tensor


def quantisation(kind: ScaleKind) -> dict[str, Any]:
    """What config.json says of it, under `quantization_config`."""
    facts = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    named = {"scale_fmt": kind} if kind == "ue8m0" else {}
    return {**facts, **named, "weight_block_size": [BLOCK, BLOCK]}


def scale_shape(shape: Shape) -> Shape:
    """Of the scales of a matrix of this shape."""
    return tuple(-(-size // BLOCK) for size in shape)


def rounded(weight: Tensor, *, kind: ScaleKind) -> Tensor:
    """What a matrix is worth once it is stored, in fp32."""
    return dequantise(quantise(weight, kind=kind))


def dequantise(stored: Quantised) -> Tensor:
    """The matrix [out, in] in fp32.

    Raises:
        CheckpointError: scales that are not one a block.
    """
    values, scales = stored.values, stored.scales
    wanted = scale_shape(tuple(values.shape))
    if values.dim() != 2 or tuple(scales.shape) != wanted:
        raise CheckpointError(
            "FP8 weights and their scales do not fit",
            found=f"weights {tuple(values.shape)}, scales {tuple(scales.shape)}",
            allowed=f"a matrix, and one scale for each {BLOCK} x {BLOCK} of it",
        )
    weight = values.float()
    for rows, scale in zip(torch.split(weight, BLOCK), scales.float(), strict=True):
        rows *= scale.repeat_interleave(BLOCK)[: weight.shape[1]]
    return weight


def quantise(weight: Tensor, *, kind: ScaleKind) -> Quantised:
    """A matrix [out, in] as it is stored.

    Raises:
        CheckpointError: weights that are not finite.
    """
    scales = torch.empty(scale_shape(tuple(weight.shape)))
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for number, rows in enumerate(torch.split(weight, BLOCK)):
        rows = rows.float()
        filled = F.pad(rows, (0, -rows.shape[1] % BLOCK)).view(len(rows), -1, BLOCK)
        scale = filled.abs().amax((0, 2)).clamp(min=LEAST) / LARGEST  # [blocks]
        if kind == "ue8m0":
            scale = scale.log2().ceil().exp2()
        scaled = (filled / scale[:, None]).clamp(-LARGEST, LARGEST).flatten(1)[:, : rows.shape[1]]
        values[number * BLOCK : number * BLOCK + len(rows)] = scaled.to(values.dtype)
        scales[number] = scale
    if not bool(scales.isfinite().all()):
        raise CheckpointError("weights that are not finite cannot be stored in FP8")
    return Quantised(values, scales)
