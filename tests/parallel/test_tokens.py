"""Rows between ranks: shares, deals, and their gradients against the same sums in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megads.parallel.collectives import start_exchange
from megads.parallel.layout import Layout
from megads.parallel.mesh import Group, build_mesh
from megads.parallel.tokens import Shares, deal_rows, fill_up, gather_rows, join_shares, take_share
from tests.ranks import run_ranks


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def on_ranks(size: int, work: Any) -> list[Any]:
    def run(rank: int, world: int) -> Any:
        return work(build_mesh(Layout(tensor=world), rank).group("tp"))

    return run_ranks(run, size)


@pytest.mark.parametrize(
    ("total", "size", "sizes"),
    [(6, 2, [3, 3]), (5, 2, [3, 2]), (5, 4, [2, 2, 1, 0]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0])],
)
def test_shares_are_a_partition_in_order(total: int, size: int, sizes: list[int]) -> None:
    shares = [Shares(total, Group(tuple(range(size)), rank)) for rank in range(size)]
    assert [s.stop - s.start for s in shares] == sizes
    assert [i for s in shares for i in range(s.start, s.stop)] == list(range(total))
    assert all(s.is_even == (len(set(sizes)) == 1) for s in shares)


def test_fill_up_adds_rows_at_the_end() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert fill_up(x, 3) is x
    assert fill_up(x, 4, value=-1).tolist() == [[0, 1], [2, 3], [4, 5], [-1, -1]]
    assert fill_up(torch.arange(2), 3, value=7).tolist() == [0, 1, 7]


@pytest.mark.parametrize("total", [5, 2])
def test_a_share_and_all_of_them(total: int) -> None:
    """y = join(f(take(x))) is f(x), and so are its gradients, on every rank alike."""
    x, flow = draw(total, 3, seed=1), draw(total, 3, seed=2)

    def work(group: Group) -> Any:
        mine, shares = x.clone().requires_grad_(), Shares(total, group)
        share = take_share(mine, shares)
        y = join_shares(share.tanh() * 2, shares)
        y.backward(flow)
        return len(share), y.detach(), mine.grad

    results = on_ranks(4, work)
    assert sum(r[0] for r in results) == total
    whole = x.clone().requires_grad_()
    (whole.tanh() * 2).backward(flow)
    for _, y, gradient in results:
        assert torch.equal(y, x.tanh() * 2)
        assert torch.equal(gradient, whole.grad)


def test_gathered_rows_are_used_by_all() -> None:
    """Each rank multiplies all rows by its own factor; a row's gradient is the sum over ranks."""
    flows = [draw(6, 3, seed=rank) for rank in range(3)]

    def work(group: Group) -> Any:
        mine = draw(2, 3, seed=10 + group.rank).requires_grad_()
        y = gather_rows(mine, group) * (group.rank + 1)
        y.backward(flows[group.rank])
        return y.detach(), mine.grad

    results = on_ranks(3, work)
    rows = torch.cat([draw(2, 3, seed=10 + rank) for rank in range(3)])
    total = sum((rank + 1) * flow for rank, flow in enumerate(flows))
    for rank, (y, gradient) in enumerate(results):
        assert torch.equal(y, rows * (rank + 1))
        assert torch.allclose(gradient, total[2 * rank : 2 * rank + 2], rtol=1e-14)


# rows that rank s sends to rank r; rank 2 gets nothing, rank 1 sends nothing
DEALS = ((1, 2, 0), (0, 0, 0), (3, 1, 0))


def test_rows_are_dealt_and_their_gradients_come_back() -> None:
    def work(group: Group) -> Any:
        send = DEALS[group.rank]
        receive = tuple(DEALS[source][group.rank] for source in range(3))
        mine = draw(sum(send), 2, seed=group.rank).requires_grad_()
        y = deal_rows(mine, group, send=send, receive=receive)
        (y * (group.rank + 1)).sum().backward()
        return y.detach(), mine.grad

    results = on_ranks(3, work)
    sent = [draw(sum(row), 2, seed=rank).split(row) for rank, row in enumerate(DEALS)]
    for rank, (y, gradient) in enumerate(results):
        assert torch.equal(y, torch.cat([sent[source][rank] for source in range(3)]))
        owners = torch.repeat_interleave(torch.arange(1.0, 4.0), torch.tensor(DEALS[rank]))
        assert torch.equal(gradient, owners.double()[:, None].expand(-1, 2))


def test_equal_numbers_need_no_sizes() -> None:
    def work(group: Group) -> Any:
        return start_exchange(10 * group.rank + torch.arange(4), group).wait().tolist()

    assert on_ranks(2, work) == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_a_strided_view_is_refused() -> None:
    def work(group: Group) -> Any:
        with pytest.raises(ValueError, match="contiguous"):
            start_exchange(torch.zeros(4, 4)[:, :2], group)

    on_ranks(2, work)
