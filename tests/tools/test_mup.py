"""muP at work: activations change as much in a wide model as in a narrow one, and gradients shrink as eps does."""

from __future__ import annotations

import pytest

from tools.bench.mup import best_rate, config_of, coordinates, growth, main, train

STEPS = 6  # by then what was learned outweighs the initial part, which falls as m^-1/2
WIDTHS = (64, 128, 256, 512)


@pytest.mark.parametrize("has_wide_heads", [False, True])
def test_changes_are_flat_under_mup_alone(has_wide_heads: bool) -> None:
    widths = WIDTHS if not has_wide_heads else WIDTHS[:3]
    growths = {}
    for is_scaled in (False, True):
        found = coordinates(widths, is_scaled=is_scaled, steps=STEPS, lr=1e-2, has_wide_heads=has_wide_heads)
        growths[is_scaled] = {name: growth(values) for name, values in found.items()}
    assert all(-0.25 < slope < 0.1 for slope in growths[True].values()), growths[True]
    inner = {name: slope for name, slope in growths[False].items() if name != "embedding"}
    assert all(slope > 0.3 for slope in inner.values()), inner


def test_gradients_shrink_as_eps() -> None:
    """All by 1 / m: eps stands beside them in Adam's step."""
    sizes: dict[str, dict[int, float]] = {}
    for width in WIDTHS:
        trainee, _ = train(
            config_of(width, is_scaled=True), steps=2, lr=1e-2
        )  # the second one's are still there
        for parameter in trainee.model.parameters:
            size = float(parameter.grad.double().square().mean().sqrt())
            sizes.setdefault(parameter.logical_name, {})[width] = size
    slopes = {name: growth(values) for name, values in sizes.items()}
    assert all(-1.3 < slope < -0.7 for slope in slopes.values()), slopes


@pytest.mark.slow
def test_the_best_rate_stays() -> None:
    rates = tuple(2.0**power for power in range(-12, -4))
    best: dict[bool, list[int]] = {}
    for is_scaled in (False, True):
        for width in (64, 256):
            losses = list(best_rate(width, is_scaled=is_scaled, steps=20, rates=rates).values())
            best.setdefault(is_scaled, []).append(losses.index(min(losses)))
    assert abs(best[True][0] - best[True][1]) <= 1, best
    assert best[False][0] - best[False][1] >= 2, best


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--widths", "16", "32", "--steps", "1"])
    assert capsys.readouterr().out.count("logits") == 2
