"""Gradient buckets: flat memory for the weights and gradients of parameters that are reduced and updated alike.

Every parameter is a view of its bucket's flat values and its `.grad` a view of the flat gradients, so autograd
accumulates in place (in float32 also for low-precision weights), one collective reduces many parameters, and a shard
of the bucket is a plain slice:

    flat    | layers.1.mlp.down.weight | layers.1.mlp.up.weight | ... | pad |
    shards  |      rank 0        |       rank 1       |      rank 2         |

Whole gradients stay (ZeRO 0 and 1), or they are *brief* (ZeRO 2): made when the first of the bucket's gradients is
about to be written, and gone when they are summed into the rank's slice, which alone stays:

    open: zeros, .grad = views    backward writes    start_reduce: .grad = None, reduce-scatter    add: sum += slice

A bucket may be opened and reduced many times in a step; sums are linear, so no gradient is lost or counted twice
wherever in the step that happens. When and in which order is the matter of `reducer.py`.

Parameters share a bucket only if they agree in everything that the optimizer and the norm ask (`Traits`), so a whole
bucket decays or does not, counts or not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.parallel.collectives import Pending, all_reduce_, start_all_reduce, start_reduce_scatter
from megads.parallel.mesh import Group, Mesh
from megads.parallel.parameter import ShardedParameter, is_primary


@dataclass(frozen=True, slots=True)
class Reduction:
    """How gradients are summed over data-parallel ranks.

    Attributes:
        is_sharded: each rank gets the sum of its slice alone, and updates it (ZeRO 1, 2); else of the whole bucket.
        is_brief: whole gradients are there only while they are written and reduced (ZeRO 2).
        dtype: in which gradients travel; None: their own. They are added in theirs.
    """

    is_sharded: bool = False
    is_brief: bool = False
    dtype: torch.dtype | None = None


WHOLE = Reduction()


@dataclass(frozen=True, slots=True)
class Traits:
    """What all parameters of a bucket have in common.

    Attributes:
        group: how they are updated; the optimizer's matter (`optim/group.py`).
    """

    group: Hashable
    is_primary: bool
    reduction: str
    partial: tuple[str, ...]
    tie: str | None


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter and where its elements start in the flat memory."""

    parameter: ShardedParameter
    start: int


class Bucket:
    """Flat weights and gradients of some parameters.

    Args:
        parameters: in their initial dtype, which gradients keep.
        dtype: of the weights from now on.
        reduction: how their gradients are summed.

    Attributes:
        traits: what its parameters agree in.
        places: its parameters and their offsets.
        group: ranks over which gradients are summed, and cut where they are sharded.
        replicas: ranks that hold the same shard; one, unless shards are smaller than the data-parallel ranks.
        initial: flat, the values as they came; drop it when it was read.
        values: flat, padded to a multiple of both group sizes; parameters are views.
        sum: flat, where this rank finds the summed gradients of what it updates (`held`).
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        traits: Traits,
        *,
        mesh: Mesh,
        dtype: torch.dtype,
        reduction: Reduction,
    ) -> None:
        self.traits = traits
        self.reduction = reduction
        self.group: Group = mesh.group(f"{traits.reduction}_shard")
        self.replicas: Group = mesh.group(f"{traits.reduction}_replica")
        self._mesh = mesh
        places, size = [], 0
        for parameter in parameters:
            places.append(Place(parameter, size))
            size += parameter.numel()
        self.places = tuple(places)
        unit = self.group.size * self.replicas.size
        padded = -(-size // unit) * unit
        first = parameters[0]
        self.initial: Tensor | None = torch.zeros(padded, dtype=first.dtype, device=first.device)
        for place in self.places:
            self._part(self.initial, place).copy_(place.parameter.data)
        self.values = self.initial.to(dtype, copy=True)
        for place in self.places:
            place.parameter.data = self._part(self.values, place)
            place.parameter.grad_dtype = self.initial.dtype
        self._gradient_dtype = self.initial.dtype
        self._whole: Tensor | None = None
        if reduction.is_brief:
            self.sum = torch.zeros_like(self.shard(self.initial))
        else:
            self.open()
            self.sum = self.held(self.gradients)

    @staticmethod
    def _part(flat: Tensor, place: Place) -> Tensor:
        size = place.parameter.numel()
        return flat[place.start : place.start + size].view(place.parameter.shape)

    def move(self, values: Tensor) -> None:
        """Let the weights live in other memory, which holds the same values."""
        self.values = values
        for place in self.places:
            place.parameter.data = self._part(values, place)

    def shard(self, flat: Tensor) -> Tensor:
        """This rank's slice of a flat tensor of the bucket."""
        share = flat.numel() // self.group.size
        return flat[self.group.rank * share : (self.group.rank + 1) * share]

    def held(self, flat: Tensor) -> Tensor:
        """The part of a flat tensor of the bucket that this rank updates: its slice, or all."""
        return self.shard(flat) if self.reduction.is_sharded else flat

    @property
    def is_open(self) -> bool:
        """Whether there is memory for whole gradients."""
        return self._whole is not None

    @property
    def gradients(self) -> Tensor:
        """Flat, as long as `values`: this rank's whole gradients. There while the bucket is open."""
        assert self._whole is not None
        return self._whole

    def open(self) -> None:
        """Make memory for whole gradients, of which every `.grad` is a view, if there is none."""
        if self._whole is None:
            self._whole = torch.zeros_like(self.values, dtype=self._gradient_dtype)
            for place in self.places:
                place.parameter.grad = self._part(self._whole, place)

    def zero(self) -> None:
        """Begin a step."""
        (self.sum if self.reduction.is_brief else self.gradients).zero_()

    def start_reduce(self) -> Pending:
        """Begin to sum the gradients over the data-parallel ranks (of the experts' grid, if they lie in it).

        Where they are sharded, the rest of `gradients` is garbage from here on; where they are brief, it is gone.
        """
        whole = self.gradients
        if self.reduction.is_brief:
            self._whole = None
            for place in self.places:
                place.parameter.grad = None
        if self.reduction.is_sharded:
            return start_reduce_scatter(whole, self.group, dtype=self.reduction.dtype)
        return start_all_reduce(whole, self.group)

    def add(self, pending: Pending) -> None:
        """Wait for a sum that `start_reduce` began; it is then in `sum`."""
        mine = pending.wait()
        if self.reduction.is_brief:
            self.sum.add_(mine)
            if mine.is_cuda:  # made on another stream, perhaps, whose next allocation must wait for this read
                mine.record_stream(torch.cuda.current_stream())

    def finish(self) -> None:
        """All of the step is in `sum`: sum it over the other axes along which ranks have a part of it."""
        ties = () if self.traits.tie is None else ("ends",)
        for group in (self.replicas, *map(self._mesh.group, (*self.traits.partial, *ties))):
            all_reduce_(self.sum, group)


def make_buckets(
    parameters: Iterable[ShardedParameter],
    mesh: Mesh,
    *,
    max_elements: int,
    dtype: torch.dtype,
    group_of: Callable[[ShardedParameter], Hashable],
    reduction: Reduction = WHOLE,
) -> tuple[Bucket, ...]:
    """Deal parameters to buckets of at most `max_elements` (a larger parameter gets one of its own).

    Parameters come in reverse order of declaration, as the backward finishes them, and so do buckets by their last.
    """
    groups: dict[Traits, list[list[ShardedParameter]]] = {}
    order: dict[int, int] = {}
    for parameter in reversed(tuple(parameters)):
        order[id(parameter)] = len(order)
        spec = parameter.spec
        group, is_counted = group_of(parameter), is_primary(parameter, mesh)
        traits = Traits(group, is_counted, spec.reduction, spec.partial, spec.tie)
        buckets = groups.setdefault(traits, [[]])
        if buckets[-1] and sum(p.numel() for p in buckets[-1]) + parameter.numel() > max_elements:
            buckets.append([])
        buckets[-1].append(parameter)
    dealt = [(traits, members) for traits, lists in groups.items() for members in lists]
    dealt.sort(key=lambda bucket: order[id(bucket[1][-1])])
    return tuple(
        Bucket(members, traits, mesh=mesh, dtype=dtype, reduction=reduction) for traits, members in dealt
    )
