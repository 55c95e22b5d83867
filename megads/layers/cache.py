"""What attention keeps of the tokens so far, so that generation computes each of them once.

    prefill    all columns of the prompt     plain causal attention; their keys and values are kept
    decode     one column                    its key and value are kept beside the others; its query sees them all

    one layer  | k, v of columns 0 .. length - 1 | new | padding |       [..., capacity, dim], of this rank's heads

With sequence parallelism layers compute a multiple of the ranks' number of columns. Those behind the last real one come
after everything, so nothing sees them, and the next step's are written over them. Latent attention keeps latents
(`mla.py`), others keys and values. Over context-parallel ranks nothing is cut: each runs the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megads.ops.attention import ATTENTION, attention
from megads.ops.attention_call import Call


class Cache:
    """Of all layers of one rank.

    Args:
        capacity: columns that it can hold, those that pad a step among them.

    Attributes:
        length: columns that are kept.
    """

    def __init__(self, capacity: int) -> None:
        self.length = 0
        self._capacity = capacity
        self._num_new = 0
        self._kept: dict[int, tuple[Tensor, ...]] = {}

    @contextmanager
    def step(self, num_new: int) -> Iterator[None]:
        """Inside runs a forward of `num_new` columns (and some that pad it): many from an empty cache, or one."""
        self._num_new = num_new
        yield
        self.length += num_new

    def clear(self) -> None:
        """Forget every column."""
        self.length = 0

    def extend(self, layer: torch.nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what a layer made of the step's columns.

        Args:
            new: [..., seq, dim] each.

        Returns:
            [..., length + seq, dim] each, views: all columns so far, and those that pad the step.
        """
        if id(layer) not in self._kept:
            self._kept[id(layer)] = tuple(
                x.new_empty(*x.shape[:-2], self._capacity, x.shape[-1]) for x in new
            )
        stop = self.length + new[0].shape[-2]
        for kept, x in zip(self._kept[id(layer)], new, strict=True):
            kept[..., self.length : stop, :] = x
        return tuple(kept[..., :stop, :] for kept in self._kept[id(layer)])

    def attend(
        self, layer: torch.nn.Module, *, q: Tensor, pair: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Causal attention of the step's queries to all columns so far.

        Args:
            q: [batch, heads, seq, dim].
            pair: keys and values [batch, kv_heads, seq, dim] of the same columns.

        Returns:
            [batch, heads, seq, v_dim]; of columns that pad the step, nothing of meaning. No gradient.
        """
        keys, values = self.extend(layer, *pair)
        if self.length == 0:
            return attention(q, *pair, scale=scale).out
        num_keys = self.length + self._num_new
        keys, values = keys[..., :num_keys, :], values[..., :num_keys, :]
        call = Call(
            scale, (range(num_keys, num_keys + q.shape[2]),), (range(num_keys),)
        )  # every query sees all
        out: Tensor = ATTENTION.pick(q, keys, values, call).run(q, keys, values, call)[0]
        return out


class Cached(torch.nn.Module):
    """Attention that may have a cache.

    Attributes:
        cache: what it keeps columns in; None, while it trains: nothing.
    """

    cache: Cache | None = None


@contextmanager
def caching(modules: Iterable[torch.nn.Module], cache: Cache | None) -> Iterator[None]:
    """Inside, all attention in `modules` has this cache; None: none."""
    found = [m for module in modules for m in module.modules() if isinstance(m, Cached)]
    for module in found:
        module.cache = cache
    try:
        yield
    finally:
        for module in found:
            module.cache = None
