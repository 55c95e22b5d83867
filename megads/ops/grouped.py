"""Matrix products in groups: consecutive rows, each run of them with a matrix of its own (one a group).

    rows      a a a | b | c c c c       counts 3, 1, 4
    weights   A       B   C             y = a A^T | b B^T | c C^T

Floor: 2 rows x in x out flops, and every weight read once. Groups may be empty. `grouped_mm` is torch's one kernel for
all groups, which takes the counts from the device; the loop is the definition and asks for them on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.ops.product import add_product_
from megads.ops.registry import Implementation, Op

_ALIGNMENT = 16  # bytes, of rows and starts


def _splits(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, counts.tolist())


def _linear_loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = _splits(x, counts)
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, weight, strict=True)])


def _linear_grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=counts.cumsum(0, dtype=torch.int32))


def _add_loop(total: Tensor, dy: Tensor, x: Tensor, counts: Tensor) -> None:
    for matrix, dy_part, x_part in zip(total, _splits(dy, counts), _splits(x, counts), strict=True):
        add_product_(matrix, dy=dy_part, x=x_part)


def _add_grouped(total: Tensor, dy: Tensor, x: Tensor, counts: Tensor) -> None:
    total.add_(F.grouped_mm(dy.T, x, offs=counts.cumsum(0, dtype=torch.int32)))


def _has_kernel(x: Tensor) -> bool:
    """Whether torch has a grouped product for this dtype on this device."""
    if x.is_cuda:
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return x.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _is_aligned(*tensors: Tensor) -> bool:
    return all(
        t.data_ptr() % _ALIGNMENT == 0
        and t.is_contiguous()
        and t.shape[-1] * t.element_size() % _ALIGNMENT == 0
        for t in tensors
    )


def _accepts_linear(x: Tensor, weight: Tensor, counts: Tensor) -> bool:
    matrix = weight if weight.is_contiguous() else weight.mT
    return _has_kernel(x) and x.shape[0] > 0 and _is_aligned(x, matrix)


def _accepts_add(total: Tensor, dy: Tensor, x: Tensor, counts: Tensor) -> bool:
    return _has_kernel(x) and x.shape[0] > 0 and _is_aligned(dy, x)


def _accepts_all(*args: Tensor) -> bool:
    return True


# two products of one op: what `force` says of "grouped" goes for both
LINEAR = Op(
    "grouped",
    (
        Implementation("grouped_mm", _linear_grouped, _accepts_linear),
        Implementation("loop", _linear_loop, _accepts_all),
    ),
)
ADD_PRODUCT = Op(
    "grouped",
    (
        Implementation("grouped_mm", _add_grouped, _accepts_add),
        Implementation("loop", _add_loop, _accepts_all),
    ),
)


def grouped_linear(x: Tensor, weight: Tensor, *, counts: Tensor) -> Tensor:
    """x_g W_g^T for every group g (no gradient; `layers/experts.py` has it).

    Args:
        x: [rows, in], the rows of group 0 first.
        weight: [groups, out, in], or a transposed view of a contiguous [groups, in, out].
        counts: [groups] int64, rows of each group; their sum is `rows`.

    Returns:
        [rows, out].
    """
    y: Tensor = LINEAR(x, weight, counts)
    return y


def add_grouped_product_(total: Tensor, *, dy: Tensor, x: Tensor, counts: Tensor) -> None:
    """total_g += dy_g^T x_g for every group g: [groups, out, in], from [rows, out] and [rows, in].

    `grouped_mm` rounds the products of a call to the dtype of its factors before they are added.
    """
    ADD_PRODUCT(total, dy, x, counts)
