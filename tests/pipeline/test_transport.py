"""Messages between stages: in order, held until they are taken, and freed then."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megads.parallel.layout import Layout
from megads.parallel.mesh import Group, build_mesh
from megads.pipeline.transport import TensorSpec, Transport
from tests.ranks import run_ranks

SPECS = (TensorSpec((4, 3), torch.float64),)
NUM_MESSAGES = 9  # more than may be in flight


def test_messages_arrive_in_order_though_receives_are_posted_before_them() -> None:
    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(Layout(pipeline=size), rank)
        transport = Transport(mesh.group("pp"), mesh.device)
        if rank == 0:
            time.sleep(0.2)  # the receives are there before the sends
            for number in range(NUM_MESSAGES):
                transport.send((torch.full((4, 3), float(number), dtype=torch.float64),), SPECS, peer=1)
            transport.drain()
            return None
        arrivals = [transport.receive(SPECS, peer=0) for _ in range(NUM_MESSAGES)]
        return [arrival.wait()[0].unique().tolist() for arrival in reversed(arrivals)]

    found = run_ranks(work, 2)[1]
    assert found == [[float(number)] for number in reversed(range(NUM_MESSAGES))]


def test_a_payload_is_held_until_it_is_taken_and_freed_then() -> None:
    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(Layout(pipeline=size), rank)
        transport = Transport(mesh.group("pp"), mesh.device)
        if rank == 1:
            time.sleep(0.2)  # taken late: what was sent must still be there
            return transport.receive(SPECS, peer=0).wait()[0]
        payload = torch.ones(4, 3, dtype=torch.float64)
        storage = StorageWeakRef(payload.untyped_storage())
        transport.send((payload,), SPECS, peer=1)
        del payload
        is_held = not storage.expired()
        transport.drain()
        return is_held, storage.expired()

    sender, received = run_ranks(work, 2)
    assert sender == (True, True)
    assert torch.equal(received, torch.ones(4, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "wrong", [torch.ones(4, 2).double(), torch.ones(4, 3), torch.ones(3, 4).double()], ids=str
)
def test_a_payload_that_the_other_side_does_not_expect_is_not_sent(wrong: torch.Tensor) -> None:
    """gloo would take a shorter message, or one of another dtype, without a word."""
    transport = Transport(Group((0,), 0), torch.device("cpu"))
    with pytest.raises(ValueError, match="where the other side expects"):
        transport.send((wrong,), SPECS, peer=0)
