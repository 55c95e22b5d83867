"""Random numbers that depend on what they are for, never on who draws them.

Every number is a function of (seed, name, index): Philox4x32-10 (Salmon et al. 2011) in counter mode, computed in plain
int64 and float64 tensor operations, so a slice has the bits it has in the whole, on any rank, device or library.

    initial weights   key = hash(seed/name), counter = element index // 4; one word pair -> two normals (Box-Muller)
    dropout masks     key = hash(seed/dropout/op name), counter = (column // 4, row, unit, step); keep = word >= p 2^32

Only + - * /, comparisons and bit operations are used: library log, cos, sqrt or pow differ between libraries and
devices, and fused multiply-add differs from multiply and add (so no `addcmul`, no `alpha=`, no torch.compile here).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megads.parallel.shard import Box, Shape

MASK = 0xFFFFFFFF
SQRT2 = 1.4142135623730951
LN2 = 0.6931471805599453
# ln(m / sqrt 2) = sum LOG[k] s^(2k+1) with s = (m - sqrt 2) / (m + sqrt 2), for m in [1, 2)
LOG = tuple(2.0 / (2 * k + 1) for k in range(10))
# Taylor series of sin and cos of t pi/2, t in [-1/2, 1/2], in powers of t^2
SIN = (
    1.5707963267948966,
    -0.6459640975062463,
    0.07969262624616705,
    -0.004681754135318688,
    0.00016044118478735983,
    -3.598843235212085e-06,
    5.692172921967927e-08,
    -6.688035109811468e-10,
    6.0669357311061955e-12,
)
COS = (
    1.0,
    -1.2337005501361697,
    0.25366950790104803,
    -0.02086348076335296,
    0.0009192602748394266,
    -2.5202042373060607e-05,
    4.710874778818172e-07,
    -6.386603083791852e-09,
    6.565963114979473e-11,
)
CHUNK = 1 << 18  # elements drawn at once


def key(text: str) -> tuple[int, int]:
    """Two 32-bit key words of a stream's name."""
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return word & MASK, word >> 32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key_words: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words (int64 tensors of 32-bit values, broadcast) -> four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key_words
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def normal_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller: two tensors of 32-bit words -> two float64 tensors of standard normals, |z| <= 6.8."""
    u = (a.double() + 0.5) * 2.0**-32
    bits = u.view(torch.int64)
    exponent = ((bits >> 52) - 1023).double()
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).view(torch.float64)
    s = (mantissa - SQRT2) / (mantissa + SQRT2)
    v = (_horner(LOG, s * s) * s + (exponent + 0.5) * LN2) * -2.0  # -2 ln u
    v = v.clamp_min(2.0**-33)
    y = (0x5FE6EB50C7B537A9 - (v.view(torch.int64) >> 1)).view(torch.float64)  # first guess of 1 / sqrt v
    half = v * 0.5
    for _ in range(4):
        y = y * (1.5 - half * (y * y))
    radius = v * y
    t = ((b & 0x3FFFFFFF).double() + 0.5) * 2.0**-30 - 0.5
    z = t * t
    sine, cosine = _horner(SIN, z) * t * radius, _horner(COS, z) * radius
    quadrant = b >> 30
    odd = (quadrant & 1) == 1
    sign = 1.0 - (quadrant & 2).double()
    return torch.where(odd, -sine, cosine) * sign, torch.where(odd, cosine, sine) * sign


def _normal_blocks(blocks: Tensor, key_words: tuple[int, int]) -> Tensor:
    """Standard normals of elements 4b .. 4b+3 for each block number b: [n] int64 -> [n, 4] float64."""
    zero = torch.zeros((), dtype=torch.int64, device=blocks.device)
    words = philox((blocks & MASK, blocks >> 32, zero, zero), key_words)
    return torch.stack([*normal_pair(words[0], words[1]), *normal_pair(words[2], words[3])], dim=-1)


def fill_normal_(target: Tensor, *, name: str, shape: Shape, box: Box, std: float) -> None:
    """Fill `target` with the box `box` of the normal tensor of shape `shape` that belongs to stream `name`.

    Element i (row-major in `shape`) is `std` times standard normal i of the stream, rounded once to target's dtype.

    Args:
        target: of shape `box.shape`, any strides, any float dtype, on any device.
        name: stream, "seed/parameter name".
        std: standard deviation.
    """
    words = key(name)
    run_dims = len(
        shape
    )  # trailing dims, from the last, over which the box is one contiguous run of elements
    while run_dims > 0:
        run_dims -= 1
        if (box.start[run_dims], box.stop[run_dims]) != (0, shape[run_dims]):
            break
    length = math.prod(box.shape[run_dims:])
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    starts = torch.zeros((), dtype=torch.int64, device=target.device)
    for d in range(run_dims):
        index = torch.arange(box.start[d], box.stop[d], device=target.device) * strides[d]
        starts = starts[..., None] + index
    starts = starts.reshape(-1)
    if run_dims < len(shape):
        starts = starts + box.start[run_dims] * strides[run_dims]
    values = torch.empty(len(starts), length, dtype=target.dtype, device=target.device)
    rows = max(1, CHUNK // max(1, min(length, CHUNK)))
    for row in range(0, len(starts), rows):
        for column in range(0, length, CHUNK):
            count = min(CHUNK, length - column)
            first = starts[row : row + rows] + column
            values[row : row + rows, column : column + count] = std * _normal_runs(first, count, words)
    target.copy_(values.view(box.shape))


def _normal_runs(first: Tensor, count: int, key_words: tuple[int, int]) -> Tensor:
    """Standard normals of elements first[r] .. first[r] + count - 1: [rows] int64 -> [rows, count] float64."""
    offset = first & 3
    num_blocks = (count + 3 + 3) // 4
    blocks = (first >> 2)[:, None] + torch.arange(num_blocks, device=first.device)
    drawn = _normal_blocks(blocks.reshape(-1), key_words).view(len(first), num_blocks * 4)
    return drawn.gather(1, offset[:, None] + torch.arange(count, device=first.device))


def keep_mask(
    *, name: str, step: int, probability: float, units: Tensor, rows: Tensor, columns: tuple[int, int]
) -> Tensor:
    """Which elements dropout keeps, from global indices alone.

    Args:
        name: stream, "seed/dropout/op name".
        step: optimizer step.
        probability: of being dropped, in [0, 1).
        units: [...] int64, the outermost global index: sample, or sample x heads + head.
        rows: [...] int64, global row (position), broadcast against `units`.
        columns: half-open range of global columns (hidden index, or key position).

    Returns:
        [..., columns] bool.
    """
    start, stop = columns
    blocks = torch.arange(start >> 2, (stop + 3) >> 2, device=units.device)
    moment = torch.tensor(step & MASK, dtype=torch.int64, device=units.device)
    words = philox((blocks, rows[..., None], units[..., None], moment), key(name))
    drawn = torch.stack(words, dim=-1).flatten(-2)
    offset = start - (start & ~3)
    return drawn[..., offset : offset + stop - start] >= int(probability * 2**32)
