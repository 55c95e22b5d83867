"""Point-to-point transfers between the ranks of one pipeline.

Both ends know shape and dtype beforehand, so no header travels; what is sent is checked against them, because gloo
takes a message of another dtype, or a shorter one, without a word. Receives are posted early and waited for where the
value is used. A send is held until the other side has taken it: dropping the work object would lose the message,
touching the tensor would change it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megads.parallel.mesh import Group

MAX_SENDS_IN_FLIGHT = 4


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of one tensor of a payload."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Arrival:
    """A receive that was posted; `wait` gives the tensors."""

    def __init__(self, tensors: tuple[Tensor, ...], works: tuple[dist.Work, ...]) -> None:
        self._tensors = tensors
        self._works = works

    def wait(self) -> tuple[Tensor, ...]:
        """The received tensors; returns when they are there."""
        for work in self._works:
            work.wait()
        return self._tensors


class Transport:
    """Sends and receives over the pipeline group; peers are ranks in that group.

    Messages of one pair and direction are matched by their order, which `lower` makes equal on both sides. Waiting for
    an old send is safe there: the order can be run even if every send waits for its receive.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self.device = device
        self._sends: deque[tuple[Tensor, dist.Work]] = deque()

    def send(self, tensors: tuple[Tensor, ...], specs: tuple[TensorSpec, ...], *, peer: int) -> None:
        """Start sending; the tensors belong to the transport from now on.

        Raises:
            ValueError: they are not what `specs` tells the other side to expect.
        """
        if tuple(TensorSpec(tuple(t.shape), t.dtype) for t in tensors) != specs:
            found = [(tuple(t.shape), t.dtype) for t in tensors]
            raise ValueError(f"a payload of {found} where the other side expects {list(specs)}")
        for tensor in tensors:
            tensor = tensor.contiguous()
            work = dist.isend(tensor, self._group.ranks[peer], group=self._group.handle)
            assert work is not None  # both ranks are in the group by construction
            self._sends.append((tensor, work))
        while len(self._sends) > MAX_SENDS_IN_FLIGHT:
            self._sends.popleft()[1].wait()

    def receive(self, specs: tuple[TensorSpec, ...], *, peer: int) -> Arrival:
        """Post receives for tensors of these shapes."""
        tensors = tuple(torch.empty(s.shape, dtype=s.dtype, device=self.device) for s in specs)
        works = []
        for tensor in tensors:
            work = dist.irecv(tensor, self._group.ranks[peer], group=self._group.handle)
            assert work is not None
            works.append(work)
        return Arrival(tensors, tuple(works))

    def drain(self) -> None:
        """Return when every send was taken."""
        while self._sends:
            self._sends.popleft()[1].wait()
