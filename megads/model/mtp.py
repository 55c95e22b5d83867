"""Multi-token prediction (DeepSeek-V3 2024, section 2.2): behind the head one more layer a depth, for training alone.

    depth k = 1 .. D, column i of a row whose tokens are t_i and whose labels are t_(i+1):

    h^(k-1)_i --> hnorm --------+
    t_(i+k) ----> word -> enorm +-> eh_proj [embedding | hidden] -> layer -> norm -> h^k_i -> head: t_(i+k+1)
                                                                                       +----> depth k + 1

h^0 is what the head's norm made of the trunk. Word embedding and output weight are the trunk's own: their gradients are
summed over all uses, and a checkpoint has them once. Layer k of it has the name and the number that would follow the
trunk's last, as in DeepSeek's checkpoints. (The paper's eq. 21 writes [hidden | embedding]; the published weights are
the other way round.)

    L = weight / D x sum over k of  (sum over i of CE(k, i)) / N

N is the number of labels that count in the *main* loss, of the whole step: the paper's T (its eq. 24 divides T - k
terms by T). It is one number for all ranks, micro-batches and depths, so nothing depends on how the batch is cut. What
stands k places ahead, and whether it counts, is looked up in whole rows (`Batch.look_ahead`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.embedding import VocabParallelEmbedding
from megads.layers.linear import ReplicatedLinear
from megads.layers.recompute import recomputed
from megads.model.block import TransformerBlock
from megads.model.spec import TIED_NAME, DecoderSpec
from megads.objective.language import Losses
from megads.parallel.parameter import Scope
from megads.pipeline.stage import BlockOutput, Extra, Payload


@dataclass(frozen=True, slots=True)
class Trunk:
    """What a depth takes from the model it stands behind.

    Attributes:
        norm: makes a norm over the residual stream.
        layer: one transformer layer.
        loss: sums of the losses of normed hidden states, by the output head.
    """

    norm: Callable[[Scope], torch.nn.Module]
    layer: TransformerBlock
    loss: Callable[[Tensor, Batch], Losses]


class MTPBlock(torch.nn.Module):
    """(h^(k-1),) -> (h^k,), [seq, batch, hidden], of the last depth (): and the extra `mtp_loss`.

    In evaluation it does nothing.

    Args:
        depth: k, from 1.
        recomputes: whether what stands before the layer runs again in the backward.
    """

    uses_previous = True  # the head's weight

    def __init__(
        self, scope: Scope, spec: DecoderSpec, *, depth: int, trunk: Trunk, recomputes: bool
    ) -> None:
        super().__init__()
        self.enorm = trunk.norm(scope.child("enorm"))
        self.hnorm = trunk.norm(scope.child("hnorm"))
        self.eh_proj = ReplicatedLinear(
            scope.child("eh_proj"), 2 * spec.hidden, spec.hidden, init_std=spec.init_std
        )
        self.layer = trunk.layer
        self.norm = trunk.norm(scope.child("norm"))
        self.word = VocabParallelEmbedding(
            scope.child("word"), spec.vocab, spec.hidden, init_std=spec.init_std, tie=TIED_NAME
        )
        self._loss = trunk.loss
        self._depth = depth
        self._is_last = depth == spec.mtp_depth
        self._recomputes = recomputes

    def forward(self, payload: Payload, batch: Batch) -> BlockOutput:
        if not self.training:
            return BlockOutput(())
        (hidden,) = payload
        later = batch.at_depth(self._depth)
        x = recomputed(self._enter, hidden, later) if self._recomputes else self._enter(hidden, later)
        made: BlockOutput = self.layer((x,), batch)
        normed = self.norm(made.payload[0])
        extra = Extra("mtp_loss", self._loss(normed, later).trained, later.mask.sum())
        return BlockOutput(() if self._is_last else (normed,), (extra, *made.extras))

    def _enter(self, hidden: Tensor, later: Batch) -> Tensor:
        """The layer's input, [seq, batch, hidden]."""
        words = self.enorm(self.word(later.tokens))
        x: Tensor = self.eh_proj(torch.cat((words, self.hnorm(hidden)), dim=-1))
        return x
