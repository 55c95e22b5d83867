"""Promise 1 with multi-token prediction: two depths behind the head change with no layout, schedule or cut.

The embedding is used three times and the head three times, on one rank or on two; masks are unequal, documents end
where they like, and 53 ids and 7 micro-batches divide by nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from megads.assemble.wiring import build_executors
from megads.data.sequence import Batch
from megads.model import mtp
from megads.model.spec import TIED_NAME
from megads.parallel import gradient
from megads.parallel.collectives import all_reduce_
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh
from megads.pipeline.executor import global_sum
from megads.pipeline.schedules import SCHEDULES
from megads.verify.batch import synthetic_batch
from megads.verify.measure import Trainee
from tests.parity.harness import Case, Model, Outcome, gradient_error, make_config, run_case
from tests.parity.test_layouts import check_against
from tests.ranks import run_ranks

SEQ = 12
DEPTHS = {"mtp_layers": 2, "mtp_weight": 0.7}
EXPERTS = {
    "experts": 4,
    "experts_per_token": 2,
    "expert_ffn": 12,
    "shared_experts": 1,
    "dense_layers": 1,
    "init_std": 0.1,
    "balance": "sequence",
    "balance_weight": 0.1,
    "z_loss": 0.01,
}
MODELS = {
    "untied": Model("llama", layers=2, seq=SEQ, documents=True, overrides=DEPTHS),
    "tied": Model("llama", layers=2, seq=SEQ, tied=True, overrides=DEPTHS),
    "gpt": Model("gpt", layers=2, seq=SEQ, dropout=0.1, overrides=DEPTHS),
    "experts": Model("llama", layers=2, seq=SEQ, documents=True, overrides=DEPTHS | EXPERTS),
}
CASES = (
    ("untied", Case(micro=4)),
    ("tied", Case(tensor=2, micro=7)),
    ("gpt", Case(tensor=2, micro=7, sequence=True, recompute="full")),
    ("untied", Case(tensor=2, micro=7, sequence=True, recompute=("norm", "activation"), loss_chunk=7)),
    ("untied", Case(context=2, micro=7)),
    ("tied", Case(context=2, tensor=2, micro=7, sequence=True, context_kind="ulysses")),
    ("gpt", Case(pipeline=2, data=2, micro=7, zero=1)),
    ("untied", Case(pipeline=4, micro=7, zero=1, offload=True)),
    ("experts", Case(data=2, expert=2, micro=7, zero=1)),
    (
        "experts",
        Case(tensor=2, pipeline=2, expert=2, expert_tensor=1, micro=7, sequence=True, recompute="full"),
    ),
    ("experts", Case(context=2, pipeline=2, expert=2, micro=7, schedule="zbv", chunks=2)),
)
SCHEDULED = tuple(name for name in SCHEDULES if name != "dualpipe")
MORE = tuple(
    (model, Case(pipeline=2, micro=4, schedule=name, chunks=SCHEDULES[name].num_chunks or 2, **more))
    for model in MODELS
    for name in SCHEDULED
    for more in ({}, {"tensor": 2, "sequence": True, "zero": 1}, {"context": 2, "recompute": "full"})
)


@functools.cache
def reference(name: str) -> Outcome:
    return run_case(MODELS[name], Case(micro=28), precision="fp64", steps=2)


def check(name: str, case: Case) -> None:
    got = run_case(MODELS[name], case, precision="fp64", steps=2)
    check_against(reference(name), got, loss_bound=1e-12, gradient_bound=1e-12)


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_layout_changes_nothing(name: str, case: Case) -> None:
    check(name, case)


@pytest.mark.parametrize("schedule", SCHEDULED)
def test_schedule_changes_nothing(schedule: str) -> None:
    """The models in turn; under a V the embedding and its copy are one parameter."""
    name = list(MODELS)[SCHEDULED.index(schedule) % len(MODELS)]
    check(name, Case(pipeline=2, micro=4, schedule=schedule, chunks=SCHEDULES[schedule].num_chunks or 2))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), MORE, ids=[f"{name}-{case}" for name, case in MORE])
def test_every_schedule_of_every_model(name: str, case: Case) -> None:
    check(name, case)


def _shift_of_the_part(mesh: Mesh) -> None:
    """Each context-parallel rank looks ahead in the columns that it has."""
    part = Batch.context_part

    def local(batch: Batch, rank: int, size: int) -> Batch:
        cut = part(batch, rank, size)
        return cut.look_ahead(torch.zeros_like(cut.tokens), depth=2) if size > 1 else cut

    Batch.context_part = local  # type: ignore[method-assign]


def _shift_over_documents(mesh: Mesh) -> None:
    look = Batch.look_ahead
    Batch.look_ahead = lambda batch, parts, *, depth: look(batch, 0 * parts, depth=depth)  # type: ignore[method-assign,misc,assignment]


def _mean_of_each_micro_batch(mesh: Mesh) -> None:
    """A depth's loss is divided by the labels that count for it here, not by the number that all ranks agree on."""
    extra = mtp.Extra

    def local(name: str, total: torch.Tensor, count: torch.Tensor) -> object:
        return extra(name, 20.0 * total / count.clamp_min(1), count)

    mtp.Extra = local  # type: ignore[assignment,misc]


def _copies_part(mesh: Mesh) -> None:
    """Nobody sums the gradients of the embedding over the stages that hold a copy."""
    gradient.all_reduce_ = lambda tensor, group, **_: (  # type: ignore[assignment]
        tensor if group.ranks == mesh.group("ends").ranks else all_reduce_(tensor, group)
    )


MUTATIONS = (
    ("untied", Case(context=2, micro=14), _shift_of_the_part),
    ("untied", Case(micro=14), _shift_over_documents),
    ("untied", Case(micro=14), _mean_of_each_micro_batch),
    ("untied", Case(pipeline=2, micro=14), _copies_part),
)


@pytest.mark.parametrize(
    ("name", "case", "mutation"), MUTATIONS, ids=[mutation.__name__ for _, _, mutation in MUTATIONS]
)
def test_a_fault_is_seen(name: str, case: Case, mutation: Callable[[Mesh], None]) -> None:
    try:
        got = run_case(MODELS[name], case, precision="fp64", steps=1, before=mutation)
    except AssertionError as error:
        assert "ranks disagree" in str(error)
    else:
        assert max(gradient_error(got, reference(name)).values()) > 1e-3


def copies(rank: int, size: int, *, name: str) -> list[torch.Tensor]:
    """This rank's share of the word embedding, of the stages that have one, after three steps."""
    config = make_config(MODELS["untied"], Case(pipeline=2, data=2, zero=1, micro=7), precision="fp32")
    config = replace(config, optim=replace(config.optim, name=name))
    trainee = Trainee.build(config, Control(rank, size, torch.distributed.group.WORLD))
    for step in (1, 2, 3):
        trainee.step(step)
    return [piece.tensor.clone() for piece in trainee.engine.targets() if piece.name == f"model/{TIED_NAME}"]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_copies_are_updated_alike(name: str) -> None:
    """Silent bug 6: the copy on the last stage has another name, and went to another optimizer."""
    found = run_ranks(functools.partial(copies, name=name), 4)
    for first, last in zip(found[:2], found[2:], strict=True):  # two data-parallel ranks of two stages
        assert sum(part.numel() for part in first) > 0
        assert all(torch.equal(a, b) for a, b in zip(first, last, strict=True))


def test_what_is_reported_is_of_the_whole_batch() -> None:
    """The mean over depths of sums divided by the labels of the main loss, on every rank; evaluation leaves it out."""

    def work(rank: int, size: int) -> tuple[float, float, float]:
        case = Case(context=2, pipeline=2, micro=7) if size > 1 else Case(micro=28)
        config = make_config(MODELS["experts"], case, precision="fp64")
        world = torch.distributed.group.WORLD if size > 1 else None
        trainee = Trainee.build(config, Control(rank, size, world))
        loss = mean_loss(trainee)
        result = trainee.step(1)
        assert loss == pytest.approx(result.loss.item(), rel=1e-12)
        return result.loss.item(), result.extras["mtp_loss"].item(), result.extras["balance_loss"].item()

    (alone,) = run_ranks(work, 1)
    assert 2.0 < alone[1] < 5.0
    for found in run_ranks(work, 4):
        assert found == pytest.approx(alone, rel=1e-12)


def mean_loss(trainee: Trainee) -> float:
    """As evaluation computes it, on a batch that nobody looked ahead in."""
    config, mesh = trainee.config, trainee.mesh
    batch = replace(synthetic_batch(config, 1), ahead=None)
    context = mesh.group("cp")
    cut = batch.context_part(context.rank, context.size)
    trainee.model.eval()
    with torch.no_grad():
        totals = build_executors(config, trainee.model, mesh=mesh).evaluate.run(cut)
        loss = global_sum(totals, "loss", mesh=mesh) / batch.mask.sum()
    assert "mtp_loss" not in totals
    trainee.model.train()
    return loss.item()
