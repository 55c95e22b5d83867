"""Tensors to save, and random ways to cut them over ranks."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from megads.parallel.parameter import Piece
from megads.parallel.shard import Box

State = Mapping[str, torch.Tensor]


def small_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A model of two tensors with a moment and a counter."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model/w": torch.randn(6, 4, generator=g),
        "model/b": torch.randn(5, generator=g).bfloat16(),
        "optim/exp_avg/w": torch.randn(6, 4, generator=g, dtype=torch.float64),
        "optim/count": torch.tensor(seed, dtype=torch.int64),
    }


def whole(state: State) -> list[Piece]:
    """The state as one rank's pieces."""
    return [Piece(name, tuple(t.shape), Box.whole(tuple(t.shape)), t) for name, t in state.items()]


def empty_like(state: State) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes and dtypes, with other values."""
    return {name: torch.full_like(t, 1) for name, t in state.items()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: State, b: State) -> bool:
    """Whether names, shapes and bits are equal."""
    return a.keys() == b.keys() and all(a[n].shape == b[n].shape and bits(a[n]) == bits(b[n]) for n in a)


def random_boxes(shape: tuple[int, ...], rng: random.Random, depth: int = 4) -> list[Box]:
    """A random exact cover of `shape` by boxes."""
    found = [Box.whole(shape)]
    for _ in range(depth * bool(shape)):
        box = found.pop(rng.randrange(len(found)))
        dim = rng.randrange(len(shape))
        if box.shape[dim] < 2:
            found.append(box)
            continue
        cut = rng.randrange(box.start[dim] + 1, box.stop[dim])
        found.append(Box(box.start, (*box.stop[:dim], cut, *box.stop[dim + 1 :])))
        found.append(Box((*box.start[:dim], cut, *box.start[dim + 1 :]), box.stop))
    return found


def random_cut(state: State, ranks: int, rng: random.Random) -> list[list[Piece]]:
    """Each rank's pieces of `state`: boxes at random, in memory that is padded or transposed."""
    cut: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, tensor in state.items():
        for box in random_boxes(tuple(tensor.shape), rng):
            values = tensor[box.slices].clone()
            if values.dim() and rng.random() < 0.4:  # as a padded vocabulary: a view of larger memory
                padded = torch.zeros((values.shape[0] + 2, *values.shape[1:]), dtype=values.dtype)
                padded[: values.shape[0]] = values
                values = padded[: values.shape[0]]
            elif values.dim() == 2 and rng.random() < 0.4:
                values = values.t().contiguous().t()
            cut[rng.randrange(ranks)].append(Piece(name, tuple(tensor.shape), box, values))
    for pieces in cut:
        rng.shuffle(pieces)
    return cut
