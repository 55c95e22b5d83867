"""Random streams: known answers, slices, and dropout masks that depend on global indices alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from megads.parallel.rng import fill_normal_, keep_mask, normal_pair, philox
from megads.parallel.shard import Box


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, kat_vectors: philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    words = philox(tuple(torch.tensor(c) for c in counter), key)  # type: ignore[arg-type]
    assert tuple(int(w) for w in words) == expected


def drawn(
    shape: tuple[int, ...], box: Box, *, name: str = "1/w", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    target = torch.empty(box.shape, dtype=dtype)
    fill_normal_(target, name=name, shape=shape, box=box, std=0.02)
    return target


def test_golden_bits() -> None:
    values = drawn((1 << 20,), Box.whole((1 << 20,)), name="1234/layers.0.attention.qkv.weight")
    assert hashlib.sha1(values.numpy().tobytes()).hexdigest().startswith("62ba525eaeee")


def test_box_muller_on_the_same_words_in_numpy() -> None:
    words = [w.numpy() for w in philox(tuple(torch.tensor([c]) for c in (5, 0, 0, 0)), (1, 2))]  # type: ignore[arg-type]
    u, v = (words[0] + 0.5) / 2**32, words[1]
    angle = ((v & 0x3FFFFFFF) + 0.5) / 2**30 - 0.5 + (v >> 30)
    expected = np.sqrt(-2 * np.log(u)) * np.cos(angle * np.pi / 2)
    got = normal_pair(torch.tensor(words[0]), torch.tensor(words[1]))[0].numpy()
    assert np.allclose(got, expected, rtol=1e-13)


@pytest.mark.parametrize("shape", [(37, 101), (5, 7, 9), (4099,), (1, 1)])
def test_a_slice_has_the_bits_it_has_in_the_whole(shape: tuple[int, ...]) -> None:
    whole = drawn(shape, Box.whole(shape))
    generator = np.random.default_rng(0)
    for _ in range(40):
        edges = [sorted(generator.choice(n + 1, 2, replace=False)) for n in shape]
        box = Box(tuple(int(a) for a, _ in edges), tuple(int(b) for _, b in edges))
        assert torch.equal(drawn(shape, box), whole[box.slices])


def test_long_and_strided_targets() -> None:
    shape = (3, (1 << 18) + 5)  # longer than a chunk
    whole = drawn(shape, Box.whole(shape))
    target = torch.empty(shape[1], shape[0]).T
    fill_normal_(target, name="1/w", shape=shape, box=Box.whole(shape), std=0.02)
    assert torch.equal(target, whole)
    assert torch.equal(drawn(shape, Box((1, 7), (2, shape[1]))), whole[1:2, 7:])


def keep(
    units: range, rows: range, columns: tuple[int, int], *, step: int = 3, name: str = "s"
) -> torch.Tensor:
    return keep_mask(
        name=name,
        step=step,
        probability=0.1,
        units=torch.tensor(units)[:, None],
        rows=torch.tensor(rows)[None, :],
        columns=columns,
    )


def test_dropout_masks_are_slices_of_one_mask() -> None:
    whole = keep(range(6), range(40), (0, 64))
    assert torch.equal(keep(range(2, 5), range(7, 31), (5, 62)), whole[2:5, 7:31, 5:62])


def test_dropout_keeps_the_share_and_differs_by_step_name_and_unit() -> None:
    whole = keep(range(8), range(128), (0, 128))
    n = whole.numel()
    assert abs(whole.double().mean().item() - 0.9) < 4 * (0.09 / n) ** 0.5
    for other in (
        keep(range(8), range(128), (0, 128), step=4),
        keep(range(8), range(128), (0, 128), name="t"),
    ):
        assert 0.7 < (whole == other).double().mean().item() < 0.9  # independent masks agree in 82%
    assert not torch.equal(whole[0], whole[1])
