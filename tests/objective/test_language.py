"""The vocabulary-parallel loss against torch's cross entropy, with vocabularies that do not divide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megads.objective.language import Losses, ObjectiveSpec, token_losses
from megads.ops.cross_entropy import Columns
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from tests.ranks import run_ranks

TOKENS = 11
PLAIN = ObjectiveSpec()
SMOOTH = ObjectiveSpec(label_smoothing=0.1)
Z_LOSS = ObjectiveSpec(z_loss=1e-2)
BOTH = ObjectiveSpec(label_smoothing=0.3, z_loss=1e-3)


def make_inputs(vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(TOKENS, vocab, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocab, (TOKENS,), generator=generator)
    return logits, labels, torch.arange(TOKENS) % 3 != 0


def torchs(logits: torch.Tensor, labels: torch.Tensor, objective: ObjectiveSpec) -> torch.Tensor:
    """What torch calls it: [tokens]."""
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=objective.label_smoothing)
    return losses + objective.z_loss * logits.logsumexp(dim=-1).square()


@pytest.mark.parametrize("objective", [PLAIN, SMOOTH, Z_LOSS, BOTH], ids=str)
@pytest.mark.parametrize(("vocab", "size"), [(53, 1), (53, 2), (5, 4), (3, 4)])
def test_loss_and_gradient_equal_torch(vocab: int, size: int, objective: ObjectiveSpec) -> None:
    logits, labels, mask = make_inputs(vocab)
    reference = logits.clone().requires_grad_()
    losses = torchs(reference, labels, objective)
    torch.where(mask, losses, 0.0).sum().backward()
    plain = F.cross_entropy(logits, labels, reduction="none")
    share = -(-vocab // size)

    def work(rank: int, size: int) -> Any:
        group = build_mesh(Layout(tensor=size), rank).group("tp")
        columns = Columns(min(rank * share, vocab), max(0, min(share, vocab - rank * share)))
        local = torch.full((TOKENS, share), 1e9, dtype=torch.float64)  # padding must not be seen
        local[:, : columns.count] = logits[:, columns.first : columns.first + columns.count]
        local.requires_grad_()
        found = token_losses(local, labels, columns=columns, group=group, weights=objective.weights(vocab))
        sums = found.sum(mask)
        assert sums.plain.requires_grad is objective.is_plain
        sums.trained.backward()
        whole = (found.trained.detach(), found.plain.detach(), sums.plain.detach())
        return *whole, local.grad[:, : columns.count], local.grad[:, columns.count :]

    results = run_ranks(work, size)
    for trained, reported, total, _, padding in results:
        assert torch.allclose(trained, losses.detach(), rtol=1e-13, atol=1e-13)
        assert torch.allclose(reported, plain, rtol=1e-13, atol=1e-13)
        assert torch.allclose(total, plain[mask].sum(), rtol=1e-13, atol=1e-13)
        assert bool((padding == 0).all())
    gradient = torch.cat([part for *_, part, _ in results], dim=1)
    assert torch.allclose(gradient, reference.grad, rtol=1e-13, atol=1e-13)


def test_nemos_smoothing_leaves_the_labels_share_out() -> None:
    """A target of 1 - a on the label and a / (V - 1) on every other id, and not torch's."""
    logits, labels, _ = make_inputs(5)
    target = torch.full((TOKENS, 5), 0.1 / 4, dtype=torch.float64)
    target.scatter_(1, labels[:, None], 0.9)
    group = build_mesh(Layout(), 0).group("tp")

    def trained(objective: ObjectiveSpec) -> torch.Tensor:
        weights = objective.weights(5)
        return token_losses(logits, labels, columns=Columns(0, 5), group=group, weights=weights).trained

    nemo = ObjectiveSpec(label_smoothing=0.1, smoothing_kind="nemo")
    assert torch.allclose(trained(nemo), F.cross_entropy(logits, target, reduction="none"), rtol=1e-13)
    assert not torch.allclose(trained(nemo), trained(SMOOTH), rtol=1e-3)


def test_what_is_reported_is_what_is_trained_on_if_that_is_plain() -> None:
    losses = Losses(plain := torch.ones(2, requires_grad=True), plain)
    sums = losses.sum(torch.tensor([True, False]))
    assert sums.plain is sums.trained
    assert sums.trained.item() == 1.0
