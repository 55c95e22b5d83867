"""Every implementation of every op against float64 on the CPU; those of GPUs are compared in tests/gpu."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megads.ops.norm import rms_norm
from tests.ops.cases import EPS, NORM_SHAPES, PAIRS, SUBJECTS, Subject, check

torch.set_num_threads(1)
CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("subject", "name"), PAIRS, ids=[f"{subject.name}-{name}" for subject, name in PAIRS]
)
def test_like_float64(subject: Subject, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    num_run = 0
    for shape in subject.shapes:
        try:
            check(subject, name, dtype=dtype, device="cpu", shape=shape)
            num_run += 1
        except pytest.skip.Exception:
            continue
    if num_run == 0:
        pytest.skip(f"{subject.name}: {name} takes nothing of {dtype} on the CPU")


@pytest.mark.parametrize(
    "broken",
    [
        lambda x, weight: (rms_norm(x, weight, eps=3 * EPS),),
        lambda x, weight: (rms_norm(x, weight.detach(), eps=EPS) + 0 * weight,),
        lambda x, weight: (rms_norm(x, weight, eps=EPS).detach() + 0 * x + 0 * weight,),
    ],
    ids=["another eps", "no weight gradient", "no gradient"],
)
def test_a_broken_op_is_seen(broken) -> None:
    torch.manual_seed(1)
    subject = replace(SUBJECTS[0], run=broken)
    with pytest.raises(AssertionError, match="off by"):
        check(subject, "reference", dtype=torch.float32, device="cpu", shape=NORM_SHAPES[3])
