"""Every implementation of every op against float64 on a GPU, and what only a GPU shows.

Run by hand where there is one: `python -m pytest -m gpu tests/gpu`.
"""

from __future__ import annotations

import pytest
import torch

from megads.ops import extension
from megads.ops.attention import ATTENTION, attention
from megads.ops.attention_call import Call, whole
from megads.ops.norm import RMS_NORM, rms_norm
from megads.ops.registry import force
from tests.ops.cases import COMPARISONS, Shape, Subject, check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("subject", "name", "dtype", "shape"), COMPARISONS)
def test_like_float64(subject: Subject, name: str, dtype: torch.dtype, shape: Shape) -> None:
    torch.manual_seed(1)
    check(subject, name, dtype=dtype, device="cuda", shape=shape)


def test_csrc_is_built_and_chosen() -> None:
    assert extension.has_csrc()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, weight = (torch.ones(*s, 8, device="cuda", dtype=dtype) for s in ((2,), ()))
        assert RMS_NORM.pick(x, weight, 1e-5).name == "csrc"
    assert RMS_NORM.pick(x.double(), weight.double(), 1e-5).name == "aten"
    assert RMS_NORM.pick(x.bfloat16(), weight, 1e-5).name == "aten"  # a weight of another dtype


def _rms_gradients(x: torch.Tensor, weight: torch.Tensor, flow: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(rms_norm(x, weight, eps=1e-5), (x, weight), flow)


@pytest.mark.parametrize("hidden", [1024, 8192, 1023])
def test_csrc_gives_the_same_bits_each_time(hidden: int) -> None:
    x, flow = (torch.randn(4097, hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x.requires_grad_()
    with force("rms_norm", "csrc"):
        first = _rms_gradients(x, weight, flow)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, _rms_gradients(x, weight, flow), strict=True))


def test_csrc_in_a_cuda_graph_and_on_another_stream() -> None:
    x, flow = (torch.randn(333, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    x.requires_grad_()
    with force("rms_norm", "csrc"):
        expected = _rms_gradients(x, weight, flow)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _rms_gradients(x, weight, flow)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _rms_gradients(x, weight, flow)
        for gradient in captured:
            gradient.fill_(float("nan"))
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, captured, strict=True))


def test_csrc_under_torch_compile() -> None:
    x = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(512, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, eps=1e-5) * 2

    with force("rms_norm", "csrc"):
        got, expected = torch.compile(norm, fullgraph=True)(x, weight), norm(x, weight)
        flow = torch.randn_like(got)
        for a, b in zip(
            torch.autograd.grad(got, (x, weight), flow),
            torch.autograd.grad(expected, (x, weight), flow),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(got, expected)


def test_csrc_refuses_what_it_cannot_do() -> None:
    assert extension.has_csrc()
    x, weight = torch.ones(2, 8, device="cuda"), torch.ones(8, device="cuda")
    for bad in ((x, weight[:4]), (x.double(), weight.double()), (x, weight.half()), (x.T, weight[:2])):
        with pytest.raises(RuntimeError, match="rms_norm"):
            torch.ops.megads.rms_norm_forward(*bad, 1e-5)


def test_the_choice_of_attention() -> None:
    def pick(dtype: torch.dtype, ids: torch.Tensor | None = None, dim: int = 64) -> str:
        q = torch.zeros(2, 2, 16, dim, device="cuda", dtype=dtype)
        return ATTENTION.pick(q, q, q, Call(0.1, whole(16), whole(16), ids)).name

    def pick_below(dtype: torch.dtype, ids: torch.Tensor | None = None) -> str:
        q = torch.zeros(2, 2, 8, 64, device="cuda", dtype=dtype)
        return ATTENTION.pick(q, q, q, Call(0.1, (range(8, 16),), (range(8),), ids)).name

    packed = torch.arange(16, device="cuda").expand(2, 16) // 5
    is_hopper = torch.cuda.get_device_capability()[0] >= 9
    assert pick(torch.bfloat16) == ("cudnn" if is_hopper else "flash")
    assert pick(torch.bfloat16, torch.zeros_like(packed)) == ("cudnn" if is_hopper else "flash")
    assert pick(torch.bfloat16, packed) == "flash_varlen"
    assert pick_below(torch.bfloat16) == ("cudnn" if is_hopper else "flash")
    assert pick_below(torch.bfloat16, packed) == "flash"  # the shapes of rectangles are new each time
    assert pick_below(torch.float32) == pick_below(torch.float32, packed) == "efficient"
    assert pick(torch.float32) == pick(torch.float32, packed) == "efficient"
    assert pick(torch.float64) == "plain"
    torch.use_deterministic_algorithms(True)
    try:
        assert pick(torch.bfloat16) == "flash"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_deterministic_attention_gives_the_same_bits(dtype: torch.dtype) -> None:
    q, k, v, flow = (
        torch.randn(2, 8, 1024, 64, device="cuda", dtype=dtype, requires_grad=True) for _ in range(4)
    )
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            torch.autograd.grad(attention(q, k, v, scale=0.125).out, (q, k, v), flow.detach())
            for _ in range(4)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
