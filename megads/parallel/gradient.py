"""Gradient buckets: flat memory for the gradients and weights of parameters that are reduced and updated alike.

Every parameter's `.grad` is a view of its bucket's flat gradient, so autograd accumulates in place, one collective
reduces many parameters, and a shard of the bucket is a plain slice:

    flat    | layers.1.mlp.down.weight | layers.1.mlp.up.weight | ... | pad |
    shards  |      rank 0        |       rank 1       |      rank 2         |

Buckets are filled in reverse order of declaration, as the backward finishes them. Parameters share a bucket
only if they
agree in everything that the optimizer and the norm ask (`Traits`), so a whole bucket decays or does not, counts or not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.parallel.collectives import all_reduce_, reduce_scatter_
from megads.parallel.mesh import Group, Mesh
from megads.parallel.parameter import ShardedParameter, is_primary


@dataclass(frozen=True, slots=True)
class Traits:
    """What all parameters of a bucket have in common."""

    decay: bool
    is_primary: bool
    partial: tuple[str, ...]
    tie: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter and where its elements start in the flat memory."""

    parameter: ShardedParameter
    start: int


class Bucket:
    """Flat weights and gradients of some parameters.

    Attributes:
        traits: what its parameters agree in.
        places: its parameters and their offsets.
        values, gradients: flat, padded to a multiple of the group size; parameters and their `.grad` are views.
    """

    def __init__(self, parameters: Iterable[ShardedParameter], traits: Traits, mesh: Mesh) -> None:
        self.traits = traits
        self._mesh = mesh
        self.group: Group = mesh.group("dp_cp")
        places, size = [], 0
        for parameter in parameters:
            places.append(Place(parameter, size))
            size += parameter.numel()
        self.places = tuple(places)
        padded = -(-size // self.group.size) * self.group.size
        first = self.places[0].parameter
        self.values = torch.zeros(padded, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        for place in self.places:
            span = slice(place.start, place.start + place.parameter.numel())
            values = self.values[span].view(place.parameter.shape)
            values.copy_(place.parameter.data)
            place.parameter.data = values
            place.parameter.grad = self.gradients[span].view(place.parameter.shape)

    def shard(self, flat: Tensor) -> Tensor:
        """This rank's slice of a flat tensor of the bucket."""
        share = flat.numel() // self.group.size
        return flat[self.group.rank * share : (self.group.rank + 1) * share]

    def reduce(self, *, sharded: bool) -> None:
        """Sum the gradients over all ranks that hold a part of them.

        Args:
            sharded: whether only this rank's slice is needed (ZeRO); the rest of `gradients` is then garbage.
        """
        for axis in self.traits.partial:
            all_reduce_(self.gradients, self._mesh.group(axis))
        collect = reduce_scatter_ if sharded else all_reduce_
        mine = collect(self.gradients, self.group)
        if self.traits.tie is not None:
            all_reduce_(mine, self._mesh.group("ends"))


def make_buckets(
    parameters: Iterable[ShardedParameter], mesh: Mesh, *, max_elements: int
) -> tuple[Bucket, ...]:
    """Deal parameters to buckets of at most `max_elements` (a larger parameter gets one of its own)."""
    groups: dict[Traits, list[list[ShardedParameter]]] = {}
    for parameter in reversed(tuple(parameters)):
        spec = parameter.spec
        traits = Traits(spec.decay, is_primary(parameter, mesh), spec.partial, spec.tie)
        buckets = groups.setdefault(traits, [[]])
        if buckets[-1] and sum(p.numel() for p in buckets[-1]) + parameter.numel() > max_elements:
            buckets.append([])
        buckets[-1].append(parameter)
    return tuple(Bucket(members, traits, mesh) for traits, lists in groups.items() for members in lists)
