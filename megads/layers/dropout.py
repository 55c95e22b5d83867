"""Dropout whose mask is a function of (seed, step, name, global sample, position, hidden or key index).

No generator state: the same elements are dropped under every layout, micro-batch size and recompute. Masks are drawn in
`parallel/rng.py`; attention applies them in `ops/attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megads.data.sequence import Batch
from megads.layers.context import attended_heads
from megads.ops.attention_call import Columns, Dropout
from megads.parallel.parameter import Scope
from megads.parallel.rng import keep_mask


class HiddenDropout(torch.nn.Module):
    """Dropout of hidden activations [seq, batch, hidden], alike on all tensor-parallel ranks.

    With sequence parallelism each rank has its part of the sequence, and of the mask.
    """

    def __init__(self, scope: Scope, probability: float) -> None:
        super().__init__()
        self._stream = f"{scope.seed}/dropout/{scope.name}"
        self._probability = probability
        self._part = scope.mesh.group("tp").rank if scope.sequence_parallel else 0

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if not self.training or self._probability == 0.0:
            return x
        keep = keep_mask(
            name=self._stream,
            step=batch.step,
            probability=self._probability,
            units=batch.samples[None, :],
            rows=batch.places[self._part * x.shape[0] :][: x.shape[0], None],
            columns=(0, x.shape[2]),
        )
        return x * keep / (1.0 - self._probability)


class AttentionDropout(torch.nn.Module):
    """Dropout of attention weights [batch, heads, queries, keys] of the heads that this rank attends with.

    Args:
        num_heads: global number of query heads.
    """

    def __init__(self, scope: Scope, probability: float, *, num_heads: int) -> None:
        super().__init__()
        self._stream = f"{scope.seed}/dropout/{scope.name}"
        self._probability = probability
        self._num_heads = num_heads
        self._heads = attended_heads(scope, num_heads)

    def plan(self, batch: Batch) -> Dropout | None:
        """What the attention op needs to drop weights of this batch; None where nothing is dropped."""
        if not self.training or self._probability == 0.0:
            return None
        device = batch.tokens.device
        heads = torch.tensor(self._heads, device=device)
        units = (batch.samples[:, None] * self._num_heads + heads)[..., None]  # [batch, heads, 1]

        def keep(queries: Columns, keys: Columns) -> Tensor:
            rows = torch.cat([torch.arange(part.start, part.stop, device=device) for part in queries])
            masks = [
                keep_mask(
                    name=self._stream,
                    step=batch.step,
                    probability=self._probability,
                    units=units,
                    rows=rows,
                    columns=(part.start, part.stop),
                )
                for part in keys
            ]
            return torch.cat(masks, dim=-1)

        return Dropout(self._probability, keep)
