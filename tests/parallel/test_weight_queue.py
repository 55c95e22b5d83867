"""Weight-gradient work runs at once or when its W comes, in order, and says when a parameter is complete."""

from __future__ import annotations

import weakref

import pytest
import torch

from megads.parallel.weight_queue import WeightQueue, gradient_of


def test_outside_a_split_backward_work_runs_at_once() -> None:
    queue, ran = WeightQueue(), []
    weight = torch.nn.Parameter(torch.ones(2))
    queue.put(lambda: ran.append(torch.is_grad_enabled()), weight)
    assert ran == [False]
    assert queue.num_kept == 0
    assert not queue.is_deferring


def test_kept_work_runs_in_the_order_of_its_backward_and_is_told() -> None:
    queue, ran = WeightQueue(), []
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with queue.deferring(3, 0):
        assert queue.is_deferring
        queue.put(lambda: ran.append("a1"), a)
        queue.put(lambda: ran.append("b"), b)
        queue.put(lambda: ran.append("a2"), a)
    with queue.deferring(3, 1):
        queue.put(lambda: ran.append("later"), b)
    assert ran == []
    assert queue.num_kept == 4
    assert [id(w) for w in queue.waiting(3, 0)] == [id(a), id(b)]
    queue.run(3, 0, done=lambda weight: ran.append("a done" if weight is a else "b done"))
    assert ran == ["a1", "b", "b done", "a2", "a done"]
    queue.run(3, 0)  # nothing is left of it
    assert ran[-1] == "a done"
    queue.run(3, 1)
    assert ran[-1] == "later"
    assert queue.num_kept == 0


def test_an_error_in_a_backward_does_not_keep_the_queue_open() -> None:
    queue = WeightQueue()
    with pytest.raises(RuntimeError, match="on purpose"), queue.deferring(0, 0):
        raise RuntimeError("on purpose")
    assert not queue.is_deferring


def test_what_work_holds_is_freed_when_it_is_done() -> None:
    queue = WeightQueue()
    weight = torch.nn.Parameter(torch.ones(2))
    alive = []
    held = [torch.ones(2), torch.ones(2)]
    references = [weakref.ref(t) for t in held]
    with queue.deferring(0, 0):
        for tensor in held:
            queue.put(
                lambda t=tensor: alive.append(sum(r() is not None for r in references)) or t.sum(), weight
            )
    del held, tensor
    queue.run(0, 0)
    assert alive == [2, 1]


def test_a_gradient_is_made_once() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    gradient_of(weight).add_(1.0)
    gradient_of(weight).add_(1.0)
    assert torch.equal(gradient_of(weight), torch.tensor([2.0, 2.0]))
