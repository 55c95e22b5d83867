"""Rotary positions: interleaved pairs as complex numbers, stretched frequencies as transformers has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megads.ops.rope import RopeSpec, YarnScaling, rotary, rotary_angles, yarn_magnitude

POSITIONS = torch.tensor([[0, 1, 2, 4095, 100_000]])
YARNS = {
    "V3": (1e4, 64, {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "V2": (1e4, 64, {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "plain": (1e6, 128, {"factor": 4.0}),
    "not rounded": (150_000.0, 64, {"factor": 32.0, "beta_slow": 2, "truncate": False}),
    "mscale": (1e4, 16, {"factor": 8.0, "mscale": 1.2, "mscale_all_dim": 0.5}),
}  # fmt: skip


def scaling_of(parameters: dict[str, float]) -> YarnScaling:
    factor = parameters["factor"]
    mscales = [parameters.get(key) for key in ("mscale", "mscale_all_dim")]
    magnitude = yarn_magnitude(factor)
    if mscales[0] and mscales[1]:
        magnitude = yarn_magnitude(factor, mscales[0]) / yarn_magnitude(factor, mscales[1])
    return YarnScaling(
        factor,
        4096,
        many_turns=parameters.get("beta_fast", 32),
        few_turns=parameters.get("beta_slow", 1),
        rounds=bool(parameters.get("truncate", True)),
        magnitude=magnitude,
    )


@pytest.mark.parametrize("name", YARNS)
def test_yarn_is_that_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which computes in float32; here it is made to compute in float64."""
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    theta, dim, parameters = YARNS[name]
    original = {"rope_theta": theta, "original_max_position_embeddings": 4096, "rope_type": "yarn"}
    config = SimpleNamespace(
        rope_parameters={**original, **parameters}, head_dim=dim, hidden_size=dim, num_attention_heads=1,
        max_position_embeddings=163_840, standardize_rope_params=lambda: None,
    )  # fmt: skip
    for dtype in ("float", "float32"):
        monkeypatch.setattr(torch, dtype, torch.float64)
    wanted, magnitude = functions["yarn"](config)
    monkeypatch.undo()
    rope = RopeSpec(theta, scaling_of(parameters))
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)
    angles = rotary_angles(POSITIONS, rope, dim=dim)
    assert torch.allclose(angles, POSITIONS[..., None] * wanted, rtol=1e-12, atol=0)
    plain = rotary_angles(POSITIONS, RopeSpec(theta), dim=dim)
    assert torch.equal(angles[..., 0], plain[..., 0])
    assert torch.allclose(angles[..., -1], plain[..., -1] / parameters["factor"], rtol=1e-12)


def test_the_ramp_of_deepseek_v3() -> None:
    """From pair 10 to pair 23 of 32, and scores 1.8738 times as large: facts recomputed from the published config."""
    angles, plain = (
        rotary_angles(torch.ones(1, 1, dtype=torch.int64), RopeSpec(1e4, scaling), dim=64)[0, 0]
        for scaling in (scaling_of(YARNS["V3"][2]), None)
    )
    ratio = plain / angles
    assert torch.nonzero(ratio == 1).flatten().tolist() == list(range(11))
    assert torch.nonzero((ratio - 40).abs() < 1e-9).flatten().tolist() == list(range(23, 32))
    assert yarn_magnitude(40.0, 1.0) ** 2 * 192**-0.5 == pytest.approx(0.1352338, abs=5e-8)


@pytest.mark.parametrize("magnitude", [1.0, 1.25])
def test_interleaved_pairs_are_complex_numbers(magnitude: float) -> None:
    rope = RopeSpec(1e4, YarnScaling(4.0, 4096, magnitude=magnitude), is_interleaved=True)
    x = torch.randn(1, 3, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = rotary_angles(POSITIONS, rope, dim=8)
    turned = rotary(x, angles, rope=rope)
    pairs = torch.view_as_complex(x.reshape(1, 3, 5, 4, 2)) * torch.exp(1j * angles[:, None]) * magnitude
    wanted = torch.view_as_real(pairs).flatten(-2)
    assert torch.allclose(turned, wanted, rtol=1e-12, atol=1e-14)
    flow = torch.randn_like(wanted)
    found, expected = (torch.autograd.grad(y, x, flow, retain_graph=True)[0] for y in (turned, wanted))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_both_orders_of_pairs_give_the_same_scores() -> None:
    """Interleaved elements are half-split ones in another order, so products of queries and keys are equal."""
    q, k = torch.randn(2, 1, 2, 5, 8, dtype=torch.float64)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves, neighbours = RopeSpec(1e4), RopeSpec(1e4, is_interleaved=True)
    angles = rotary_angles(POSITIONS, halves, dim=8)
    scores = rotary(q, angles, rope=neighbours) @ rotary(k, angles, rope=neighbours).mT
    split = rotary(q[..., order], angles, rope=halves) @ rotary(k[..., order], angles, rope=halves).mT
    assert torch.allclose(scores, split, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(scores, rotary(q, angles, rope=halves) @ rotary(k, angles, rope=halves).mT)
