"""Label smoothing, z-loss and clipping: torch's loss, gradients and norm in float64 under every kind of layout.

The truth is no run of megads' own step: logits of the model in one process, and torch from there on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megads.assemble.wiring import build_model
from megads.config.root import Config
from megads.model.decoder import HeadBlock
from megads.objective.language import ObjectiveSpec
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import stored_name
from tests.parity.harness import (
    VOCAB,
    Case,
    Model,
    make_batch,
    make_config,
    run_case,
)

SEQ = 16
SMOOTH = {"label_smoothing": 0.1, "z_loss": 1e-2}
NEMO = {"label_smoothing": 0.3, "label_smoothing_kind": "nemo"}
MODELS = {
    "smooth": Model("llama", layers=2, seq=SEQ, documents=True, optim=SMOOTH),
    "nemo": Model("gpt", layers=2, seq=SEQ, optim=NEMO),
}
CASES = (
    ("smooth", Case(tensor=4, context=2, micro=7)),
    ("smooth", Case(tensor=4, context=2, micro=7, sequence=True, loss_chunk=5)),
    ("smooth", Case(pipeline=2, data=2, micro=2, zero=1, schedule="zero_bubble_h1")),
    ("nemo", Case(tensor=2, context=2, micro=7, context_kind="all_gather", loss_chunk=9)),
)


@dataclass(frozen=True)
class Truth:
    """Of one step: plain loss, trained loss, gradients by name, their norm before clipping."""

    plain: float
    trained: float
    gradients: dict[str, Tensor]
    norm: float


def torchs_loss(logits: Tensor, labels: Tensor, objective: ObjectiveSpec) -> Tensor:
    """[tokens] by torch's cross entropy; NeMo's smoothing as probabilities of all ids."""
    z_loss = objective.z_loss * logits.logsumexp(dim=-1).square()
    share = objective.label_smoothing
    if objective.smoothing_kind == "torch":
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=share) + z_loss
    target = torch.full_like(logits, share / (logits.shape[1] - 1)).detach()
    target.scatter_(1, labels[:, None], 1.0 - share)
    return F.cross_entropy(logits, target, reduction="none") + z_loss


@functools.cache
def truth(name: str) -> Truth:
    config: Config = make_config(MODELS[name], Case(), precision="fp64")
    model = build_model(config, build_mesh(Layout(), 0), vocab=VOCAB)
    batch = make_batch(1, seq=SEQ, documents=MODELS[name].documents)
    *blocks, head = model.stages[0]
    payload: tuple[Tensor, ...] = ()
    for block in blocks:
        payload = block(payload, batch).payload
    assert isinstance(head, HeadBlock)
    logits = head.logits(payload).flatten(0, 1)
    labels, mask = batch.labels.flatten(), batch.mask.flatten()
    trained = torchs_loss(logits, labels, model.spec.objective)[mask].mean()
    trained.backward()
    gradients = {stored_name(p): p.grad for p in model.parameters if p.grad is not None}
    plain = F.cross_entropy(logits[mask], labels[mask])
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    return Truth(plain.item(), trained.item(), gradients, norm.item())


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{n}-{c}" for n, c in CASES])
def test_objective_is_torchs(name: str, case: Case) -> None:
    expected = truth(name)
    got = run_case(MODELS[name], case, precision="fp64", steps=1)
    assert got.losses == pytest.approx([expected.plain], rel=1e-12)  # what is reported stays the plain one
    assert got.norms == pytest.approx([expected.norm], rel=1e-12)
    assert got.gradients.keys() == expected.gradients.keys()
    for parameter, gradient in got.gradients.items():
        wanted = expected.gradients[parameter]
        error = (gradient - wanted).norm() / max(wanted.norm().item(), 1e-4 * expected.norm)
        assert error <= 1e-12, f"{parameter}: {error:.2e}"
