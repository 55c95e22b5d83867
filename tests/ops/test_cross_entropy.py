"""Cross entropy in local parts: put together over the ranks of a cut vocabulary it is torch's, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megads.ops import cross_entropy
from megads.ops.cross_entropy import Columns, local_gradient, local_maximum, local_sums
from tests.ops.cases import BOUNDS

VOCAB, TOKENS = 11, 7
# (first, count, columns of the tensor): ranks with padding, and one without any real column
CUTS = (
    ((0, 11, 11),),
    ((0, 4, 4), (4, 4, 4), (8, 3, 4)),
    ((0, 6, 6), (6, 5, 6), (11, 0, 6)),
)


@pytest.mark.parametrize("cut", CUTS, ids=len)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parts_make_the_whole(cut: tuple[tuple[int, int, int], ...], dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    logits = (8 * torch.randn(TOKENS, VOCAB, dtype=torch.float64)).to(dtype)
    labels, scale = torch.randint(0, VOCAB, (TOKENS,)), torch.rand(TOKENS, dtype=torch.float64)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    (wanted,) = torch.autograd.grad(expected, exact, scale)

    columns = [Columns(first, count) for first, count, _ in cut]
    locals_ = []
    for first, count, width in cut:
        local = torch.full((TOKENS, width), 1e4, dtype=dtype)  # padding that would be seen
        local[:, :count] = logits[:, first : first + count]
        locals_.append(local)
    maximum = torch.stack([local_maximum(x, c) for x, c in zip(locals_, columns, strict=True)]).amax(0)
    parts = [local_sums(x, labels, maximum=maximum, columns=c) for x, c in zip(locals_, columns, strict=True)]
    lse = maximum + sum(p.exponentials for p in parts).log()
    losses = lse - sum(p.target for p in parts)
    bound = min(BOUNDS[dtype], BOUNDS[torch.float32])  # logits of bf16 are added up in fp32
    assert (losses.double() - expected).norm() <= bound * expected.norm()

    for (first, count, _), x, c in zip(cut, locals_, columns, strict=True):
        gradient = local_gradient(x, labels, lse=lse, scale=scale.to(lse.dtype), columns=c)
        assert gradient.dtype == dtype
        assert not gradient[:, count:].any()
        error = (gradient[:, :count].double() - wanted[:, first : first + count]).norm()
        assert error <= BOUNDS[dtype] * wanted.norm()


def test_a_few_rows_at_a_time_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into slices of two rows the parts have the same bits."""
    torch.manual_seed(6)
    logits, columns = torch.randn(TOKENS, VOCAB).bfloat16(), Columns(0, VOCAB)
    labels, scale = torch.randint(0, VOCAB, (TOKENS,)), torch.rand(TOKENS)

    def parts() -> tuple[torch.Tensor, ...]:
        maximum = local_maximum(logits, columns)
        sums = local_sums(logits, labels, maximum=maximum, columns=columns)
        lse = maximum + sums.exponentials.log()
        gradient = local_gradient(logits, labels, lse=lse, scale=scale, columns=columns)
        return maximum, sums.exponentials, sums.target, gradient

    whole = parts()
    monkeypatch.setattr(cross_entropy, "MAX_WIDE", 2 * VOCAB)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts(), strict=True))
