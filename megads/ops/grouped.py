"""Matrix products in groups: consecutive rows, each run of them with a matrix of its own (one a group).

    rows      a a a | b | c c c c       counts 3, 1, 4
    weights   A       B   C             y = a A^T | b B^T | c C^T

Floor: 2 rows x in x out flops, and every weight read once. Groups may be empty. `grouped_mm` is torch's one kernel for
all groups, which takes the counts from the device; the loop is the definition and asks for them on the host.

Both products of a backward are of the same kind, so an `Implementation` of the op has them:

    run(x, weight, counts) -> y           run(dy, weight.mT, counts) -> dx
    backward(total, dy, x, counts)        total_g += dy_g^T x_g for every group g

with x [rows, in], weight [groups, out, in], counts [groups] int64 whose sum is `rows`, y [rows, out], and `total` of
weight's shape in its own dtype. `grouped_mm` rounds what one call adds to the dtype of the factors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.ops.product import add_product_
from megads.ops.registry import Implementation, Op

_ALIGNMENT = 16  # bytes, of rows and starts


def _linear_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = torch.split(x, counts.tolist())
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


def _add_loop(total: Tensor, dy: Tensor, x: Tensor, counts: Tensor) -> None:
    sizes = counts.tolist()
    for matrix, *factors in zip(total, torch.split(dy, sizes), torch.split(x, sizes), strict=True):
        add_product_(matrix, dy=factors[0], x=factors[1])


def _linear_kernel(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))


def _add_kernel(total: Tensor, dy: Tensor, x: Tensor, counts: Tensor) -> None:
    total.add_(F.grouped_mm(dy.T, x, offs=counts.cumsum(0, dtype=torch.int32)))


def _accepts_kernel(x: Tensor, weight: Tensor, counts: Tensor) -> bool:
    """Whether torch has the kernel for this dtype on this device, and rows of all three products start aligned."""
    if x.is_cuda:
        has_kernel = x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0)
    else:
        has_kernel = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    is_aligned = all(width * x.element_size() % _ALIGNMENT == 0 for width in weight.shape[1:])
    is_plain = all(t.is_contiguous() and t.data_ptr() % _ALIGNMENT == 0 for t in (x, weight))
    return has_kernel and is_aligned and is_plain and x.shape[0] > 0


def _accepts_all(*args: Tensor) -> bool:
    return True


GROUPED = Op(
    "grouped",
    (
        Implementation("grouped_mm", _linear_kernel, _accepts_kernel, _add_kernel),
        Implementation("loop", _linear_loop, _accepts_all, _add_loop),
    ),
)
