"""Weight gradients as work that may wait: what splits a backward into input gradients (I) and weight gradients (W).

A layer's backward computes the gradient of its input at once and puts the product that makes its weight's gradient
here. Outside a split backward the work runs at once; inside, it is kept for the stage and micro-batch until W asks for
it, in the order of the backward, so sums are the same under every schedule:

    B          backward of the graph:  dx, then dW at once
    I ... W    backward of the graph:  dx, dW kept  ...  the kept dW, in order

Nothing of the forward is run twice (Qi et al. 2023, section 2.2). How a layer uses it:

    class _Product(torch.autograd.Function):
        forward    keep the parameter itself as `ctx.weight` and the queue as `ctx.queue`: under recompute a saved
                   tensor comes back as another object, and a gradient added to that one is lost
        backward   def weight_gradient() -> None: ...      adds to `ctx.weight.grad`; runs without autograd, and may
                                                           issue collectives: all ranks of a group run the same W's
                   ctx.queue.put(weight_gradient, ctx.weight)
                   return dx, None                         None for the weight, always

What is cheap (norms, biases) stays with autograd, in I. autograd calls a parameter's post-accumulate hook in I
although its work still waits, so a weight is complete when `run` says so, not when its hook is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Work that waits, and the parameter whose gradient it adds to."""

    work: Work
    weight: Tensor


def gradient_of(weight: Tensor) -> Tensor:
    """The buffer that a weight's gradient is added to: made if there is none, of a brief one with its bucket."""
    if weight.grad is None:
        getattr(weight, "open_gradient", _no_bucket)()
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _no_bucket() -> None:
    """What a weight that lies in no bucket has to open."""


class WeightQueue:
    """Runs weight-gradient work at once, or keeps it while a backward is split. One for all layers of a rank."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], list[_Kept]] = {}
        self._open: list[_Kept] | None = None

    @property
    def is_deferring(self) -> bool:
        """Whether what is put now will wait."""
        return self._open is not None

    def put(self, work: Work, weight: Tensor) -> None:
        """Run `work`, which adds to `weight.grad`, now or when its W comes. It may issue collectives."""
        if self._open is None:
            with torch.no_grad():
                work()
        else:
            self._open.append(_Kept(work, weight))

    @contextmanager
    def deferring(self, stage: int, micro_batch: int) -> Iterator[None]:
        """Inside, keep the work for `run(stage, micro_batch)`."""
        outer, self._open = self._open, self._kept.setdefault((stage, micro_batch), [])
        try:
            yield
        finally:
            self._open = outer

    def waiting(self, stage: int, micro_batch: int) -> tuple[Tensor, ...]:
        """The parameters whose work waits for a W, each once."""
        return tuple({id(k.weight): k.weight for k in self._kept.get((stage, micro_batch), ())}.values())

    def run(self, stage: int, micro_batch: int, *, done: Callable[[Tensor], None] | None = None) -> None:
        """Do what was kept for a stage and micro-batch, in the order of its backward.

        Args:
            done: is told each of `waiting`, when the last of its work is done.
        """
        kept = self._kept.pop((stage, micro_batch), [])
        left: dict[int, int] = {}
        for item in kept:
            left[id(item.weight)] = left.get(id(item.weight), 0) + 1
        kept.reverse()  # popped from its end, so that what a piece of work holds is freed when it is done
        with torch.no_grad():
            while kept:
                item = kept.pop()
                item.work()
                left[id(item.weight)] -= 1
                if done is not None and left[id(item.weight)] == 0:
                    done(item.weight)

    @property
    def num_kept(self) -> int:
        """Pieces of work that wait."""
        return sum(map(len, self._kept.values()))
