"""Promise 1 where settings meet: every legal pair of them occurs in the array; each row beside one fp64 process."""

from __future__ import annotations

import datetime
import functools
import importlib
import itertools

import pytest

from megads.assemble.rules import RULES
from megads.verify.compare import BOUNDS, Comparison, compare
from megads.verify.measure import Watch, measure
from megads.verify.outcome import Outcome
from megads.verify.trial import Precision, with_precision
from tests.parity.covering import (
    AXES,
    LEAST,
    Combination,
    Pair,
    all_pairs,
    build_array,
    read,
    write,
)

ROWS = read()
NUM_A_DAY = 6
STEPS = 3
MOST_REPLAYED = 1e-3  # of all choices of experts

# Settings that no config may have together, by the rule that refuses them.
ILLEGAL: tuple[tuple[str, dict[str, set[str]], dict[str, set[str]]], ...] = (
    ("pieces_need_sequence", {"tensor": {"1"}}, {"sequence": {"pieces"}}),
    ("experts_have_engine", {"engine": {"deepspeed"}}, {"expert": {"2"}}),
    (
        "expert_keys_have_experts",
        {"expert": {"2"}, "expert_tensor": {"1", "2"}},
        {"model": {"gpt", "llama", "dropout"}},
    ),
)


def illegal_pairs() -> set[Pair]:
    order = list(AXES)
    found = set()
    for _, these, those in ILLEGAL:
        for (a, xs), (b, ys) in itertools.product(these.items(), those.items()):
            for x, y in itertools.product(xs, ys):
                first, second = sorted(((a, x), (b, y)), key=lambda pair: order.index(pair[0]))
                found.add((first, second))
    return found


def of_today() -> frozenset[int]:
    """The rows whose turn it is; every row has it in len(ROWS) / NUM_A_DAY days."""
    first = datetime.date.today().toordinal() * NUM_A_DAY
    return frozenset((first + n) % len(ROWS) for n in range(NUM_A_DAY))


@functools.cache
def reference(model: tuple[str, ...]) -> Outcome:
    row = next(row for row in ROWS if row.model == model)
    return measure(row.alone(), 1, steps=STEPS, masks=row.masks, watch=Watch(modules=False))


def run(row: Combination, precision: Precision, *, steps: int) -> Comparison:
    watch = Watch(reference(row.model), modules=False)
    config = with_precision(row.config, precision)
    outcome = measure(config, row.world_size, steps=steps, masks=row.masks, watch=watch)
    assert outcome.num_replayed <= MOST_REPLAYED * outcome.num_choices
    return compare(outcome, reference(row.model), bounds=BOUNDS[precision])


def assert_equal(found: Comparison, *, all_steps: bool) -> None:
    assert not found.missing + found.outcome.misplaced + found.outcome.disagreements
    assert not found.wrong_initial
    assert not found.wrong_losses, found.losses
    assert not found.wrong_gradients, [(row.name, row.gradient) for row in found.wrong_gradients]
    assert not found.is_norm_wrong, found.norm
    if all_steps:
        assert not found.wrong_weights, [(row.name, row.weight) for row in found.wrong_weights]


def test_every_legal_pair_of_settings_occurs() -> None:
    covered = set().union(*(row.pairs for row in ROWS))
    assert len(ROWS) >= LEAST
    assert all_pairs() - covered == illegal_pairs()
    assert {rule for rule, _, _ in ILLEGAL} <= {rule.__name__ for rule in RULES}


@pytest.mark.slow
def test_the_array_is_what_the_algorithm_makes() -> None:
    array = build_array()
    assert write(array).split() == write(type(array)(ROWS, array.illegal)).split()
    assert array.illegal == illegal_pairs()


MARKED = [
    pytest.param(row, id=str(row), marks=() if number in of_today() else pytest.mark.slow)
    for number, row in enumerate(ROWS)
]


@pytest.mark.parametrize("row", MARKED)
def test_combination_equals_one_process(row: Combination) -> None:
    if row.config.optim.engine == "deepspeed":
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # once, before the forks
    else:
        assert_equal(run(row, "fp64", steps=2), all_steps=False)
    assert_equal(run(row, "fp32", steps=STEPS), all_steps=True)
