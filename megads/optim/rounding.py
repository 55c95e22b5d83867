"""Rounding float32 to bfloat16 at random, so that the mean over many roundings is the value itself.

    float32   | sign exponent 7 bits of mantissa | 16 bits |  + 16 random bits, then the low half is cut off

The random bits are a hash of the value's own bits and of a salt that changes from step to step: no generator, no state,
and the same on every device and under every layout that has the same value. A value that bfloat16 has stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The finalizer "lowbias32" (Wellons 2018, "Prospecting for hash functions"), as signed 32-bit integers, which wrap
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
GOLDEN = 0x9E3779B9 - 2**32
LOW = 0xFFFF


def round_at_random_(out: Tensor, values: Tensor, *, salt: Tensor) -> None:
    """Fill `out`, bfloat16, with finite float32 `values` rounded to one of their two neighbours.

    Args:
        salt: int32 scalar on the device; another one gives other random bits.
    """
    bits = values.view(torch.int32)
    noise = bits + salt * GOLDEN
    for shift, multiplier in zip((16, 15), MULTIPLIERS, strict=True):
        noise.bitwise_xor_((noise >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(multiplier)
    noise.bitwise_xor_(noise >> 16).bitwise_and_(LOW)
    out.copy_(noise.add_(bits).bitwise_and_(~LOW).view(torch.float32))
