"""The one trunk: embedding, transformer blocks, head and loss, as blocks that a pipeline deals to its stages.

    stage payload     ()      ->  (hidden,)  ->  ...  ->  (hidden,)   ->  ()
    block           embedding     layers.0       layers.N-1      head        extras: ("loss", sum, count)

What a family is, is a `DecoderSpec`; families differ in data, not in classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.attention import SelfAttention
from megads.layers.dropout import HiddenDropout
from megads.layers.embedding import PositionEmbedding, VocabParallelEmbedding, VocabParallelHead
from megads.layers.mlp import GeluMLP, SwiGLUMLP
from megads.layers.norm import LayerNorm, RMSNorm
from megads.layers.recompute import Recompute
from megads.model.block import TransformerBlock
from megads.objective.language import masked_sum, token_losses
from megads.parallel.collectives import gather_last
from megads.parallel.parameter import Scope
from megads.pipeline.stage import BlockOutput, Extra, Payload

TIED_NAME = "embedding.word.weight"


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Everything that defines a decoder-only transformer; sizes are global, nothing is left open."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    positions: Literal["learned", "rotary"]
    max_positions: int
    rope_theta: float
    norm: Literal["layer", "rms"]
    norm_eps: float
    activation: Literal["gelu", "swiglu"]
    has_bias: bool
    tied: bool
    dropout: float
    attention_dropout: float
    init_std: float

    @property
    def num_blocks(self) -> int:
        """Blocks that a pipeline can deal: embedding, layers, head."""
        return self.layers + 2

    @property
    def block_costs(self) -> tuple[float, ...]:
        """Multiply-adds of one token in the matrix products of each block, the weights' part."""
        width = self.hidden // self.heads * (self.heads + 2 * self.kv_heads)
        projections = self.hidden * (width + self.hidden)
        mlp = self.hidden * self.ffn * (3 if self.activation == "swiglu" else 2)
        return (0.0, *(float(projections + mlp) for _ in range(self.layers)), float(self.vocab * self.hidden))

    def flops_per_token(self, sequence_length: int) -> float:
        """Flops of forward and backward for one token: 6 x weights in products + 6 L h s (causal attention).

        As in Narayanan et al. 2021 (eq. 3) without recompute, with the causal half of the attention products.
        """
        return 6.0 * sum(self.block_costs) + 6.0 * self.layers * self.hidden * sequence_length


class EmbeddingBlock(torch.nn.Module):
    """() -> (hidden,): token and, if learned, position embeddings, then dropout."""

    def __init__(self, scope: Scope, spec: DecoderSpec) -> None:
        super().__init__()
        tie = TIED_NAME if spec.tied else None
        self.word = VocabParallelEmbedding(
            scope.child("word"), spec.vocab, spec.hidden, init_std=spec.init_std, tie=tie
        )
        self.position = (
            PositionEmbedding(
                scope.child("position"), spec.max_positions, spec.hidden, init_std=spec.init_std
            )
            if spec.positions == "learned"
            else None
        )
        self.dropout = HiddenDropout(scope.child("dropout"), spec.dropout)

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        hidden = self.word(batch.tokens)  # [seq, batch, hidden]
        if self.position is not None:
            hidden = hidden + self.position(batch.positions)
        return BlockOutput((self.dropout(hidden, batch),))


class HeadBlock(torch.nn.Module):
    """(hidden,) -> (): final norm, output head, loss."""

    def __init__(self, scope: Scope, spec: DecoderSpec) -> None:
        super().__init__()
        self.norm = make_norm(scope.child("norm"), spec)
        self.output = VocabParallelHead(
            scope.child("output"),
            spec.vocab,
            spec.hidden,
            init_std=spec.init_std,
            tie=TIED_NAME if spec.tied else None,
        )
        self._group = scope.mesh.group("tp")
        self._vocab = spec.vocab

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        (hidden,) = payload
        logits = self.output(self.norm(hidden)).transpose(0, 1)  # [batch, seq, vocab_local]
        losses = token_losses(
            logits.flatten(0, 1),
            batch.labels.flatten(),
            columns=self.output.columns,
            group=self._group,
        )
        mask = batch.mask.flatten()
        return BlockOutput((), (Extra("loss", masked_sum(losses, mask), mask.sum()),))

    def logits(self, payload: Payload) -> Tensor:
        """(hidden,) -> [batch, seq, vocab] over the whole vocabulary, on every tensor-parallel rank (no gradient)."""
        (hidden,) = payload
        local = self.output(self.norm(hidden)).transpose(0, 1)
        return gather_last(local, self._group)[..., : self._vocab]


def make_norm(scope: Scope, spec: DecoderSpec) -> LayerNorm | RMSNorm:
    """The family's norm over the residual stream."""
    kind = LayerNorm if spec.norm == "layer" else RMSNorm
    return kind(scope, spec.hidden, eps=spec.norm_eps)


def make_layer(scope: Scope, spec: DecoderSpec, *, recompute: Recompute) -> TransformerBlock:
    """One transformer layer. Projections back into the residual stream start smaller, by sqrt(2 x layers)."""
    output_std = spec.init_std / (2 * spec.layers) ** 0.5
    attention = SelfAttention(
        scope.child("attention"),
        spec.hidden,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        rope_theta=spec.rope_theta if spec.positions == "rotary" else None,
        dropout=spec.attention_dropout,
        init_std=spec.init_std,
        output_std=output_std,
        has_bias=spec.has_bias,
    )
    mlp = (GeluMLP if spec.activation == "gelu" else SwiGLUMLP)(
        scope.child("mlp"),
        spec.hidden,
        spec.ffn,
        init_std=spec.init_std,
        output_std=output_std,
        has_bias=spec.has_bias,
    )
    return TransformerBlock(
        scope,
        attention=attention,
        mlp=mlp,
        attention_norm=make_norm(scope.child("attention_norm"), spec),
        mlp_norm=make_norm(scope.child("mlp_norm"), spec),
        dropout=spec.dropout,
        recompute=recompute,
    )


def make_blocks(
    scope: Scope, spec: DecoderSpec, *, stages: Mapping[int, range], recompute: Recompute = "none"
) -> dict[int, torch.nn.ModuleList]:
    """This process' blocks: stage number -> the blocks of its range of block numbers (0 .. num_blocks - 1)."""
    return {
        stage: torch.nn.ModuleList(_make_block(scope, spec, number=n, recompute=recompute) for n in numbers)
        for stage, numbers in stages.items()
    }


def _make_block(scope: Scope, spec: DecoderSpec, *, number: int, recompute: Recompute) -> torch.nn.Module:
    if number == 0:
        return EmbeddingBlock(scope.child("embedding"), spec)
    if number == spec.num_blocks - 1:
        return HeadBlock(scope.child("head"), spec)
    return make_layer(scope.child(f"layers.{number - 1}"), spec, recompute=recompute)
