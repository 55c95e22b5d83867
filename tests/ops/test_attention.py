"""Attention beyond parity with float64: documents, dropout, the choice, and the GPU calls' shapes."""

from __future__ import annotations

import pytest
import torch

from megads.ops import attention_cuda
from megads.ops.attention import ATTENTION, attention
from megads.ops.attention_call import Call, Dropout, whole
from megads.ops.registry import force

torch.manual_seed(3)
IDS = torch.tensor([[1, 1, 2, 2, 2, 9], [4, 4, 4, 4, 4, 4]])


def draw(
    heads: int = 4, kv_heads: int = 2, seq: int = 6, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    return [torch.randn(2, h, seq, 8, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def causal(ids: torch.Tensor | None = None, dropout: Dropout | None = None) -> Call:
    return Call(0.3, whole(6), whole(6), ids, dropout)


def test_documents_have_bounds() -> None:
    call = causal(IDS)
    assert call.bounds == (0, 2, 5, 6, 12)
    assert call.longest == 6
    assert not call.is_dense
    assert causal(IDS[1:].expand(3, 6)).is_dense  # the same id in two rows: two documents


@pytest.mark.parametrize("name", ["flash_cpu", "plain"])
def test_a_document_is_as_if_it_stood_alone(name: str) -> None:
    q, k, v = draw()
    with force("attention", name):
        whole = attention(q, k, v, scale=0.3, documents=IDS)
        for row, start, stop in ((0, 0, 2), (0, 2, 5), (0, 5, 6), (1, 0, 6)):
            parts = (x[row : row + 1, :, start:stop] for x in (q, k, v))
            alone = attention(*parts, scale=0.3)
            torch.testing.assert_close(whole.out[row : row + 1, :, start:stop], alone.out, rtol=0, atol=1e-14)
            torch.testing.assert_close(whole.lse[row : row + 1, :, start:stop], alone.lse, rtol=0, atol=1e-14)


def test_the_future_is_not_seen() -> None:
    q, k, v = draw()
    out = attention(q, k, v, scale=0.3, documents=IDS).out
    (gradient,) = torch.autograd.grad(out[0, :, 3].sum(), v)  # position 3, in the document of 2..4
    assert gradient[0].abs().sum((0, 2)).ne(0).tolist() == [False, False, True, True, False, False]
    assert not gradient[1].any()


def test_dropout_selects_plain_and_uses_one_mask_both_ways() -> None:
    q, k, v = draw()
    keep = torch.rand(2, 4, 6, 6) < 0.7
    dropout = Dropout(0.3, lambda queries, keys: keep)
    assert ATTENTION.pick(q, k, v, causal(None, dropout)).name == "plain"
    result = attention(q, k, v, scale=0.3, documents=IDS, dropout=dropout)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1) | (IDS[:, None, :, None] != IDS[:, None, None, :])
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(hidden, float("-inf"))
    expected = (scores.softmax(-1) * keep / 0.7) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(result.out, expected)
    torch.testing.assert_close(result.lse, scores.logsumexp(-1))  # without the dropout
    flow = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(result.out, (q, k, v), flow),
        torch.autograd.grad(expected, (q, k, v), flow),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "flash_cpu"), (torch.float16, "plain")])
def test_the_choice_on_a_cpu(dtype: torch.dtype, name: str) -> None:
    q, k, v = draw(dtype=dtype)
    call = causal()
    assert ATTENTION.pick(q, k, v, call).name == name
    assert not any(i.accepts(q, k, v, call) for i in attention_cuda.IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("name", "dtype", "ids"),
    [
        ("cudnn", torch.bfloat16, None),
        ("flash", torch.float16, None),
        ("flash_varlen", torch.bfloat16, IDS),
        ("efficient", torch.float32, None),
        ("efficient", torch.float32, IDS),
    ],
)
def test_gpu_calls_fit_torch_and_give_the_promised_shapes(
    name: str, dtype: torch.dtype, ids: torch.Tensor | None
) -> None:
    """On the meta device: schemas and shapes, of arguments that lie as the layers hand them over."""

    def views(heads: int) -> torch.Tensor:
        return torch.empty(6, 2, heads, 16, dtype=dtype, device="meta").permute(1, 2, 0, 3)

    q, k, v, dout = views(4), views(2), views(2), views(4)
    call = causal(ids)
    found = next(i for i in attention_cuda.IMPLEMENTATIONS if i.name == name)
    assert found.backward is not None
    out, lse = found.run(q, k, v, call)
    assert (out.shape, out.dtype) == (q.shape, dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 6), torch.float32)
    assert [g.shape for g in found.backward(q, k, v, call, out, lse, dout)] == [q.shape, k.shape, v.shape]


def test_backward_is_that_of_the_forward_whatever_is_forced_meanwhile() -> None:
    """Autograd runs a GPU's backward on another thread, where nothing is forced."""
    leaves = [x.requires_grad_() for x in draw(dtype=torch.float64)]
    dropout = Dropout(0.5, lambda queries, keys: torch.ones(2, 4, 6, 6, dtype=torch.bool))
    with force("attention", "plain"):
        out = attention(*leaves, scale=0.3, dropout=dropout).out
    with force("attention", "flash_cpu"):  # would refuse dropout, and ignore it in the backward
        found = torch.autograd.grad(out.sum(), leaves)
    half = torch.autograd.grad(attention(*leaves, scale=0.3).out.sum(), leaves)
    assert all(torch.allclose(a, 2 * b, rtol=1e-12, atol=1e-12) for a, b in zip(found, half, strict=True))
