"""The product that makes a weight's gradient, added to a buffer that may be wider than its factors.

Floor: 2 tokens x out x in flops; the buffer is read and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product_(total: Tensor, *, dy: Tensor, x: Tensor) -> Tensor:
    """total += dy^T x, in the dtype of `total`; returns it. Low-precision factors so accumulate in float32.

    Args:
        total: [out, in].
        dy: [..., out].
        x: [..., in].
    """
    dy, x = dy.flatten(0, -2), x.flatten(0, -2)
    if total.dtype == x.dtype:
        return total.addmm_(dy.T, x)
    if x.device.type == "cuda":
        return total.add_(torch.mm(dy.T, x, out_dtype=total.dtype))
    return total.addmm_(dy.T.to(total.dtype), x.to(total.dtype))  # the CPU has no product with a wider result
