"""The one trunk: embedding, transformer blocks, head and loss, as blocks that a pipeline deals to its stages.

    stage payload     ()      ->  (hidden,)  ->  ...  ->  (hidden,)   ->  ()
    block           embedding     layers.0       layers.N-1      head        extras: ("loss", sum, count)
                                                            or -> (normed,) -> layers.N of mtp.py -> ... -> ()

What a model is, is a `DecoderSpec` (spec.py); families differ in data, not in classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.attention import SelfAttention
from megads.layers.dropout import HiddenDropout
from megads.layers.embedding import PositionEmbedding, VocabParallelEmbedding, VocabParallelHead
from megads.layers.mla import LatentAttention, MLASpec
from megads.layers.mlp import GeluMLP, SwiGLUMLP
from megads.layers.moe import MixtureOfExperts
from megads.layers.norm import LayerNorm, RMSNorm
from megads.layers.offload import Offload
from megads.layers.recompute import KEEP_ALL, Memory
from megads.model.block import Moving, TransformerBlock
from megads.model.mtp import MTPBlock, Trunk
from megads.model.spec import TIED_NAME, DecoderSpec
from megads.objective.chunked import Head, chunked_loss
from megads.objective.language import Losses, token_losses
from megads.parallel.collectives import gather_last
from megads.parallel.parameter import Scope
from megads.pipeline.stage import BlockOutput, Extra, Payload


class EmbeddingBlock(torch.nn.Module):
    """() -> (hidden,): token and, if learned, position embeddings, then dropout."""

    def __init__(self, scope: Scope, spec: DecoderSpec) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(
            scope.child("word"), spec.vocab, spec.hidden, init_std=spec.init_std, tie=spec.word_tie
        )
        self.position = (
            PositionEmbedding(
                scope.child("position"), spec.max_positions, spec.hidden, init_std=spec.init_std
            )
            if spec.rope is None
            else None
        )
        self.dropout = HiddenDropout(scope.child("dropout"), spec.dropout)

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        hidden = self.word(batch.tokens)  # [seq, batch, hidden]
        if self.position is not None:
            hidden = hidden + self.position(batch.positions)
        return BlockOutput((self.dropout(hidden, batch),))


class HeadBlock(torch.nn.Module):
    """(hidden,) -> (): final norm, output head, loss. With multi-token prediction behind it -> (normed hidden,).

    Args:
        loss_chunk: tokens whose logits exist at a time; None: all, and they are kept for the backward.
    """

    def __init__(self, scope: Scope, spec: DecoderSpec, *, loss_chunk: int | None) -> None:
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
        self._is_cut = scope.sequence_parallel
        self._has_more = spec.mtp is not None
        self._width = spec.width
        self._weights = spec.objective.weights(spec.vocab)
        self._chunked = (
            None
            if loss_chunk is None
            else Head(
                self.output.weight,
                self.output.columns,
                self._group,
                is_sequence_parallel=scope.sequence_parallel,
                queue=scope.queue,
                chunk=loss_chunk,
                weights=self._weights,
            )
        )

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        (hidden,) = payload
        normed = self.norm(hidden)
        sums, count = self.loss(normed, batch), batch.mask.sum()
        extras = [Extra("loss", sums.plain, count)]
        if sums.trained is not sums.plain:
            extras.append(Extra("trained_loss", sums.trained, count))
        return BlockOutput((normed,) if self._has_more else (), tuple(extras))

    def loss(self, normed: Tensor, batch: Batch) -> Losses:
        """Sums of the losses of hidden states behind a norm, of the tokens of `batch` that count."""
        normed = self._scaled(normed)
        if self._chunked is not None:
            return chunked_loss(normed, batch, head=self._chunked)
        logits = self.output(normed).transpose(0, 1)  # [batch, seq, vocab_local]
        losses = token_losses(
            logits.flatten(0, 1),
            batch.labels.flatten(),
            columns=self.output.columns,
            group=self._group,
            weights=self._weights,
        )
        return losses.sum(batch.mask.flatten())

    def _scaled(self, normed: Tensor) -> Tensor:
        """What the output weight is multiplied with: logits are divided by the model's width (muP)."""
        return normed if self._width == 1.0 else normed / self._width

    def logits(self, payload: Payload, *, columns: slice = slice(None)) -> Tensor:
        """(hidden,) -> [batch, seq, vocab] over the whole vocabulary, on every tensor-parallel rank (no gradient).

        Args:
            columns: those of the sequence that are wanted.
        """
        (hidden,) = payload
        normed = self._scaled(self.norm(hidden))
        if self._is_cut:
            local = self.output(normed)[columns].transpose(0, 1)
        else:
            local = self.output(normed[columns]).transpose(0, 1)
        return gather_last(local, self._group)[..., : self._vocab]


def make_norm(scope: Scope, spec: DecoderSpec) -> LayerNorm | RMSNorm:
    """The family's norm over the residual stream."""
    kind = LayerNorm if spec.norm == "layer" else RMSNorm
    return kind(scope, spec.hidden, eps=spec.norm_eps)


def make_layer(
    scope: Scope, spec: DecoderSpec, *, number: int, memory: Memory, moving: Moving | None
) -> TransformerBlock:
    """One transformer layer. Projections back into the residual stream start smaller, by sqrt(2 x layers)."""
    output_std = spec.init_std / (2 * spec.layers) ** 0.5
    return TransformerBlock(
        scope,
        attention=make_attention(scope.child("attention"), spec, output_std=output_std, memory=memory),
        mlp=make_mlp(scope.child("mlp"), spec, number=number, output_std=output_std, memory=memory),
        attention_norm=make_norm(scope.child("attention_norm"), spec),
        mlp_norm=make_norm(scope.child("mlp_norm"), spec),
        dropout=spec.dropout,
        memory=memory,
        moving=moving,
    )


def make_attention(
    scope: Scope, spec: DecoderSpec, *, output_std: float, memory: Memory
) -> SelfAttention | LatentAttention:
    """The attention of a layer."""
    if isinstance(spec.attention, MLASpec):
        return LatentAttention(
            scope,
            spec.hidden,
            spec.attention,
            rope=spec.rope,
            dropout=spec.attention_dropout,
            init_std=spec.init_std,
            output_std=output_std,
            keeps_norms=not memory.recomputes("norm"),
        )
    return SelfAttention(
        scope,
        spec.hidden,
        spec=spec.attention,
        rope=spec.rope,
        dropout=spec.attention_dropout,
        init_std=spec.init_std,
        output_std=output_std,
    )


def make_mlp(
    scope: Scope, spec: DecoderSpec, *, number: int, output_std: float, memory: Memory
) -> torch.nn.Module:
    """The feed-forward part of layer `number`, dense or with experts."""
    if spec.moe is not None and number in spec.expert_layers:
        row = spec.expert_layers.index(number)
        return MixtureOfExperts(
            scope,
            spec.hidden,
            spec.moe,
            row=row,
            init_std=spec.init_std,
            output_std=output_std,
            keeps_activation=not memory.recomputes("activation"),
        )
    return (GeluMLP if spec.activation == "gelu" else SwiGLUMLP)(
        scope,
        spec.hidden,
        spec.ffn,
        init_std=spec.init_std,
        output_std=output_std,
        has_bias=spec.mlp_bias,
        keeps_activation=not memory.recomputes("activation"),
    )


def make_blocks(
    scope: Scope, spec: DecoderSpec, *, stages: Mapping[int, range], memory: Memory = KEEP_ALL
) -> dict[int, torch.nn.ModuleList]:
    """This process' blocks: stage number -> the blocks of its range of block numbers (0 .. num_blocks - 1)."""
    return {stage: _make_stage(scope, spec, numbers, memory=memory) for stage, numbers in stages.items()}


def _make_stage(scope: Scope, spec: DecoderSpec, numbers: range, *, memory: Memory) -> torch.nn.ModuleList:
    offload = Offload(scope.mesh.device) if memory.offload else None
    first = max(numbers.start, 1) - 1  # layer of the stage

    def layer(number: int) -> TransformerBlock:
        index = number - first
        return make_layer(
            scope.child(f"layers.{number}"),
            spec,
            number=number,
            memory=memory.of_layer(index),
            moving=None if offload is None else partial(offload.layer, is_first=index == 0),
        )

    blocks = torch.nn.ModuleList()
    for number in numbers:
        if number == 0:
            blocks.append(EmbeddingBlock(scope.child("embedding"), spec))
        elif number < spec.num_blocks - 1:
            blocks.append(layer(number - 1))
        else:
            head = HeadBlock(scope.child("head"), spec, loss_chunk=memory.loss_chunk)
            blocks.append(head)
            for depth in range(1, spec.mtp_depth + 1):
                number = spec.layers + depth - 1
                trunk = Trunk(partial(make_norm, spec=spec), layer(number), head.loss)
                blocks.append(
                    MTPBlock(
                        scope.child(f"layers.{number}"),
                        spec,
                        depth=depth,
                        trunk=trunk,
                        recomputes=memory.of_layer(number - first).recomputes_all,
                    )
                )
    return blocks
