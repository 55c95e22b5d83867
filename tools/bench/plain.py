"""The peer of a training step: the same decoder written plainly in torch, for torch.compile and torch's fused AdamW.

One process, no parallelism, nothing of megads: what a good user of torch alone would have. bf16 keeps weights and
gradients in bf16 and masters and moments in fp32; fp32 keeps everything in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class PlainShape:
    """Sizes of the model. `is_llama`: RMSNorm, rotary positions, SwiGLU, no biases, untied head; else as GPT-2."""

    is_llama: bool
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    seq: int


@dataclass(frozen=True, slots=True)
class _Rotation:
    """Cosines and sines of the rotary angles, [seq, head size / 2] each."""

    cos: Tensor
    sin: Tensor


def _rotate(x: Tensor, by: _Rotation) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * by.cos - right * by.sin, right * by.cos + left * by.sin), -1)


class _Layer(nn.Module):
    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.shape = shape
        norm = nn.RMSNorm if shape.is_llama else nn.LayerNorm
        has_bias, hidden = not shape.is_llama, shape.hidden
        self.norm1, self.norm2 = norm(hidden, eps=1e-5), norm(hidden, eps=1e-5)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=has_bias)
        self.out = nn.Linear(hidden, hidden, bias=has_bias)
        self.up = nn.Linear(hidden, shape.ffn * (1 + shape.is_llama), bias=has_bias)
        self.down = nn.Linear(shape.ffn, hidden, bias=has_bias)

    def forward(self, x: Tensor, rotation: _Rotation) -> Tensor:
        batch, seq, hidden = x.shape
        heads = self.shape.heads
        q, k, v = (
            part.view(batch, seq, heads, hidden // heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        if self.shape.is_llama:
            q, k = _rotate(q, rotation), _rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, seq, hidden))
        wide = self.up(self.norm2(x))
        if self.shape.is_llama:
            gate, up = wide.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(wide, approximate="tanh"))


class PlainDecoder(nn.Module):
    """tokens, labels [batch, seq] -> mean loss."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: PlainShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.position = None if shape.is_llama else nn.Embedding(shape.seq, shape.hidden)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = (nn.RMSNorm if shape.is_llama else nn.LayerNorm)(shape.hidden, eps=1e-5)
        self.head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        if not shape.is_llama:
            self.head.weight = self.embedding.weight
        half = shape.hidden // shape.heads // 2
        angles = torch.arange(shape.seq)[:, None] * 1e4 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight
        rotation = _Rotation(self.cos, self.sin)
        for layer in self.layers:
            x = layer(x, rotation)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), labels.flatten())


class PlainTrainer:
    """A model, its masters and its optimizer."""

    def __init__(
        self, shape: PlainShape, dtype: torch.dtype, *, device: torch.device, with_compile: bool
    ) -> None:
        torch.manual_seed(0)
        with device:
            model = PlainDecoder(shape).to(dtype)
        self._parameters = list(model.parameters())
        self._masters = self._parameters
        if dtype != torch.float32:
            self._masters = [p.detach().float() for p in self._parameters]
            for master in self._masters:
                master.grad = torch.zeros_like(master)
        groups = [
            {"params": [m for m in self._masters if (m.dim() > 1) is decays], "weight_decay": 0.1 * decays}
            for decays in (True, False)
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self._loss = torch.compile(model) if with_compile else model

    def step(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward, clip, update."""
        loss: Tensor = self._loss(tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        if self._masters is not self._parameters:
            torch._foreach_copy_([m.grad for m in self._masters], [p.grad for p in self._parameters])
        self._optimizer.step()
        if self._masters is not self._parameters:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, self._masters)
        for parameter in self._parameters:
            parameter.grad = None
        return loss.detach()
