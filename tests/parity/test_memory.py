"""What is recomputed, moved to the host or cut into chunks changes no number, with whatever else it meets."""

from __future__ import annotations

import functools

import pytest

from megads.layers import offload
from tests.parity.harness import Case, Model, Outcome, gradient_error, run_case

MODELS = (Model("gpt"), Model("llama"))  # tied, untied
CASES = (
    (0, Case(micro=4, recompute=("norm", "activation"), loss_chunk=16)),
    (1, Case(tensor=2, micro=4, sequence=True, recompute=("norm", "activation"), loss_chunk=7)),
    (0, Case(pipeline=2, micro=4, schedule="zbv", chunks=2, loss_chunk=16, offload=True)),
    (1, Case(pipeline=2, data=2, micro=2, zero=1, recompute="full", recompute_layers=1, offload=True)),
)
SLOW_CASES = tuple(
    (number, Case(micro=2, recompute=recompute, offload=moves, loss_chunk=chunk, **layout))
    for recompute, moves, chunk in (
        (("norm",), True, None),
        (("activation", "attention"), False, 1000),
        (("norm", "mlp"), True, 9),
        ("full", True, 40),
    )
    for number, layout in (
        (0, {"tensor": 2, "pipeline": 2, "sequence": True, "schedule": "zero_bubble_h2"}),
        (1, {"pipeline": 2, "schedule": "dualpipe_v", "chunks": 2}),
        (0, {"tensor": 2}),
        (1, {"data": 2, "bucket": 3000, "zero": 1}),
    )
)


@functools.cache
def reference(number: int) -> Outcome:
    return run_case(MODELS[number], Case(micro=28), precision="fp64", steps=2)


def check(number: int, case: Case) -> None:
    got, expected = run_case(MODELS[number], case, precision="fp64", steps=2), reference(number)
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    assert got.norms[0] == pytest.approx(expected.norms[0], rel=1e-12)
    errors = gradient_error(got, expected)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= 1e-12, f"{worst}: {errors[worst]:.2e}"


@pytest.fixture(autouse=True)
def small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)


@pytest.mark.parametrize(("number", "case"), CASES, ids=[f"{MODELS[n].family}-{c}" for n, c in CASES])
def test_memory_changes_nothing(number: int, case: Case) -> None:
    check(number, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "case"), SLOW_CASES, ids=[f"{MODELS[n].family}-{c}" for n, c in SLOW_CASES]
)
def test_memory_changes_nothing_in_more_combinations(number: int, case: Case) -> None:
    check(number, case)
