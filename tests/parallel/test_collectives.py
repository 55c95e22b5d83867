"""Collectives on real gloo ranks: sums, their gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megads.errors import LayoutError, RankError
from megads.parallel.collectives import (
    all_reduce_,
    broadcast_,
    copy_to,
    gather_last,
    reduce_from,
    start_all_gather,
    start_reduce_scatter,
    start_shift,
)
from megads.parallel.control import Control
from megads.parallel.layout import AXES, Layout
from megads.parallel.mesh import build_mesh
from tests.ranks import run_ranks


def test_plain_collectives() -> None:
    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(tensor=size), rank).group("tp")
        summed = all_reduce_(torch.full((3,), rank + 1.0), group)
        largest = all_reduce_(torch.full((3,), float(rank)), group, op="max")
        flat = torch.arange(4.0 * size) + rank
        mine = start_reduce_scatter(flat, group).wait().clone()
        gathered = torch.zeros(2 * size)
        gathered[2 * rank : 2 * rank + 2] = rank
        start_all_gather(gathered, group).wait()
        wide = gather_last(torch.full((2, 1), float(rank)), group)
        told = broadcast_(torch.tensor([float(rank)]), group, source=2)
        return [x.tolist() for x in (summed, largest, mine, gathered, wide, told)]

    for rank, (summed, largest, mine, gathered, wide, told) in enumerate(run_ranks(work, 4)):
        assert summed == [10.0] * 3
        assert largest == [3.0] * 3
        assert mine == [4.0 * i + 6 for i in range(4 * rank, 4 * rank + 4)]
        assert gathered == [0, 0, 1, 1, 2, 2, 3, 3]
        assert wide == [[0, 1, 2, 3]] * 2
        assert told == [2.0]


def test_conjugate_pairs_against_one_process() -> None:
    """loss = sum_r f_r(copy(x)); and loss = g(reduce(h_r)): gradients equal those of the plain sums."""

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(tensor=size), rank).group("tp")
        x = torch.tensor([1.0, 2.0], requires_grad=True)
        (copy_to(x, group) * (rank + 1)).sum().backward()
        y = torch.tensor([1.0, 2.0], requires_grad=True)
        (reduce_from(y * (rank + 1), group) ** 2).sum().backward()
        return x.grad.tolist(), y.grad.tolist()

    for rank, (copied, reduced) in enumerate(run_ranks(work, 2)):
        assert copied == [3.0, 3.0]
        assert reduced == [2 * 3.0 * 1 * (rank + 1), 2 * 3.0 * 2 * (rank + 1)]


@pytest.mark.parametrize("size", [2, 3])
def test_a_shift_brings_the_tensor_of_the_rank_before(size: int) -> None:
    """Several at once, one of them answered late: results are told apart by their order."""

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(data=size), rank).group("dp")
        first, second = torch.full((4,), float(rank)), torch.full((2, 2), 10.0 * rank, dtype=torch.float64)
        pending = start_shift(first, group), start_shift(second, group)
        once = pending[0].wait()
        twice = start_shift(once, group).wait()
        with pytest.raises(ValueError, match="contiguous"):
            start_shift(second.expand(3, 2, 2)[:, 0], group)
        return [x.flatten()[0].item() for x in (once, twice, pending[1].wait())]

    for rank, found in enumerate(run_ranks(work, size)):
        before, earlier = (rank - 1) % size, (rank - 2) % size
        assert found == [before, earlier, 10.0 * before]


def test_strided_memory_is_refused() -> None:
    """gloo would reduce the wrong elements of a strided view without a word."""

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(tensor=size), rank).group("tp")
        with pytest.raises(ValueError, match="contiguous"):
            all_reduce_(torch.ones(4, 4)[:, :2], group)

    run_ranks(work, 2)


def test_a_group_of_one_is_the_identity_without_torch_distributed() -> None:
    mesh = build_mesh(Layout(), 0)
    x = torch.ones(3)
    for axis in AXES:
        group = mesh.group(axis)
        assert group.handle is None
        assert all_reduce_(x, group) is x
        assert start_reduce_scatter(x, group).wait().tolist() == [1, 1, 1]
        assert copy_to(x, group) is x
        assert reduce_from(x, group) is x
        assert gather_last(x, group) is x
        assert start_shift(x, group).wait() is x


def test_every_layout_of_eight_ranks_builds_its_groups() -> None:
    """Twice in one process: group names hang on how many groups a process made before."""
    layouts = [Layout(pipeline=4, data=2), Layout(tensor=2, pipeline=4), Layout(tensor=2, data=2, pipeline=2)]
    layouts += [
        Layout(pipeline=8),
        Layout(data=8, expert=4),
        Layout(context=2, data=4),
        Layout(pipeline=4, data=2),
    ]

    def work(rank: int, size: int) -> Any:
        for layout in layouts:
            mesh = build_mesh(layout, rank)
            for axis in AXES:
                total = all_reduce_(torch.tensor([float(rank)]), mesh.group(axis))
                assert total.item() == sum(mesh.group(axis).ranks)
        return len({group.handle for group in mesh.groups.values()})

    assert max(run_ranks(work, 8)) <= 14


def test_layout_and_world_must_agree() -> None:
    with pytest.raises(LayoutError, match="1 processes"):
        build_mesh(Layout(tensor=2), 0)


def test_control_messages() -> None:
    def work(rank: int, size: int) -> Any:
        control = Control(rank, size, torch.distributed.new_group(backend="gloo"))
        everybody = control.all_gather({"rank": rank, "text": "ü" * rank})
        told = control.broadcast(["from", rank])
        control.agree(None)
        with pytest.raises(RankError, match="rank 1: disk is full"):
            control.agree("disk is full" if rank == 1 else None)
        return everybody, told, control.gather(rank)

    results = run_ranks(work, 3)
    for rank, (everybody, told, gathered) in enumerate(results):
        assert everybody == [{"rank": r, "text": "ü" * r} for r in range(3)]
        assert told == ["from", 0]
        assert gathered == ([0, 1, 2] if rank == 0 else None)


def test_control_alone_is_the_identity() -> None:
    control = Control(0, 1)
    assert control.all_gather({"a": 1}) == [{"a": 1}]
    assert control.broadcast(2) == 2
    control.barrier()
    with pytest.raises(RankError, match="rank 0: no"):
        control.agree("no")


def test_a_failing_rank_is_told_by_the_fork_launcher() -> None:
    def work(rank: int, size: int) -> None:
        if rank == 1:
            raise RuntimeError("rank one had enough")
        torch.distributed.barrier()

    with pytest.raises(AssertionError, match="rank one had enough"):
        run_ranks(work, 2, timeout=20)
