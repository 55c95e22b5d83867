"""Rounding at random, and AdamW with bfloat16 moments or with its state in the host's memory, beside torch's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megads.checkpoint.load import load
from megads.checkpoint.save import save
from megads.optim import staged
from megads.optim.rounding import round_at_random_
from megads.parallel.control import Control
from tests.optim.test_zero import CONFIG, gradients, make, run

FP32 = replace(CONFIG, precision="fp32", zero_stage=2)


def rounded(values: torch.Tensor, salt: int) -> torch.Tensor:
    out = torch.empty_like(values, dtype=torch.bfloat16)
    round_at_random_(out, values, salt=torch.tensor(salt, dtype=torch.int32))
    return out.float()


def test_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.linspace(
        -20, 10, 1000
    )
    low = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)  # towards 0
    high = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    draws = torch.stack([rounded(values, salt) for salt in range(1000)])
    assert bool(((draws == low) | (draws == high)).all())
    share = (draws == high).float().mean(0)
    expected = ((values - low) / (high - low)).float()
    assert (share - expected).abs().max().item() < 0.08  # 5 deviations of 1000 draws
    assert (share - expected).mean().abs().item() < 2e-3
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(rounded(values, 3), draws[3])  # a function of value and salt


def test_values_that_bfloat16_has_stay() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, float("inf")]).bfloat16().float()
    assert all(torch.equal(rounded(values, salt), values) for salt in range(50))


def test_a_second_moment_shrinks_though_each_change_is_less_than_bfloat16_can_tell() -> None:
    value = torch.full((4096,), 1.0)
    nearest = value.bfloat16()
    for step in range(300):
        value = rounded(value * 0.999, step)
        nearest = (nearest.float() * 0.999).bfloat16()
    assert nearest[0].item() == 1.0
    assert value.mean().item() == pytest.approx(0.999**300, rel=0.02)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("chunk", [4, 2**22])
def test_bfloat16_moments_follow_adamw(offload: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "CHUNK", chunk)
    exact, engine = make(FP32)
    run(exact, engine, range(1, 21))
    toy, other = make(replace(FP32, moment_dtype="bf16", offload=offload))
    run(toy, other, range(1, 21))
    moments = [p for p in other.state() if p.name.startswith("optim/")]
    assert {p.tensor.dtype for p in moments} == {torch.bfloat16}
    expected = {p.name: p.tensor for p in engine.state() if p.name.startswith("optim/")}
    for piece in moments:
        difference = (piece.tensor.float() - expected[piece.name][piece.box.slices]).abs().max()
        assert difference <= 2e-2 * expected[piece.name].abs().max(), piece.name
    moved = (exact.matrix - make(FP32)[0].matrix).abs().max()
    assert 0 < (toy.matrix - exact.matrix).abs().max() <= 0.02 * moved
    assert other.scalars()["step"] == 20


@pytest.mark.parametrize(
    "options", [{"offload": True}, {"moment_dtype": "bf16"}, {"moment_dtype": "bf16", "offload": True}]
)
def test_a_gradient_that_is_not_finite_changes_nothing(options: dict[str, object]) -> None:
    toy, engine = make(replace(FP32, zero_stage=0, **options))  # type: ignore[arg-type]
    run(toy, engine, range(1, 3))
    before = [p.tensor.clone() for p in engine.state()]
    engine.zero_gradients()
    toy.matrix.grad[2, 3] = float("inf")
    assert not engine.step(lr=1e-2).finite.item()
    assert all(torch.equal(a, p.tensor) for a, p in zip(before, engine.state(), strict=True))
    assert engine.scalars()["step"] == 2
    assert run(toy, engine, range(3, 4))[0] > 0


@pytest.mark.parametrize("options", [{}, {"offload": True}], ids=["device", "host"])
def test_low_precision_weights_are_torchs_masters_rounded(options: dict[str, object]) -> None:
    """bf16 weights with float32 masters: torch's AdamW on the masters, fed the same gradients, to float32."""
    toy, engine = make(replace(CONFIG, precision="bf16", **options))  # type: ignore[arg-type]
    masters = [
        p.tensor.clone().requires_grad_()
        for p in sorted(engine.state(), key=lambda p: p.name)
        if p.name.startswith("model/")
    ]
    reference = torch.optim.AdamW(
        [{"params": masters[:1], "weight_decay": 0.1}, {"params": masters[1:], "weight_decay": 0.0}],
        lr=1e-2,
        betas=CONFIG.betas,
        eps=CONFIG.eps,
    )
    run(toy, engine, range(1, 6))
    for step in range(1, 6):
        for master, gradient in zip(masters, gradients(step), strict=True):
            master.grad = gradient.float()
        reference.step()
    for piece, master in zip(
        (p for p in sorted(engine.state(), key=lambda p: p.name) if p.name.startswith("model/")),
        masters,
        strict=True,
    ):
        assert piece.tensor.dtype == torch.float32
        assert torch.allclose(piece.tensor, master.detach(), rtol=1e-6, atol=1e-6)
    assert toy.matrix.dtype == torch.bfloat16
    assert torch.equal(toy.matrix, masters[0].bfloat16()) or torch.allclose(
        toy.matrix.float(), masters[0], rtol=2**-8
    )


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_moments_load_in_the_other_dtype(first: str, second: str, tmp_path: Path) -> None:
    """Widened exactly, or rounded to nearest; masters as they are."""
    toy, engine = make(replace(FP32, moment_dtype=first))  # type: ignore[arg-type]
    run(toy, engine, range(1, 3))
    control = Control(0, 1)
    path = save(tmp_path, 2, pieces=engine.state(), objects={}, control=control)
    other, fresh = make(replace(FP32, moment_dtype=second, offload=True))  # type: ignore[arg-type]
    load(path, fresh.targets(), control=control)
    fresh.load_scalars(engine.scalars())
    assert torch.equal(other.matrix, toy.matrix)
    for saved, loaded in zip(engine.state(), fresh.state(), strict=True):
        assert saved.name == loaded.name
        assert torch.equal(loaded.tensor, saved.tensor.to(loaded.tensor.dtype))
