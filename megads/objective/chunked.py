"""Output head and loss in one, a chunk of tokens at a time: logits are never whole, and none are kept.

    for each chunk      logits = x W^T  ->  sum of losses,  dlogits  ->  dx = dlogits W,  dW += dlogits^T x
    backward            seed x dx;  seed x dW is the queue's work

The backward of a sum of losses is seeded with one number for all tokens, so the gradients are made in the forward, of
the sum itself, and nothing is computed twice. What waits for the backward is dx, like x, and dW, like W in the dtype of
its gradient, in place of [tokens, vocab] logits twice. (Cut cross entropy, Wijmans et al. 2024, and Liger do the like.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megads.data.sequence import Batch
from megads.objective.language import Losses, token_sums
from megads.ops.cross_entropy import PLAIN, Columns, LossWeights, local_gradient, wide_dtype
from megads.ops.product import add_product_
from megads.parallel.collectives import start_all_reduce, start_gather_sequence, start_scatter_sequence
from megads.parallel.mesh import Group
from megads.parallel.weight_queue import WeightQueue, gradient_of


@dataclass(frozen=True, slots=True)
class Head:
    """An output head whose vocabulary is cut over ranks.

    Attributes:
        weight: [vocab_local, hidden].
        columns: which ids its rows are.
        group: the ranks over which the vocabulary is cut.
        is_sequence_parallel: whether hidden states come cut along the sequence over the same ranks.
        queue: runs the weight's gradient.
        chunk: tokens whose logits exist at a time.
        weights: of what is trained on (`ObjectiveSpec.weights`).
    """

    weight: Tensor
    columns: Columns
    group: Group
    is_sequence_parallel: bool
    queue: WeightQueue
    chunk: int
    weights: LossWeights = PLAIN


class _HeadLoss(torch.autograd.Function):
    """[seq, batch, hidden] or [seq / n, batch, hidden] -> sums of the losses that count: trained, plain."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, batch: Batch, head: Head, has_backward: bool
    ) -> tuple[Tensor, Tensor]:
        whole = start_gather_sequence(hidden, head.group).wait() if head.is_sequence_parallel else hidden
        x = whole.flatten(0, 1)  # [tokens, hidden]
        labels, mask = batch.labels.T.flatten(), batch.mask.T.flatten()  # [tokens]
        trained, plain = torch.zeros((2,), dtype=wide_dtype(x), device=x.device).unbind()
        dx = torch.empty_like(x) if has_backward else None
        dweight = torch.zeros_like(weight, dtype=gradient_of(weight).dtype) if has_backward else None
        for start in range(0, x.shape[0], head.chunk):
            rows = slice(start, start + head.chunk)
            logits = F.linear(x[rows], weight)  # [chunk, vocab_local]
            found = token_sums(
                logits, labels[rows], columns=head.columns, group=head.group, weights=head.weights
            )
            sums = found.losses.sum(mask[rows])
            trained, plain = trained + sums.trained, plain + sums.plain
            if dx is not None and dweight is not None:
                dlogits = local_gradient(
                    logits,
                    labels[rows],
                    lse=found.lse,
                    scale=mask[rows].to(found.lse.dtype),
                    columns=head.columns,
                    weights=head.weights,
                )
                torch.mm(dlogits, weight, out=dx[rows])
                add_product_(dweight, dy=dlogits, x=x[rows])
        if dx is not None and dweight is not None:
            sum_over = start_scatter_sequence if head.is_sequence_parallel else start_all_reduce
            ctx.save_for_backward(sum_over(dx.view_as(whole), head.group).wait(), dweight)
        ctx.weight, ctx.queue = weight, head.queue
        ctx.mark_non_differentiable(plain)
        return trained, plain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        seed, (dx, dweight), weight = gradients[0], ctx.saved_tensors, ctx.weight
        ctx.queue.put(lambda: gradient_of(weight).add_(dweight.mul_(seed)), weight)
        return dx * seed, None, None, None, None


def chunked_loss(hidden: Tensor, batch: Batch, *, head: Head) -> Losses:
    """Sums of the losses of the tokens of `batch` that count: scalars, alike on all ranks.

    Args:
        hidden: what the head is applied to: [seq, batch, hidden], or [seq / n, batch, hidden] with sequence
            parallelism.

    Returns:
        float32 (float64 for float64 hidden states).
    """
    trained, plain = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, batch, head, torch.is_grad_enabled()
    )
    return Losses(trained if head.weights.is_plain else plain, trained)
