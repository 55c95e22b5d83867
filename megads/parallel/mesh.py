"""Layout -> process groups, as one value that is passed around, never a global.

A `Mesh` holds this rank's group of every axis. It is built once; groups of equal ranks share one communicator, and a
group of one rank has none, so layers contain no `if tensor > 1` and run in one process without torch.distributed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megads.errors import LayoutError
from megads.parallel.layout import AXES, Layout


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that differ from this one along one axis.

    Args:
        ranks: global ranks, ascending.
        rank: this rank's place among them.
        handle: their communicator; None exactly if the group has one rank.
    """

    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's place in the layout, its device and its groups."""

    layout: Layout
    rank: int
    device: torch.device
    groups: Mapping[str, Group]

    def group(self, axis: str) -> Group:
        """This rank's group along `axis` (one of `layout.AXES`)."""
        return self.groups[axis]

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> number of ranks."""
        return {axis: group.size for axis, group in self.groups.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """Axis -> this rank's place along it."""
        return {axis: group.rank for axis, group in self.groups.items()}


def build_mesh(
    layout: Layout, rank: int, *, device: torch.device | None = None, timeout: float | None = None
) -> Mesh:
    """Build this rank's groups; all ranks call it together, after `bootstrap.connect`.

    Creation synchronises only the members of a group. Every communicator is used once here, so that none is set up, and
    no dead peer is first met, inside a training step.

    Args:
        timeout: seconds after which a collective that somebody did not join fails; None: torch's 10 or 30 minutes.

    Raises:
        LayoutError: the layout is not as large as the world.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout.world_size != world:
        raise LayoutError(
            "the layout does not fit the number of processes",
            found=f"{layout} = {layout.world_size} ranks, {world} processes",
            allowed="as many processes as ranks",
        )
    device = device or torch.device("cpu")
    limit = None if timeout is None else timedelta(seconds=timeout)
    handles: dict[tuple[int, ...], dist.ProcessGroup] = {}
    groups = {}
    for axis in AXES:
        partition = layout.groups(axis)
        ranks = next(members for members in partition if rank in members)
        # torch names a group by its ranks and by how many groups this process has: a rank that is alone on an
        # axis where others are not must create its group too, or later groups with them are never found.
        if max(map(len, partition)) > 1 and ranks not in handles:
            handles[ranks] = dist.new_group(list(ranks), timeout=limit, use_local_synchronization=True)
            dist.all_reduce(torch.zeros(1, device=device), group=handles[ranks])
        groups[axis] = Group(ranks, ranks.index(rank), handles[ranks] if len(ranks) > 1 else None)
    return Mesh(layout, rank, device, groups)


def communicator(group: Group) -> dist.ProcessGroup:
    """The handle of a group; a group of one rank gets one. For a library that does not take a `Group`.

    All ranks call it together, for the same axis. It joins a world of one to itself.
    """
    if group.handle is not None:
        return group.handle
    if not dist.is_initialized():
        dist.init_process_group(store=HashStore(), rank=0, world_size=1)
    handle: dist.ProcessGroup = dist.new_group(list(group.ranks), use_local_synchronization=True)
    return handle
