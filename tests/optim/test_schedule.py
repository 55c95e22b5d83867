"""The learning rate: equal to torch's and transformers' schedules, in steps and in tokens, through ramps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim import lr_scheduler

from megads.assemble.changes import ramp_of
from megads.assemble.rules import findings
from megads.config.load import load_text
from megads.config.optim import OptimConfig
from megads.config.schedule import LengthConfig, PieceConfig, RestartsConfig, TailConfig
from megads.data.curriculum import Constant
from megads.data.plan import Ramp, plan_history
from megads.data.segment import CorpusShare, Segment, tokens_by
from megads.optim.schedule import learning_rate

LR, MIN_LR, TOTAL = 3e-3, 2e-4, 60
A_STEP = 512  # tokens


def rates(config: OptimConfig, total: int, *, a_step: int = A_STEP) -> list[float]:
    return [
        learning_rate(step, config, total_steps=total, tokens_by=lambda step: step * a_step)
        for step in range(1, total + 1)
    ]


def theirs(make: Callable[[torch.optim.Optimizer], Any], total: int) -> list[float]:
    """The rates that a scheduler has after 1, 2, ... of its steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    found = []
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4, decay="constant")
    assert rates(config, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_warm_up_the_first_step_is_near_the_peak() -> None:
    assert rates(OptimConfig(lr=1e-3, decay="constant"), 2) == [1e-3, 1e-3]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_decay_goes_down_to_the_minimum_and_stays(decay: str) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, decay=decay, decay_steps=10)  # type: ignore[arg-type]
    found = rates(config, 14)
    assert found[1] == 1.0
    assert all(a > b for a, b in pairwise(found[1:10]))
    assert found[9:] == pytest.approx([0.1] * 5)
    assert found[5] == pytest.approx(0.55)  # half of the way, in both shapes


WARM = 7
OTHERS: dict[str, tuple[OptimConfig, Callable[[torch.optim.Optimizer], Any]]] = {
    "constant": (
        OptimConfig(lr=LR, warmup_steps=WARM, decay="constant"),
        lambda o: transformers.get_constant_schedule_with_warmup(o, WARM),
    ),
    "linear": (
        OptimConfig(lr=LR, warmup_steps=WARM, decay="linear"),
        lambda o: transformers.get_linear_schedule_with_warmup(o, WARM, TOTAL),
    ),
    "cosine": (
        OptimConfig(lr=LR, warmup_steps=WARM, decay="cosine"),
        lambda o: transformers.get_cosine_schedule_with_warmup(o, WARM, TOTAL),
    ),
    "cosine with a minimum": (
        OptimConfig(lr=LR, min_lr=MIN_LR, decay="cosine"),
        lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=MIN_LR),
    ),
    "linear with a minimum": (
        OptimConfig(lr=LR, min_lr=MIN_LR, decay="linear", decay_steps=40),
        lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=MIN_LR / LR, total_iters=40),
    ),
    "restarts": (
        OptimConfig(
            lr=LR, min_lr=MIN_LR, decay="cosine_restarts", restarts=RestartsConfig(steps=5, growth=2)
        ),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, T_mult=2, eta_min=MIN_LR),
    ),
    "cycles": (
        OptimConfig(lr=LR, warmup_steps=10, decay="cosine_restarts", restarts=RestartsConfig(steps=20)),
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, 10, 10 + 80, 4),
    ),
    "inverse square root": (
        OptimConfig(lr=LR, warmup_steps=WARM, decay="inverse_sqrt"),
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARM),
    ),
    "inverse square root of another time": (
        OptimConfig(lr=LR, warmup_steps=WARM, decay="inverse_sqrt", timescale=LengthConfig(steps=20)),
        lambda o: transformers.get_inverse_sqrt_schedule(o, WARM, timescale=20),
    ),
    **{
        f"wsd {shape} to {minimum}": (
            OptimConfig(
                lr=LR,
                min_lr=minimum,
                warmup_steps=warmup,
                decay="wsd",
                tail=TailConfig(shape=shape, steps=15),
                decay_steps=50,
            ),
            lambda o, name=name, warmup=warmup, minimum=minimum: transformers.get_wsd_schedule(
                o, warmup, 15, num_training_steps=50, decay_type=name, min_lr_ratio=minimum / LR
            ),
        )
        for shape, name in (("linear", "linear"), ("cosine", "cosine"), ("sqrt", "1-sqrt"))
        for warmup, minimum in ((WARM, 0.0), (0, MIN_LR))  # its warm-up begins at the minimum
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_equal_to_torch_and_transformers(name: str) -> None:
    config, make = OTHERS[name]
    assert rates(config, TOTAL) == pytest.approx(theirs(make, TOTAL), rel=1e-12, abs=1e-18)


def test_exponential_tail_is_megatrons() -> None:
    """2 x 0.5^r - 1 of the way from lr to min_lr (its `exponential` decay of WSD)."""
    config = OptimConfig(
        lr=LR, min_lr=MIN_LR, decay="wsd", tail=TailConfig(shape="exponential", steps=10), decay_steps=30
    )
    found = rates(config, 40)
    assert found[:20] == [LR] * 20
    expected = [MIN_LR + (LR - MIN_LR) * (2.0 * math.pow(0.5, r / 10) - 1.0) for r in range(11)]
    assert found[19:30] == pytest.approx(expected, rel=1e-12)
    assert found[30:] == pytest.approx([MIN_LR] * 10)


IN_TOKENS = {
    "cosine": {"warmup_tokens": WARM * A_STEP, "decay": "cosine", "decay_tokens": 50 * A_STEP},
    "mixed": {"warmup_steps": WARM, "decay": "linear", "decay_tokens": 50 * A_STEP},
    "run's end": {"warmup_tokens": WARM * A_STEP, "decay": "cosine"},
    "restarts": {
        "decay": "cosine_restarts",
        "restarts": RestartsConfig(tokens=5 * A_STEP, growth=2),
    },
    "inverse_sqrt": {"warmup_steps": WARM, "decay": "inverse_sqrt", "timescale": {"tokens": 9 * A_STEP}},
    "wsd": {"warmup_steps": WARM, "decay": "wsd", "tail": TailConfig(tokens=9 * A_STEP)},
}


@pytest.mark.parametrize("name", IN_TOKENS)
def test_tokens_are_steps_where_all_steps_are_alike(name: str) -> None:
    def in_steps(given: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in given.items():
            if key.endswith("_tokens"):
                yield key.replace("_tokens", "_steps"), value // A_STEP
            elif isinstance(value, RestartsConfig):
                yield key, RestartsConfig(steps=(value.tokens or 0) // A_STEP, growth=value.growth)
            elif isinstance(value, TailConfig):
                yield key, TailConfig(steps=(value.tokens or 0) // A_STEP)
            elif isinstance(value, dict):
                yield key, LengthConfig(steps=value["tokens"] // A_STEP)
            else:
                yield key, value

    given = {
        key: LengthConfig(**value) if isinstance(value, dict) else value
        for key, value in IN_TOKENS[name].items()
    }
    tokens = OptimConfig(lr=LR, min_lr=MIN_LR, **given)
    steps = OptimConfig(lr=LR, min_lr=MIN_LR, **dict(in_steps(IN_TOKENS[name])))
    assert rates(tokens, TOTAL) == pytest.approx(rates(steps, TOTAL), rel=1e-12)
    assert rates(tokens, TOTAL) != pytest.approx(rates(tokens, TOTAL, a_step=A_STEP // 2), rel=1e-3)


def history_of(ramp: Ramp, *, length: int, last_step: int) -> tuple[Segment, ...]:
    wanted = Segment(1, ramp.points[-1][1], length, length, (CorpusShare("c", "f", 1.0),))
    return plan_history((), wanted, ramp=ramp, curriculum=Constant(length), last_step=last_step)


V3 = Path(__file__).parents[2] / "configs" / "schedules" / "deepseek-v3.yaml"
REST = """
run: {steps: 300_000}
model: {family: llama, layers: 2, hidden: 48, heads: 6}
data: {train: corpus, tokenizer: t.model, sequence_length: 4096}
"""


def test_deepseek_v3s_points() -> None:
    """Its section 4.2, with its batch ramp: points stand in tokens, not in steps."""
    config = load_text(V3.read_text() + REST, [], source=str(V3))
    assert findings(config, 1) == ()
    history = history_of(ramp_of(config.batch), length=4096, last_step=300_000)
    assert len(history) == 13
    by = partial(tokens_by, history)

    def first_step_after(tokens: int) -> int:
        low, high = 1, 300_000
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if by(middle) > tokens else (middle + 1, high)
        return low

    def rate(step: int) -> float:
        return learning_rate(step, config.optim, total_steps=300_000, tokens_by=by)

    assert rate(1000) == pytest.approx(1.1e-4, rel=1e-12)
    ten, end, last = (first_step_after(n * 10**9) for n in (10_000, 14_300, 14_633))
    assert {rate(2000), rate(100_000), rate(ten - 1)} == {2.2e-4}
    for step in (ten, (ten + end) // 2, end - 1):
        r = (by(step) - 10 * 10**12) / (4_300 * 10**9)
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * r)) / 2
        assert rate(step) == pytest.approx(expected, rel=1e-12)
    assert rate(end - 1) == pytest.approx(2.2e-5, rel=1e-8)
    assert {rate(end), rate((end + last) // 2), rate(last - 1)} == {2.2e-5}
    assert {rate(last), rate(last + 1000)} == {7.3e-6}


def test_pieces_have_any_shape_and_stay_behind_the_last() -> None:
    pieces = (
        PieceConfig(tokens=10, shape="linear", lr=0.5),
        PieceConfig(tokens=20, shape="sqrt", lr=1.0),
        PieceConfig(tokens=30, lr=0.2),
    )
    config = OptimConfig(lr=1.0, decay="pieces", pieces=pieces)
    found = rates(config, 40, a_step=1)
    assert found[4] == 0.75
    assert found[9] == 0.5
    assert found[14] == pytest.approx(0.5 + 0.5 * math.sqrt(0.5))
    assert found[19] == 1.0
    assert found[20:] == [0.2] * 20


def test_a_ramp_of_the_batch_moves_no_point_of_a_schedule_in_tokens() -> None:
    """With and without a ramp, the rate after as many tokens is the same."""
    ramped = partial(tokens_by, history_of(Ramp(((0, 2), (64, 4), (160, 8))), length=4, last_step=60))
    config = OptimConfig(lr=LR, min_lr=MIN_LR, warmup_tokens=96, decay="cosine", decay_tokens=960)
    seen = 0
    for step in range(1, 40):
        by_ramp = learning_rate(step, config, total_steps=60, tokens_by=ramped)
        tokens = ramped(step)
        plain = learning_rate(tokens, config, total_steps=60, tokens_by=lambda tokens: tokens)
        assert by_ramp == plain
        seen += tokens != step * 32
    assert seen > 30
