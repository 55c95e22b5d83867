"""FP8 weights with block scales: equal to arithmetic on bits, and the same bits again."""

from __future__ import annotations

import math

import pytest
import torch

from megads.checkpoint.fp8_blocks import Quantised, dequantise, quantise, scale_shape
from megads.errors import CheckpointError

SHAPES = ((128, 128), (200, 300), (1, 1), (129, 5), (64, 256))


def meaning(byte: int) -> float:
    """The number that a byte of float8_e4m3fn is: sign, 4 bits of exponent with bias 7, 3 bits of mantissa."""
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


NUMBERS = torch.tensor([meaning(byte) for byte in range(256)], dtype=torch.float64)
USED = torch.tensor([byte for byte in range(256) if byte not in (127, 255)])  # all but NaN


def nearest(value: float) -> set[int]:
    """The bytes whose numbers are nearest, both zeros and both sides of a tie."""
    distance = (NUMBERS[USED] - value).abs()
    return set(USED[distance <= distance.min() * (1 + 1e-6)].tolist())


def draw(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Weights whose blocks differ in size by up to 2^16, one of them zero where there are several."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    for i, rows in enumerate(weight.split(128)):
        for j, block in enumerate(rows.split(128, dim=1)):
            block *= 0.0 if (i, j) == (0, 1) else 2.0 ** (5 * i - 4 * j)
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["float", "ue8m0"])
def test_like_the_definition(shape: tuple[int, int], kind: str) -> None:
    weight = draw(shape)
    stored = quantise(weight, kind=kind)
    assert stored.values.shape == weight.shape
    assert stored.scales.shape == scale_shape(shape) == tuple(math.ceil(n / 128) for n in shape)
    read = dequantise(stored)
    for i in range(0, shape[0], 128):
        for j in range(0, shape[1], 128):
            block = weight[i : i + 128, j : j + 128]
            scale = stored.scales[i // 128, j // 128].item()
            largest = max(block.abs().max().item(), 1e-4)
            exact = largest / 448
            wanted = 2.0 ** math.ceil(math.log2(exact)) if kind == "ue8m0" else exact
            assert scale == pytest.approx(wanted, rel=1e-7)
            stored_bytes = stored.values.view(torch.uint8)[i : i + 128, j : j + 128].flatten()[::37].tolist()
            for byte, value in zip(stored_bytes, block.flatten()[::37].tolist(), strict=True):
                assert byte in nearest(value / scale)
            numbers = NUMBERS[stored.values.view(torch.uint8)[i : i + 128, j : j + 128].long()]
            assert torch.equal(read[i : i + 128, j : j + 128], (numbers * scale).float())


@pytest.mark.parametrize("kind", ["float", "ue8m0"])
def test_what_was_read_is_written_with_the_same_bits(kind: str) -> None:
    """But for blocks whose largest number fell to 224: with half the scale they are the same weights."""
    num_blocks = num_halved = 0
    for seed in range(5):
        stored = quantise(draw((300, 700), seed), kind=kind)
        read = dequantise(stored)
        again = quantise(read, kind=kind)
        assert torch.equal(dequantise(again), read)
        is_same = again.scales == stored.scales
        assert torch.equal(again.scales[~is_same], stored.scales[~is_same] / 2)
        same = is_same.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :700]
        differs = again.values.view(torch.uint8) != stored.values.view(torch.uint8)
        assert not (differs & same).any()
        num_blocks, num_halved = num_blocks + is_same.numel(), num_halved + int((~is_same).sum())
    assert num_halved == 0 if kind == "float" else num_halved < num_blocks / 10


def test_every_byte_comes_back() -> None:
    """A block that holds all 254 numbers, under scales of all sizes."""
    values = USED.to(torch.uint8).repeat(2)[:384].view(3, 128)
    values[2, 100:] = 0x7E  # 448
    for power in range(-40, 40, 7):
        stored = Quantised(values.view(torch.float8_e4m3fn), torch.full((1, 1), 2.0**power))
        if 448 * 2.0**power < 1e-4:
            continue
        again = quantise(dequantise(stored), kind="float")
        assert torch.equal(again.values.view(torch.uint8), values)
        assert torch.equal(again.scales, stored.scales)


def test_what_does_not_fit_is_refused() -> None:
    stored = quantise(draw((200, 300)), kind="float")
    with pytest.raises(CheckpointError, match=r"scales \(2, 2\)"):
        dequantise(Quantised(stored.values, stored.scales[:, :2]))
    with pytest.raises(CheckpointError, match="not finite"):
        quantise(torch.tensor([[1.0, math.inf]]), kind="float")
    with pytest.raises(CheckpointError, match="not finite"):
        quantise(torch.tensor([[1.0, math.nan]]), kind="float")
