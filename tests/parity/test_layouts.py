"""Promise 1: the layout changes nothing. Every layout against one float64 process, gradient by gradient."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from megads.assemble import step as train_step_module
from megads.layers import linear
from megads.parallel import gradient
from megads.parallel.collectives import Pending
from megads.parallel.mesh import Mesh
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


@pytest.mark.parametrize(("model", "case"), MATRIX, ids=[f"{m.family}-{c}" for m, c in MATRIX])
def test_layout_changes_nothing(model: Model, case: Case) -> None:
    exact = run_case(model, case, precision="fp64", steps=2)
    check_against(reference(model), exact, loss_bound=1e-12, gradient_bound=1e-12)
    rounded = run_case(model, case, precision="fp32")
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


def _break_tensor_sum(mesh: Mesh) -> None:
    linear.start_all_reduce = lambda x, group: Pending(x)  # type: ignore[assignment]


def _break_sequence_sum(mesh: Mesh) -> None:
    linear.start_scatter_sequence = lambda x, group: Pending(x.chunk(group.size)[group.rank].contiguous())  # type: ignore


def _break_partial_sum(mesh: Mesh) -> None:
    gradient.all_reduce_ = lambda t, group: t  # type: ignore  # of norms and biases under sequence parallelism


def _break_data_parallel_sum(mesh: Mesh) -> None:
    gradient.start_all_reduce = lambda t, group: Pending(t)  # type: ignore


def _break_token_count(mesh: Mesh) -> None:
    count = train_step_module.count_tokens  # each rank its own count, then averaged: a mean of means

    def local(batch: Any, mesh: Mesh) -> torch.Tensor:
        return batch.mask.sum().double() * mesh.group("dp_cp").size + 0 * count(batch, mesh)

    train_step_module.count_tokens = local


def _break_tie(mesh: Mesh) -> None:
    gradient.all_reduce_ = lambda t, group: t  # type: ignore


def _break_norm(mesh: Mesh) -> None:
    gradient.is_primary = lambda parameter, mesh: True  # replicated parameters count once a rank


MUTATIONS = (
    (_break_tensor_sum, Case(tensor=2, micro=4)),
    (_break_sequence_sum, Case(tensor=2, micro=4, sequence=True)),
    (_break_partial_sum, Case(tensor=2, micro=4, sequence=True)),
    (_break_data_parallel_sum, Case(data=2, micro=2)),
    (_break_token_count, Case(data=2, micro=2)),
    (_break_tie, Case(pipeline=2, micro=4)),
)


@pytest.mark.parametrize(("mutation", "case"), MUTATIONS, ids=[m.__name__ for m, _ in MUTATIONS])
def test_broken_code_is_seen(mutation: Any, case: Case) -> None:
    """Code with one mistake fails the comparison above, by its gradients or because ranks disagree."""
    try:
        got = run_case(MODELS[0], case, precision="fp64", steps=1, before=mutation)
    except AssertionError as error:
        assert "ranks disagree" in str(error)
    else:
        errors = gradient_error(got, reference(MODELS[0]))
        assert max(errors.values()) > 1e-3


def test_norm_counted_twice_is_seen() -> None:
    """If replicated parameters entered the norm once a rank, norm and saved state would both show it."""
    with pytest.raises(AssertionError, match="written twice"):
        run_case(MODELS[0], Case(tensor=2, micro=4), precision="fp64", steps=1, before=_break_norm)
