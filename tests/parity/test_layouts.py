"""Promise 1: the layout changes nothing. Every kind of layout against one float64 process, gradient by gradient.

Where settings meet is `test_covering.py`'s matter; that mistakes are seen, `tests/verify/test_mutations.py`'s.
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests.parity.harness import Case, Model, Outcome, gradient_error, run_case

CASES = (
    Case(micro=4),
    Case(tensor=2, micro=4),
    Case(tensor=4, micro=7),
    Case(data=2, micro=2),
    Case(data=4, micro=7, zero=1),
    Case(data=2, zero=1, micro=7, bucket=3000),
    Case(pipeline=2, micro=4),
    Case(pipeline=2, micro=4, schedule="gpipe"),
    Case(pipeline=4, micro=7),
    Case(pipeline=4, micro=4, schedule="gpipe"),
    Case(pipeline=5, micro=4),
    Case(tensor=2, pipeline=2, micro=4),
    Case(tensor=2, data=2, zero=1, micro=2),
    Case(pipeline=2, data=2, micro=2, zero=1),
    Case(tensor=2, pipeline=2, data=2, micro=2, zero=1),
    Case(tensor=4, pipeline=2, micro=4),
    Case(tensor=2, micro=4, sequence=True),
    Case(tensor=2, pipeline=2, micro=4, sequence=True, recompute="full"),
    Case(tensor=2, data=2, micro=2, sequence=True, zero=1, recompute=("attention", "mlp")),
    Case(data=2, micro=2, zero=1, bucket=3000, recompute=("mlp",)),
    Case(pipeline=2, micro=4, schedule="interleaved", chunks=2),
    Case(tensor=2, pipeline=2, micro=4, schedule="interleaved", chunks=2, sequence=True),
)
MODELS = (Model("gpt"), Model("llama"))  # tied, untied
OTHER_MODELS = (
    Model("gpt", tied=False, dropout=0.1, layers=2),
    Model("llama", tied=True, dropout=0.1, layers=2),
)
OTHER_CASES = (
    Case(tensor=2, pipeline=2, micro=4, zero=1),
    Case(data=2, micro=2, recompute=("attention", "mlp")),
    Case(tensor=4, micro=7),
    Case(tensor=2, micro=4, sequence=True, recompute="full"),
)


@functools.cache
def _reference_key(index: int) -> Outcome:
    return run_case((*MODELS, *OTHER_MODELS)[index], Case(micro=28), precision="fp64")


def reference(model: Model) -> Outcome:
    return _reference_key((*MODELS, *OTHER_MODELS).index(model))


def check_against(reference: Outcome, got: Outcome, *, loss_bound: float, gradient_bound: float) -> None:
    assert got.losses == pytest.approx(reference.losses[: len(got.losses)], rel=loss_bound)
    assert got.norms[0] == pytest.approx(reference.norms[0], rel=gradient_bound)
    errors = gradient_error(got, reference)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= gradient_bound, f"{worst}: {errors[worst]:.2e}"


# small worlds under both families, large ones in turn: the families differ inside a block, not across ranks
MATRIX = tuple(
    (model, case)
    for number, case in enumerate(CASES)
    for model in (MODELS if case.world_size <= 2 else (MODELS[number % 2],))
)
MARKED = [
    pytest.param(
        model, case, id=f"{model.family}-{case}", marks=pytest.mark.slow if case.world_size > 4 else ()
    )
    for model, case in MATRIX
]


@pytest.mark.parametrize(("model", "case"), MARKED)
def test_layout_changes_nothing(model: Model, case: Case) -> None:
    exact = run_case(model, case, precision="fp64", steps=2)
    check_against(reference(model), exact, loss_bound=1e-12, gradient_bound=1e-12)
    rounded = run_case(model, case, precision="fp32", steps=3)
    check_against(reference(model), rounded, loss_bound=1e-6, gradient_bound=1e-5)


@pytest.mark.parametrize("case", OTHER_CASES, ids=str)
@pytest.mark.parametrize("model", OTHER_MODELS, ids=lambda m: f"{m.family}-tied{m.tied}")
def test_dropout_tied_and_untied(model: Model, case: Case) -> None:
    got = run_case(model, case, precision="fp64", steps=2)
    check_against(reference(model), got, loss_bound=1e-12, gradient_bound=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.family)
def test_the_run_learns(model: Model) -> None:
    outcome = reference(model)
    assert outcome.losses[-1] <= 0.95 * outcome.losses[0], outcome.losses
    still = [n for n, v in outcome.initial.items() if torch.equal(v, outcome.final[n])]
    assert not still, f"weights that never moved: {still}"
