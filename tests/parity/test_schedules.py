"""Every schedule, executed on real ranks, against one process: the order of the work changes no gradient.

In fp64, where a sum in another order differs by 1e-15: losses and gradients to 1e-12. GPT ties its head to its
embedding (on one rank where stages are placed as a V, on two elsewhere), Llama does not.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.text import format_csv, format_schedule
from tests.parity.harness import GLOBAL_BATCH, Case, Model, Outcome, gradient_error, run_case

MODELS = (Model("gpt"), Model("llama"), Model("gpt", layers=6), Model("llama", layers=6))
DEEP = 2  # index of the first model with a block for each of 8 stages
EXECUTED = tuple(name for name in SCHEDULES if name != "dualpipe")


def chunks_of(name: str) -> int:
    return SCHEDULES[name].num_chunks or 2


@functools.cache
def reference(number: int) -> Outcome:
    return run_case(MODELS[number], Case(micro=GLOBAL_BATCH), precision="fp64", steps=2)


def check(number: int, case: Case) -> None:
    got, expected = run_case(MODELS[number], case, precision="fp64", steps=2), reference(number)
    assert got.losses == pytest.approx(expected.losses, rel=1e-12)
    assert got.norms[0] == pytest.approx(expected.norms[0], rel=1e-12)
    errors = gradient_error(got, expected)
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= 1e-12, f"{worst}: {errors[worst]:.2e}"


@pytest.mark.parametrize("name", EXECUTED)
def test_schedule_changes_nothing(name: str) -> None:
    """Two ranks, seven micro-batches; the families in turn."""
    number = EXECUTED.index(name) % 2
    check(number, Case(pipeline=2, micro=4, schedule=name, chunks=chunks_of(name)))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", EXECUTED)
@pytest.mark.parametrize(
    "case",
    [
        Case(pipeline=4, micro=2),
        Case(pipeline=4, micro=14),
        Case(pipeline=2, data=2, micro=1, zero=1),
        Case(pipeline=2, tensor=2, micro=4, sequence=True),
        Case(pipeline=2, micro=4, recompute="full"),
        Case(pipeline=2, micro=4, recompute=("attention", "mlp")),
    ],
    ids=str,
)
def test_schedule_changes_nothing_beside_other_axes(name: str, number: int, case: Case) -> None:
    """More stages than micro-batches, ZeRO, sequence parallelism, recompute."""
    check(DEEP + number, replace(case, schedule=name, chunks=chunks_of(name)))


@pytest.mark.parametrize(
    "case",
    [
        Case(pipeline=2, micro=4, stage_layers=(3, 0)),
        Case(pipeline=2, micro=4, schedule="zbv", chunks=2, stage_layers=(0, 2, 1, 0)),
    ],
    ids=str,
)
def test_where_the_user_cuts_changes_nothing(case: Case) -> None:
    check(0, case)


@pytest.mark.parametrize("form", ["csv", "txt"])
def test_a_users_own_schedule_changes_nothing(form: str, tmp_path: Path) -> None:
    """From a file: ZB-V with the last two W of rank 0 at its end, an order that no builder makes."""
    schedule = build("zbv", num_stages=4, num_micro_batches=7, num_chunks=2)
    row = list(schedule.rows[0])
    late = [cell for cell in row if str(cell) in ("0W0", "3W1")]
    assert len(late) == 2
    mine = replace(
        schedule,
        rows=(tuple(c for c in row if c not in late) + tuple(late), *schedule.rows[1:]),
        max_live=(9, 9),
    )
    path = tmp_path / f"mine.{form}"
    path.write_text(format_csv(mine) if form == "csv" else format_schedule(mine))
    check(0, Case(pipeline=2, micro=4, schedule=str(path), chunks=2))
