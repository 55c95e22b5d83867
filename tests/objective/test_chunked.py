"""Head and loss in chunks: torch's loss and gradients in float64, and never the logits of more than a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megads.data.sequence import Batch
from megads.objective.chunked import Head, chunked_loss
from megads.objective.language import ObjectiveSpec
from megads.ops.cross_entropy import Columns
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.weight_queue import WeightQueue
from tests.ranks import run_ranks

SEQ, ROWS, HIDDEN, VOCAB = 12, 2, 5, 11
TOKENS = SEQ * ROWS
SEED = 0.03
PLAIN = ObjectiveSpec()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator)
    return Batch(
        tokens=labels,
        labels=labels,
        mask=torch.rand(ROWS, SEQ, generator=generator) < 0.6,
        positions=torch.arange(SEQ).expand(ROWS, SEQ),
        document_ids=None,
        samples=torch.arange(ROWS),
        step=1,
    )


def make_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(SEQ, ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype)


def reference(objective: ObjectiveSpec = PLAIN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """torch's sum of losses and its gradients, times SEED."""
    hidden, weight = (t.requires_grad_() for t in make_inputs(torch.float64))
    batch = make_batch()
    logits = F.linear(hidden, weight).transpose(0, 1).flatten(0, 1)
    losses = F.cross_entropy(
        logits, batch.labels.flatten(), reduction="none", label_smoothing=objective.label_smoothing
    )
    losses = losses + objective.z_loss * logits.logsumexp(dim=-1).square()
    total = losses[batch.mask.flatten()].sum()
    return total.detach(), *torch.autograd.grad(SEED * total, (hidden, weight))


def close(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    return bool((found.double() - wanted).norm() <= bound * wanted.norm())


@pytest.mark.parametrize("objective", [PLAIN, ObjectiveSpec(label_smoothing=0.2, z_loss=1e-2)], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 1000])
@pytest.mark.parametrize(("size", "is_cut"), [(1, False), (2, False), (2, True), (4, True)])
def test_loss_and_gradients_are_torchs(size: int, is_cut: bool, chunk: int, objective: ObjectiveSpec) -> None:
    plain, *_ = reference()
    total, d_hidden, d_weight = reference(objective)
    share = -(-VOCAB // size)

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(tensor=size), rank).group("tp")
        hidden, weight = make_inputs(torch.float64)
        columns = Columns(min(rank * share, VOCAB), max(0, min(share, VOCAB - rank * share)))
        local = torch.zeros(share, HIDDEN, dtype=torch.float64)
        local[: columns.count] = weight[columns.first : columns.first + columns.count]
        parameter = torch.nn.Parameter(local)
        mine = hidden.chunk(size)[rank].clone() if is_cut else hidden.clone()
        mine.requires_grad_()
        queue = WeightQueue()
        head = Head(
            parameter,
            columns,
            group,
            is_sequence_parallel=is_cut,
            queue=queue,
            chunk=chunk,
            weights=objective.weights(VOCAB),
        )
        losses = chunked_loss(mine, make_batch(), head=head)
        assert (losses.plain is losses.trained) is objective.is_plain
        with queue.deferring(0, 0):
            losses.trained.backward(torch.tensor(SEED, dtype=torch.float64))
        assert parameter.grad is not None
        early = bool(parameter.grad.any())
        queue.run(0, 0)
        sums = torch.stack((losses.trained, losses.plain)).detach()
        return sums, mine.grad, parameter.grad[: columns.count], early

    results = run_ranks(work, size)
    for sums, gradient, _, early in results:
        assert close(sums, torch.stack((total, plain)), 1e-13)
        assert not early  # the weight's gradient waits for W
        if not is_cut:
            assert close(gradient, d_hidden, 1e-13)
    if is_cut:
        assert close(torch.cat([r[1] for r in results]), d_hidden, 1e-13)
    assert close(torch.cat([r[2] for r in results]), d_weight, 1e-13)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self.found[made.dtype] = max(self.found.get(made.dtype, 0), made.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_chunk_alone_exist(dtype: torch.dtype) -> None:
    hidden, weight = make_inputs(dtype)
    parameter = torch.nn.Parameter(weight)
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros(weight.shape)
    group = build_mesh(Layout(), 0).group("tp")
    head = Head(parameter, Columns(0, VOCAB), group, is_sequence_parallel=False, queue=WeightQueue(), chunk=6)
    with Largest() as mode:
        loss = chunked_loss(hidden.requires_grad_(), make_batch(), head=head).trained
        loss.backward()
    assert max(mode.found.values()) == TOKENS * HIDDEN  # hidden states; logits would be TOKENS x VOCAB
    total, d_hidden, d_weight = reference()
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert close(loss.detach(), total, bound)
    assert hidden.grad is not None
    assert close(SEED * hidden.grad, d_hidden, bound)
    assert close(SEED * parameter.grad, d_weight, bound)


def test_evaluation_makes_no_gradient() -> None:
    hidden, weight = make_inputs(torch.float64)
    group = build_mesh(Layout(), 0).group("tp")
    parameter = torch.nn.Parameter(weight)
    head = Head(parameter, Columns(0, VOCAB), group, is_sequence_parallel=False, queue=WeightQueue(), chunk=6)
    with torch.no_grad():
        loss = chunked_loss(hidden, make_batch(), head=head).plain
    assert close(loss, reference()[0], 1e-13)
    assert parameter.grad is None
