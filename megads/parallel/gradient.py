"""Gradient buckets: flat memory for the weights and gradients of parameters that are reduced and updated alike.

Every parameter is a view of its bucket's flat values and its `.grad` a view of the flat gradients, so autograd
accumulates in place (in float32 also for low-precision weights), one collective reduces many parameters, and a shard
of the bucket is a plain slice:

    flat    | layers.1.mlp.down.weight | layers.1.mlp.up.weight | ... | pad |
    shards  |      rank 0        |       rank 1       |      rank 2         |

Buckets are filled in reverse order of declaration, as the backward finishes them: in the last backward of a step each
is reduced as soon as its parameters are complete, while the backward goes on (`Reducer`). Parameters share a bucket
only if they agree in everything that the optimizer and the norm ask (`Traits`), so a whole bucket decays or does not,
counts or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megads.parallel.collectives import Pending, all_reduce_, start_all_reduce, start_reduce_scatter
from megads.parallel.mesh import Group, Mesh
from megads.parallel.parameter import ShardedParameter, is_primary


@dataclass(frozen=True, slots=True)
class Traits:
    """What all parameters of a bucket have in common."""

    decay: bool
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

    Attributes:
        traits: what its parameters agree in.
        places: its parameters and their offsets.
        initial: flat, the values as they came; drop it when it was read.
        values, gradients: flat, padded to a multiple of the group size; parameters and their `.grad` are views.
    """

    def __init__(
        self, parameters: Sequence[ShardedParameter], traits: Traits, *, mesh: Mesh, dtype: torch.dtype
    ) -> None:
        self.traits = traits
        self.group: Group = mesh.group(traits.reduction)
        self._mesh = mesh
        places, size = [], 0
        for parameter in parameters:
            places.append(Place(parameter, size))
            size += parameter.numel()
        self.places = tuple(places)
        padded = -(-size // self.group.size) * self.group.size
        first = parameters[0]
        self.initial: Tensor | None = torch.zeros(padded, dtype=first.dtype, device=first.device)
        for place in self.places:
            self._part(self.initial, place).copy_(place.parameter.data)
        self.gradients = torch.zeros_like(self.initial)
        self.values = self.initial.to(dtype, copy=True)
        for place in self.places:
            parameter = place.parameter
            parameter.data = self._part(self.values, place)
            parameter.grad_dtype = self.gradients.dtype
            parameter.grad = self._part(self.gradients, place)

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

    def start_reduce(self, *, sharded: bool) -> Pending:
        """Begin to sum the gradients over the data-parallel ranks (of the experts' grid, if they lie in it).

        Args:
            sharded: whether only this rank's slice is needed (ZeRO); the rest of `gradients` is then garbage.
        """
        for axis in self.traits.partial:
            all_reduce_(self.gradients, self._mesh.group(axis))
        start = start_reduce_scatter if sharded else start_all_reduce
        return start(self.gradients, self.group)

    def finish_reduce(self, pending: Pending) -> None:
        """Wait for the sum; tied parameters are then summed over the stages that hold a copy."""
        mine = pending.wait()
        if self.traits.tie is not None:
            all_reduce_(mine, self._mesh.group("ends"))


class Reducer:
    """Reduces the buckets of one stage, each as soon as its gradients are complete.

    `arm` is called before what completes the stage's gradients in a step (its last B, or its last W), `flush` after it.
    Buckets start in their fixed order, so that all ranks issue the same collectives in the same order; what was not
    complete until then (a parameter without gradient, a tied one that another stage completes) starts in `flush` or
    `finish`.
    """

    def __init__(self, buckets: Sequence[Bucket], *, sharded: bool) -> None:
        self._sharded = sharded
        self._early = [b for b in buckets if b.traits.tie is None and not b.traits.partial]
        self._late = [b for b in buckets if b.traits.tie is None and b.traits.partial]
        self._tied = [b for b in buckets if b.traits.tie is not None]
        self._left: dict[int, int] = {}
        self._pending: list[tuple[Bucket, Pending]] = []
        self._next = 0
        self.num_early = 0  # buckets that started before the backward was over, in the last step
        self._number_of: dict[int, int] = {}
        for number, bucket in enumerate(self._early):
            for place in bucket.places:
                self._number_of[id(place.parameter)] = number
                place.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._complete, number)
                )

    def arm(self, *, waiting: Sequence[Tensor] | None = None) -> None:
        """What comes next completes the gradients of the stage.

        Args:
            waiting: parameters that are told to `complete`, all others being complete: a split backward's last W, in
                which no hook is called (autograd called them all in I, whether or not there was a gradient). None: a
                whole backward, which calls the hook of each parameter after its gradient is there.
        """
        wanted = None if waiting is None else {id(parameter) for parameter in waiting}
        self._left = {
            number: sum(wanted is None or id(place.parameter) in wanted for place in bucket.places)
            for number, bucket in enumerate(self._early)
        }
        self._next = 0
        self._advance()

    def complete(self, parameter: Tensor) -> None:
        """One of the parameters that were waiting has its gradient; any other is none of this stage's early ones."""
        number = self._number_of.get(id(parameter))
        if number is not None:
            self._complete(number, parameter)

    def _complete(self, number: int, _: Tensor) -> None:
        """One parameter of a bucket has its gradient."""
        if not self._left:
            return
        self._left[number] -= 1
        self._advance()

    def _advance(self) -> None:
        """Start the buckets that are complete and whose turn it is."""
        while self._next < len(self._early) and self._left[self._next] == 0:
            self._start(self._early[self._next])
            self._next += 1

    def _start(self, bucket: Bucket) -> None:
        self._pending.append((bucket, bucket.start_reduce(sharded=self._sharded)))

    def flush(self) -> None:
        """The stage's gradients are complete: start what has not started."""
        self.num_early = self._next
        for bucket in (*self._early[self._next :], *self._late):
            self._start(bucket)
        self._left, self._next = {}, 0

    def finish(self) -> None:
        """Every stage of this rank is complete: reduce tied parameters and wait for all."""
        for bucket in self._tied:
            self._start(bucket)
        for bucket, pending in self._pending:
            bucket.finish_reduce(pending)
        self._pending = []


def make_buckets(
    parameters: Iterable[ShardedParameter], mesh: Mesh, *, max_elements: int, dtype: torch.dtype
) -> tuple[Bucket, ...]:
    """Deal parameters to buckets of at most `max_elements` (a larger parameter gets one of its own)."""
    groups: dict[Traits, list[list[ShardedParameter]]] = {}
    for parameter in reversed(tuple(parameters)):
        spec = parameter.spec
        traits = Traits(spec.decay, is_primary(parameter, mesh), spec.reduction, spec.partial, spec.tie)
        buckets = groups.setdefault(traits, [[]])
        if buckets[-1] and sum(p.numel() for p in buckets[-1]) + parameter.numel() > max_elements:
            buckets.append([])
        buckets[-1].append(parameter)
    return tuple(
        Bucket(members, traits, mesh=mesh, dtype=dtype)
        for traits, lists in groups.items()
        for members in lists
    )
