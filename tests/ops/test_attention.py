"""Attention beyond parity with float64: documents, dropout, the choice, and the GPU calls' shapes."""

from __future__ import annotations

import pytest
import torch

from megads.ops import attention_cuda
from megads.ops.attention import ATTENTION, AttentionResult, Merge, attention
from megads.ops.attention_call import Call, Columns, Dropout, whole
from megads.ops.registry import force

torch.manual_seed(3)
IDS = torch.tensor([[1, 1, 2, 2, 2, 9], [4, 4, 4, 4, 4, 4]])


def draw(
    heads: int = 4, kv_heads: int = 2, seq: int = 6, dtype: torch.dtype = torch.float64
) -> list[torch.Tensor]:
    return [torch.randn(2, h, seq, 8, dtype=dtype, requires_grad=True) for h in (heads, kv_heads, kv_heads)]


def causal(ids: torch.Tensor | None = None, dropout: Dropout | None = None) -> Call:
    return Call(0.3, whole(6), whole(6), ids, dropout)


CUTS: tuple[tuple[Columns, Columns], ...] = (
    (whole(12), whole(12)),
    ((range(2, 4), range(8, 10)), (range(2, 4), range(8, 10))),  # a zig-zag rank's own columns
    ((range(2, 4), range(8, 10)), (range(2),)),
    ((range(8, 10),), (range(2), range(4, 8))),
    ((range(6, 7),), (range(5, 6),)),
)


@pytest.mark.parametrize(("queries", "keys"), CUTS)
def test_rectangles_are_what_documents_leave_to_see(queries: Columns, keys: Columns) -> None:
    """Against the definition over whole rows: same document, no later key."""
    for seed in range(20):
        draw_from = torch.Generator().manual_seed(seed)
        begins = torch.rand(3, 12, generator=draw_from) < (0.0, 0.1, 0.3, 0.9)[seed % 4]
        ids = begins.cumsum(1)
        call = Call(1.0, queries, keys, ids)
        rows, columns = (torch.cat([torch.arange(p.start, p.stop) for p in part]) for part in (queries, keys))
        wanted = (ids[:, rows, None] == ids[:, None, columns]) & (columns <= rows[:, None])
        assert torch.equal(call.visible(torch.device("cpu"))[:, 0], wanted)
        found = torch.zeros_like(wanted)
        for part in call.rectangles:
            block = found[part.rows, part.queries, part.keys]
            assert not block.any()
            block += torch.ones_like(block).tril() if call.is_causal else True
        assert torch.equal(found, wanted)
        assert call.is_dense == torch.equal(wanted, (columns <= rows[:, None]).expand_as(wanted))
        assert call.is_empty == (not wanted.any())


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(whole(4), whole(6)), ((range(4, 8),), (range(2, 5),)), ((range(4),), (range(4, 8),))],
)
def test_a_block_is_causal_or_full(queries: Columns, keys: Columns) -> None:
    with pytest.raises(ValueError, match="neither causal nor full"):
        Call(1.0, queries, keys)


@pytest.mark.parametrize("name", ["flash_cpu", "plain"])
def test_a_query_without_keys_is_nothing(name: str) -> None:
    """No kernel says -inf by itself; anything else would count in a merge."""
    q, k, v = (x.detach() for x in draw())
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [1] * 4])
    call = Call(0.3, (range(6, 12),), (range(6),), ids)
    found = next(i for i in ATTENTION.implementations if i.name == name)
    assert found.backward is not None
    out, lse = found.run(q, k, v, call)
    assert lse.isneginf().tolist() == [[[False] * 6] * 4, [[False] * 2 + [True] * 4] * 4]
    assert not out[1, :, 2:].any()
    dq, dk, dv = found.backward(q, k, v, call, out, lse, torch.ones_like(out))
    assert all(bool(gradient.isfinite().all()) for gradient in (dq, dk, dv))
    assert not dq[1, :, 2:].any()
    assert not dv[0, :, :5].any()


def test_merged_blocks_are_one_softmax_whatever_their_scale() -> None:
    """Scores of 1e3 overflow exp: only their differences are ever taken to it."""
    q, k, v = (x.detach() for x in draw())
    later = (range(12, 18),)
    parts = [(k, v), (k.flip(2) * 3, v * 2), (k * 0, v + 1)]
    merge, call = Merge(q, v), Call(200.0, later, whole(6))
    for keys, values in parts:
        result = AttentionResult(*ATTENTION.pick(q, keys, values, call).run(q, keys, values, call))
        merge.add(slice(None), result)
    together = Call(200.0, (range(18, 24),), whole(18))
    keys, values = (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    out, lse = ATTENTION.pick(q, keys, values, together).run(q, keys, values, together)
    torch.testing.assert_close(merge.result().out, out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(merge.result().lse, lse, rtol=1e-13, atol=0)


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


@pytest.mark.parametrize(
    "ids", [None, torch.tensor([[0] * 7 + [1] * 4, [0] * 11])], ids=["dense", "documents"]
)
@pytest.mark.parametrize(
    ("name", "dtype"), [("cudnn", torch.bfloat16), ("flash", torch.bfloat16), ("efficient", torch.float32)]
)
def test_gpu_blocks_fit_torch(name: str, dtype: torch.dtype, ids: torch.Tensor | None) -> None:
    """Blocks below the diagonal: fewer keys than queries, keys beside values in memory, out and lse of more keys."""
    q, dout, out = (
        torch.empty(6, 2, 4, 16, dtype=dtype, device="meta").permute(1, 2, 0, 3) for _ in range(3)
    )
    pair = torch.empty(5, 2, 2, 32, dtype=dtype, device="meta").permute(1, 2, 0, 3)
    k, v = pair[..., :16], pair[..., 16:]
    call = Call(0.25, (range(5, 11),), (range(5),), ids if name != "cudnn" else None)
    found = next(i for i in attention_cuda.IMPLEMENTATIONS if i.name == name)
    assert found.backward is not None
    block, lse = found.run(q, k, v, call)
    assert (block.shape, lse.shape) == (q.shape, (2, 4, 6))
    gradients = found.backward(q, k, v, call, out, lse, dout)
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


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
