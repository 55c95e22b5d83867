"""Muon (Jordan et al. 2024): a step along the gradient's momentum, every matrix of it made orthogonal.

    gradient, momentum (flat shards)  --matrix.py-->  whole matrices  --orthogonal.py-->  shards  -->  masters

A rank keeps momentum for what it updates alone, half of AdamW's state. The arithmetic is that of `torch.optim.Muon` on
the whole matrix, under every layout; the matrices of a fused or stacked weight are orthogonalised one by one.
Embeddings, heads, routers and vectors are AdamW's (`group.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megads.config.optim import OptimConfig
from megads.optim.group import ParameterGroup
from megads.optim.matrix import MatrixExchange
from megads.optim.orthogonal import orthogonalised
from megads.optim.share import Share
from megads.parallel.mesh import Group

MATCH_RMS = 0.2  # root mean square of AdamW's steps (Liu et al. 2025, section 2.2)


class MuonUpdate:
    """`Update` of hidden matrices by Muon. All ranks of the stage make it, and take steps, together.

    Args:
        gradients: of each share, flat, in the dtype of its master; a step overwrites them.
        group: the ranks of the stage, which share the work.
    """

    moments = ("momentum",)
    num_steps = 0  # nothing depends on it

    def __init__(
        self, shares: Sequence[Share], gradients: Sequence[Tensor], *, group: Group, config: OptimConfig
    ) -> None:
        self.shares: tuple[Share, ...] = tuple(shares)
        self._gradients = tuple(gradients)
        self._config = config.muon
        self._momenta: tuple[Tensor, ...] = ()
        self._exchange = MatrixExchange(
            shares,
            gradients,
            group=group,
            dtype=_dtype(config, gradients[0].dtype),
            max_elements=config.bucket_elements,
        )

    def start(self) -> None:
        """See `Update`."""
        self._momenta = tuple(torch.zeros_like(gradient) for gradient in self._gradients)

    def load_steps(self, num_steps: int) -> None:
        """Nothing: see `num_steps`."""

    @torch.no_grad()
    def step(self, *, lr: float, factor: Tensor, finite: Tensor) -> None:
        """See `Update`."""
        beta = self._config.momentum
        dtype = self._gradients[0].dtype
        taken = finite.to(dtype)  # 1 or 0: the step of a gradient that is not finite has length 0
        for gradient, momentum in zip(self._gradients, self._momenta, strict=True):
            gradient.mul_(factor).masked_fill_(~finite, 0.0)
            momentum.lerp_(gradient, (1.0 - beta) * taken)
            if self._config.nesterov:
                gradient.lerp_(momentum, beta)
            else:
                gradient.copy_(momentum)
        compute = partial(orthogonalised, steps=self._config.steps, coefficients=self._config.coefficients)
        self._exchange.run(compute, scales=self._scale)
        for share, update in zip(self.shares, self._gradients, strict=True):
            group = share.bucket.traits.group
            assert isinstance(group, ParameterGroup)  # `stage_buckets` made it
            rate = lr * group.lr_scale
            share.master.mul_(1.0 - rate * group.weight_decay * taken)
            share.master.addcmul_(update, rate * taken, value=-1.0)

    def _scale(self, rows: int, columns: int) -> float:
        """What the orthogonal matrix is multiplied by, beside the learning rate."""
        if self._config.scale == "original":
            return math.sqrt(max(1.0, rows / columns))
        return MATCH_RMS * math.sqrt(max(rows, columns))

    def states(self, master: Tensor) -> Iterator[tuple[str, Tensor]]:
        """See `Update`."""
        for share, momentum in zip(self.shares, self._momenta, strict=True):
            if share.master is master:
                yield "momentum", momentum


def _dtype(config: OptimConfig, master: torch.dtype) -> torch.dtype:
    """The dtype of the iteration."""
    is_narrow = config.precision in ("bf16", "fp16")
    chosen = config.muon.dtype or ("bf16" if is_narrow else "master")
    return torch.bfloat16 if chosen == "bf16" else master
