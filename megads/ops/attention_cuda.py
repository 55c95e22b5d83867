"""Attention on NVIDIA GPUs: torch's kernels, called as aten ops so that the choice is ours and is told.

    cudnn         dense, bf16 and fp16, Hopper and later: about twice flash; its backward is not deterministic
    flash_varlen  packed documents on the diagonal, bf16 and fp16
    flash         bf16 and fp16: where cudnn is not, or torch.use_deterministic_algorithms is on; documents one by one
    efficient     fp32 (without TF32), head sizes that flash refuses; documents one by one

Each is a pair forward(q, k, v, call) -> (out, lse) and backward(q, k, v, call, out, lse, dout) -> (dq, dk, dv), all
[batch, heads, seq, dim] of any strides with the last dim contiguous, lse [batch, heads, seq] fp32. out and lse of the
backward may be those of more keys than the call has (ring attention). Fewer key/value heads than query heads need no
copy, but in `efficient`. cudnn also takes q, k of 192 with v of 128; for flash such values are filled up with zeros.
cudnn plans each new shape for 0.1 s, so it never gets the odd ones of documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.ops.attention_call import Call, collapse, expand
from megads.ops.attention_dense import (
    Gradients,
    Kernel,
    dense_implementation,
    fill_values,
    with_even_values,
)
from megads.ops.registry import Implementation

HALF = (torch.bfloat16, torch.float16)
MIN_CUDNN = 91500  # before 9.15 torch itself prefers flash
LSE_MULTIPLE = 32  # efficient's backward wants the lse padded to it


def _cudnn_accepts(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether cuDNN runs this call and is allowed to."""
    dims = (q.shape[-1], v.shape[-1])
    return (
        _is_on_gpu(q, call, dtypes=HALF)
        and call.is_dense
        and (dims == (192, 128) or (max(dims) <= 128 and not any(dim % 8 for dim in dims)))
        and min(q.shape[2], k.shape[2]) > 1
        and torch.cuda.get_device_capability(q.device)[0] >= 9
        and (torch.backends.cudnn.version() or 0) >= MIN_CUDNN  # type: ignore[no-untyped-call]
        and not torch.are_deterministic_algorithms_enabled()
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )[:2]
    return out, lse.view(q.shape[:3])


def _cudnn_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, is_causal: bool, scale: float
) -> Gradients:
    zero = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of no dropout
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_like(dout, out), q, k, v, out, lse.contiguous().unsqueeze(-1), zero, zero, None, None, None),
        *(q.shape[2], k.shape[2], 0.0, is_causal),
        scale=scale,
    )
    return dq, dk, dv


def _flash_varlen_accepts(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether this is a call with packed documents that flash runs."""
    return _is_on_gpu(q, call, dtypes=HALF) and call.is_causal and not call.is_dense and _fits_flash(q, v)


def _flash_varlen_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document by flash attention over sequences of unequal length."""
    bounds = _device_bounds(call, q.device)
    batch, heads, seq, dim = q.shape
    values = _tokens(fill_values(v, dim))
    out, lse = torch.ops.aten._flash_attention_forward(
        *(_tokens(q), _tokens(k), values, bounds, bounds, call.longest, call.longest, 0.0, True, False),
        scale=call.scale,
    )[:2]
    return _rows(out, batch)[..., : v.shape[-1]], lse.view(heads, batch, seq).transpose(0, 1).contiguous()


def _flash_varlen_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, dout: Tensor
) -> Gradients:
    """Its gradients."""
    bounds = _device_bounds(call, q.device)
    values, made, flow = (fill_values(x, q.shape[-1]) for x in (v, out, dout))
    gradients = torch.ops.aten._flash_attention_backward(
        *(_tokens(flow), _tokens(q), _tokens(k), _tokens(values), _tokens(made)),
        *(lse.transpose(0, 1).flatten(1).contiguous(), bounds, bounds, call.longest, call.longest, 0.0, True),
        *_no_random(q),
        scale=call.scale,
    )
    dq, dk, dv = (_rows(gradient, q.shape[0]) for gradient in gradients)
    return dq, dk, dv[..., : v.shape[-1]]


def _flash_accepts(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether flash attention runs this call."""
    return _is_on_gpu(q, call, dtypes=HALF) and _fits_flash(q, v)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, False, scale=scale
    )[:2]
    return out, lse


def _flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, is_causal: bool, scale: float
) -> Gradients:
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(_like(dout, out), q, k, v, out, lse.contiguous(), None, None),
        *(q.shape[2], k.shape[2], 0.0, is_causal),
        *_no_random(q),
        scale=scale,
    )
    return dq, dk, dv


def _efficient_accepts(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether memory-efficient attention runs this call."""
    multiple = 4 if q.dtype == torch.float32 else 8
    fits = q.shape[-1] % multiple == 0 and v.shape[-1] % multiple == 0
    return _is_on_gpu(q, call, dtypes=(torch.float32, *HALF)) and fits


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    heads = q.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, expand(k, heads), expand(v, heads), None, True, 0.0, is_causal, scale=scale
    )[:2]
    return out, lse.narrow(-1, 0, q.shape[2])  # padded to LSE_MULTIPLE


def _efficient_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, is_causal: bool, scale: float
) -> Gradients:
    """`out` and `dout` must lie in memory as [batch, seq, heads, dim], or dq and dk are wrong in silence."""
    heads, kv_heads = q.shape[1], k.shape[1]
    zero = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of no dropout
    padded = F.pad(lse, (0, -q.shape[2] % LSE_MULTIPLE), value=float("inf"))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        *(_seq_first(dout), q, expand(k, heads), expand(v, heads), None, _seq_first(out)),
        *(padded.contiguous(), zero, zero, 0.0, [True, True, True, False], is_causal),
        scale=scale,
    )[:3]
    return dq, collapse(dk, kv_heads), collapse(dv, kv_heads)


def _is_on_gpu(q: Tensor, call: Call, *, dtypes: tuple[torch.dtype, ...]) -> bool:
    return q.is_cuda and q.dtype in dtypes and call.dropout is None


def _fits_flash(q: Tensor, v: Tensor) -> bool:
    return v.shape[-1] <= q.shape[-1] <= 256 and q.shape[-1] % 8 == 0


def _device_bounds(call: Call, device: torch.device) -> Tensor:
    return torch.tensor(call.bounds, dtype=torch.int32).to(device, non_blocking=True)


def _no_random(q: Tensor) -> tuple[Tensor, Tensor]:
    """State of the random numbers of no dropout, as flash wants it."""
    return (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.zeros((), dtype=torch.uint64, device=q.device),
    )


def _like(x: Tensor, model: Tensor) -> Tensor:
    """`x` in the memory order of `model`."""
    return x if x.stride() == model.stride() else torch.empty_like(model).copy_(x)


def _seq_first(x: Tensor) -> Tensor:
    """[batch, heads, seq, dim] in memory as [batch, seq, heads, dim]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """[batch, heads, seq, dim] -> [batch x seq, heads, dim]."""
    return x.transpose(1, 2).flatten(0, 1)


def _rows(x: Tensor, batch: int) -> Tensor:
    """[batch x seq, heads, dim] -> [batch, heads, seq, dim]."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


IMPLEMENTATIONS = (
    dense_implementation("cudnn", Kernel(_cudnn_forward, _cudnn_backward), accepts=_cudnn_accepts),
    Implementation("flash_varlen", _flash_varlen_forward, _flash_varlen_accepts, _flash_varlen_backward),
    dense_implementation(
        "flash", with_even_values(Kernel(_flash_forward, _flash_backward)), accepts=_flash_accepts
    ),
    dense_implementation(
        "efficient", Kernel(_efficient_forward, _efficient_backward), accepts=_efficient_accepts
    ),
)
