"""Promise 1 with multi-token prediction: two depths behind the head change with no layout, schedule or cut.

The embedding is used three times and the head three times, on one rank or on two; masks are unequal, documents end where
they like, and 53 ids and 7 micro-batches divide by nothing.
"""

from __future__ import annotations

import functools

import pytest

from megads.pipeline.schedules import SCHEDULES
from tests.parity.harness import Case, Model, Outcome, gradient_error, run_case
from tests.parity.test_layouts import check_against

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
    ("experts", Case(tensor=2, pipeline=2, expert=2, expert_tensor=1, micro=7, sequence=True, recompute="full")),
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
