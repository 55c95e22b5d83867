"""Every op against float64: what is compared, at which shapes, how closely. Used on the CPU and on GPUs alike.

A subject is an op with inputs to draw and a definition to compare with; each implementation in its table runs the same
inputs, forward and backward, rounded to the dtype under test first, so that only the implementation's own rounding is
seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megads.errors import ConfigError
from megads.layers.context import Row
from megads.ops.activation import gelu, swiglu
from megads.ops.attention import ATTENTION, attention
from megads.ops.grouped import GROUPED
from megads.ops.norm import LAYER_NORM, RMS_NORM, layer_norm, rms_norm
from megads.ops.registry import Op, force
from megads.ops.rope import RopeSpec, rotary, rotary_angles
from tests.ops.ring import attend_gathered, attend_in_ring

# error norm over reference norm; torch adds some 16-bit weight gradients up in 16 bits, our kernels add in fp32
BOUNDS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
SHARP = {"csrc": 0.25, "reference": 0.25}
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison and how its inputs lie in memory."""

    sizes: tuple[int, ...]
    is_offset: bool = False  # starts one element past an aligned address
    scale: float = 1.0
    documents: tuple[tuple[int, ...], ...] = ()  # lengths, a row of the batch each


@dataclass(frozen=True)
class Subject:
    """An op under test: `run` and `define` take the inputs that `draw` makes and return tensors."""

    name: str
    op: Op | None
    shapes: tuple[Shape, ...]
    large: tuple[Shape, ...]  # on GPUs only
    draw: Callable[[Shape], tuple[Tensor, ...]]
    run: Callable[..., tuple[Tensor, ...]]
    define: Callable[..., tuple[Tensor, ...]]

    @property
    def implementations(self) -> tuple[str, ...]:
        return tuple(i.name for i in self.op.implementations) if self.op else ("torch",)


def place(x: Tensor, shape: Shape, *, dtype: torch.dtype, device: str) -> Tensor:
    """A leaf with x's values in `dtype`, and x's strides, in memory laid out as `shape` says; ids as they are."""
    if not x.is_floating_point():
        return x.to(device)
    leaf = torch.empty(x.numel() + 1, dtype=dtype, device=device)[int(shape.is_offset) :][: x.numel()]
    leaf = leaf.as_strided(x.shape, x.stride())
    return leaf.copy_(x).requires_grad_()


def check(subject: Subject, implementation: str, *, dtype: torch.dtype, device: str, shape: Shape) -> None:
    """Compare outputs and gradients; skips what the implementation says it does not do."""
    drawn = subject.draw(shape)
    inputs = tuple(place(x, shape, dtype=dtype, device=device) for x in drawn)
    exact = tuple(x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs)
    with force(subject.op.name, implementation) if subject.op else nullcontext():
        try:
            outputs = subject.run(*inputs)
        except ConfigError as error:
            pytest.skip(str(error))
        expected = subject.define(*exact)
        flow = torch.randn(expected[0].shape, dtype=torch.float64).to(device, dtype)
        leaves = [x for x in inputs if x.requires_grad]
        gradients = torch.autograd.grad(outputs[0], leaves, flow)
    wanted = torch.autograd.grad(expected[0], [x for x in exact if x.requires_grad], flow.double())
    assert outputs[0].dtype == dtype
    for kind, got, reference in (
        *((f"output {n}", *pair) for n, pair in enumerate(zip(outputs, expected, strict=True))),
        *((f"gradient {n}", *pair) for n, pair in enumerate(zip(gradients, wanted, strict=True))),
    ):
        assert got.shape == reference.shape, kind
        error = (got.detach().double() - reference).norm()
        unit = max(reference.norm().item(), 0.1 * reference.numel() ** 0.5)
        assert error <= BOUNDS[dtype] * SHARP.get(implementation, 1.0) * unit, (
            f"{shape}: {kind} off by {error / unit:.2e}"
        )


def _draw_norm(shape: Shape, *, has_bias: bool) -> tuple[Tensor, ...]:
    x = torch.randn(shape.sizes, dtype=torch.float64)
    x = (x + 0.3 * x.sign()) * shape.scale  # no row near zero: there 1 / rms amplifies any rounding
    vectors = torch.randn(1 + has_bias, shape.sizes[-1], dtype=torch.float64).unbind()
    return (x, *vectors)


def _define_rms(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (x / (x * x).mean(-1, keepdim=True).add(EPS).sqrt() * weight,)


def _define_layer(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    return (centred / (centred**2).mean(-1, keepdim=True).add(EPS).sqrt() * weight + bias,)


NORM_SHAPES = (
    Shape((1, 1)), Shape((3, 5, 7)), Shape((0, 64)), Shape((1, 64)), Shape((9, 136)), Shape((130, 8), is_offset=True),
    Shape((2, 3, 1024)), Shape((5, 1025)), Shape((4, 96), scale=300.0), Shape((3, 4096), is_offset=True),
    Shape((2, 16384)), Shape((1, 16383)),
)  # fmt: skip
# one for each plan of csrc/include/rows.cuh, more rows than blocks fit the device, and rows that do not fill a block
NORM_LARGE = (
    Shape((2501, 256)), Shape((2501, 1024)), Shape((1203, 2048)), Shape((1203, 1536)), Shape((1001, 4096)),
    Shape((601, 5120)), Shape((601, 8192)), Shape((301, 12288)), Shape((301, 16384)), Shape((1003, 333)),
    Shape((1003, 2049)), Shape((301, 8191)), Shape((301, 12289)), Shape((1003, 512), is_offset=True),
)  # fmt: skip


def _draw_attention(shape: Shape) -> tuple[Tensor, ...]:
    batch, heads, kv_heads, seq, dim, v_dim = shape.sizes
    # as the layers hand them over: [seq, batch, heads x dim] in memory
    q, k, v = (
        torch.randn(seq, batch, h, d, dtype=torch.float64).permute(1, 2, 0, 3)
        for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, v_dim))
    )
    if not shape.documents:
        return q, k, v
    rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in shape.documents]
    return q, k, v, torch.stack(rows)


def _run_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    result = attention(q, k, v, scale=q.shape[-1] ** -0.5, documents=ids)
    assert result.lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    return result.out, result.lse


def _define_attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    group, seq = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    hidden = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    if ids is not None:
        hidden = hidden | (ids[:, None, :, None] != ids[:, None, None, :])
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


ATTENTION_SHAPES = (
    Shape((1, 1, 1, 1, 8, 8)), Shape((2, 4, 2, 33, 16, 16)), Shape((1, 6, 1, 70, 32, 32)),
    Shape((3, 2, 2, 17, 24, 24)), Shape((1, 2, 2, 40, 48, 32)), Shape((1, 2, 1, 19, 5, 5)),
    Shape((2, 4, 2, 37, 16, 16), documents=((5, 1, 31), (37,))), Shape((1, 2, 2, 64, 8, 8), documents=((1,) * 64,)),
    Shape((2, 2, 1, 20, 16, 16), documents=((20,), (20,))), Shape((2, 4, 2, 37, 24, 16), documents=((5, 1, 31), (37,))),
    Shape((1, 2, 2, 20, 16, 24)),
)  # fmt: skip
ATTENTION_LARGE = (
    Shape((2, 8, 2, 512, 128, 128)), Shape((1, 4, 4, 777, 64, 64)), Shape((1, 4, 4, 300, 192, 128)),
    Shape((2, 8, 2, 600, 128, 128), documents=((100, 1, 499), (333, 267))),
    Shape((2, 4, 4, 600, 192, 128), documents=((100, 1, 499), (333, 267))),
)  # fmt: skip


def _run_ring(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
    return attend_in_ring(q, k, v, Row(RANKS, q.shape[2], q.shape[-1] ** -0.5, ids))


def _run_gathered(q: Tensor, k: Tensor, v: Tensor, ids: Tensor | None = None) -> tuple[Tensor, ...]:
    return attend_gathered(q, k, v, Row(RANKS, q.shape[2], q.shape[-1] ** -0.5, ids))


RANKS = 4
# documents that end inside chunks of 8, at their edges, and that span all ranks
RING_SHAPES = (
    Shape((2, 4, 2, 64, 16, 16)), Shape((1, 6, 1, 8, 8, 8)), Shape((1, 2, 2, 40, 48, 32)),
    Shape((3, 4, 2, 64, 16, 16), documents=((7, 1, 20, 36), (64,), (8, 16, 9, 31))),
    Shape((2, 2, 1, 64, 8, 8), documents=((1, 62, 1), (32, 32))),
)  # fmt: skip
RING_LARGE = (
    Shape((1, 8, 2, 2048, 128, 128)), Shape((2, 4, 4, 1024, 64, 64)), Shape((1, 4, 4, 512, 192, 128)),
    Shape((2, 4, 2, 1024, 128, 128), documents=((100, 1, 700, 223), (512, 512))),
)  # fmt: skip


def _draw_rotary(shape: Shape) -> tuple[Tensor, ...]:
    batch, heads, seq, dim = shape.sizes
    x = torch.randn(seq, batch, heads, dim, dtype=torch.float64).permute(1, 2, 0, 3)
    return x, torch.randint(0, 5000, (batch, seq))


def _run_rotary(x: Tensor, positions: Tensor) -> tuple[Tensor]:
    rope = RopeSpec(1e4)
    return (rotary(x, rotary_angles(positions, rope, dim=x.shape[-1]), rope=rope),)


def _define_rotary(x: Tensor, positions: Tensor) -> tuple[Tensor]:
    half = x.shape[-1] // 2
    rates = 1e4 ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    turn = torch.exp(1j * (positions[:, None, :, None] * rates))
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return (torch.cat((turned.real, turned.imag), -1),)


def _draw_wide(shape: Shape) -> tuple[Tensor]:
    return (3 * torch.randn(shape.sizes, dtype=torch.float64),)


def _define_gelu(x: Tensor) -> tuple[Tensor]:
    return (0.5 * x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()),)


def _define_swiglu(x: Tensor) -> tuple[Tensor]:
    gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return (gate / (1 + (-gate).exp()) * up,)


class _Grouped(torch.autograd.Function):
    """The op's two products as the one differentiable function that layers make of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, counts)
        ctx.way = GROUPED.pick(x, weight, counts)
        return ctx.way.run(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, counts = ctx.saved_tensors
        total = torch.zeros_like(weight)
        ctx.way.backward(total, dy, x, counts)
        return ctx.way.run(dy, weight.mT, counts), total, None


def _draw_grouped(shape: Shape) -> tuple[Tensor, ...]:
    width, out, *counts = shape.sizes
    x = torch.randn(sum(counts), width, dtype=torch.float64)
    return x, torch.randn(len(counts), out, width, dtype=torch.float64) / width**0.5, torch.tensor(counts)


def _define_grouped(x: Tensor, weight: Tensor, counts: Tensor) -> tuple[Tensor]:
    groups = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts)
    return (torch.einsum("ri,roi->ro", x, weight[groups]),)


GROUPED_SHAPES = (
    Shape((8, 16, 3, 0, 5)), Shape((16, 8, 1)), Shape((64, 48, 0, 0, 7, 1)), Shape((32, 32, 0, 0)),
    Shape((5, 3, 2, 2)), Shape((16, 16, 4, 9), is_offset=True),
)  # fmt: skip
GROUPED_LARGE = (
    Shape((256, 512, 100, 0, 333, 1, 78)),
    Shape((2048, 1408, *(37 * n % 211 for n in range(16)))),
)


def _one(function: Callable[..., Tensor], **options: Any) -> Callable[..., tuple[Tensor]]:
    return lambda *inputs: (function(*inputs, **options),)


_WIDE = (Shape((2, 3, 14)), Shape((5, 512)))
SUBJECTS = (
    Subject("rms_norm", RMS_NORM, NORM_SHAPES, NORM_LARGE,
            lambda shape: _draw_norm(shape, has_bias=False), _one(rms_norm, eps=EPS), _define_rms),
    Subject("layer_norm", LAYER_NORM, NORM_SHAPES[1:], NORM_LARGE,
            lambda shape: _draw_norm(shape, has_bias=True), _one(layer_norm, eps=EPS), _define_layer),
    Subject("attention", ATTENTION, ATTENTION_SHAPES, ATTENTION_LARGE,
            _draw_attention, _run_attention, _define_attention),
    Subject("ring", ATTENTION, RING_SHAPES, RING_LARGE, _draw_attention, _run_ring, _define_attention),
    Subject("ring of the chosen", None, RING_SHAPES, RING_LARGE, _draw_attention, _run_ring, _define_attention),
    Subject("gathered", ATTENTION, RING_SHAPES, RING_LARGE, _draw_attention, _run_gathered, _define_attention),
    Subject("rotary", None, (Shape((2, 3, 5, 8)), Shape((1, 1, 9, 2))), (Shape((2, 4, 300, 128)),),
            _draw_rotary, _run_rotary, _define_rotary),
    Subject("grouped", GROUPED, GROUPED_SHAPES, GROUPED_LARGE,
            _draw_grouped, lambda *inputs: (_Grouped.apply(*inputs),), _define_grouped),
    Subject("gelu", None, _WIDE, (), _draw_wide, _one(gelu), _define_gelu),
    Subject("swiglu", None, _WIDE, (), _draw_wide, _one(swiglu), _define_swiglu),
)  # fmt: skip

PAIRS = tuple((subject, name) for subject in SUBJECTS for name in subject.implementations)
COMPARISONS = tuple(
    pytest.param(subject, name, dtype, shape, id=f"{subject.name}-{name}-{str(dtype)[6:]}-{number}")
    for subject, name in PAIRS
    for dtype in BOUNDS
    for number, shape in enumerate((*subject.shapes, *subject.large))
)
