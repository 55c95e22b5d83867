"""The vocabulary-parallel loss against torch's cross entropy, with vocabularies that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megads.objective.language import masked_sum, token_losses
from megads.ops.cross_entropy import Columns
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from tests.ranks import run_ranks


@pytest.mark.parametrize(("vocab", "size"), [(53, 1), (53, 2), (5, 4), (3, 4)])
def test_loss_and_gradient_equal_torch(vocab: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(11, vocab, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (11,), generator=generator)
    mask = torch.arange(11) % 3 != 0
    reference = logits.clone().requires_grad_()
    losses = F.cross_entropy(reference, labels, reduction="none")
    torch.where(mask, losses, 0.0).sum().backward()
    share = -(-vocab // size)

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(tensor=size), rank).group("tp")
        columns = Columns(min(rank * share, vocab), max(0, min(share, vocab - rank * share)))
        local = torch.full((11, share), 1e9, dtype=torch.float64)  # padding must not be seen
        local[:, : columns.count] = logits[:, columns.first : columns.first + columns.count]
        local.requires_grad_()
        found = token_losses(local, labels, columns=columns, group=group)
        masked_sum(found, mask).backward()
        return found.detach(), local.grad[:, : columns.count], local.grad[:, columns.count :]

    results = run_ranks(work, size)
    for found, _, padding in results:
        assert torch.allclose(found, losses.detach(), rtol=1e-13, atol=1e-13)
        assert bool((padding == 0).all())
    gradient = torch.cat([part for _, part, _ in results], dim=1)
    assert torch.allclose(gradient, reference.grad, rtol=1e-13, atol=1e-13)
