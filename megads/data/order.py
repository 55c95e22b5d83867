"""The training order: a keyed permutation that is computed, never stored.

Lives here: a bijection of 0..size-1 for every size, and the page stream of a corpus (epoch after epoch, each
in another order). Does not live here: which corpus a sample comes from (blend) and what a page holds
(corpus).

    index --> left | right        two halves of `half` bits; 4 ** half is the least such power >= size
              right, left ^ F(right, key of the round)          8 rounds: a bijection of 0 .. 4 ** half - 1
              again while the result is >= size                 cycle walking: a bijection of 0 .. size - 1

The walk ends because the cycle through an index below size returns to that index; its mean length is
4 ** half / size, below 4. Any range of the order costs O(range) time and memory at any size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megads.errors import DataError

NUM_ROUNDS = 8
MAX_SIZE = 1 << 62
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Odd constants of the splitmix64 finaliser (Steele, Lea and Flood 2014)."""


@dataclass(frozen=True, slots=True)
class Permutation:
    """A bijection of 0..size-1, chosen by (seed, name, epoch); O(1) memory.

    Raises:
        DataError: size is not in 1..2**62.
    """

    size: int
    seed: int
    name: str
    epoch: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise DataError("a permutation of this size cannot be made", found=self.size, allowed="1..2**62")

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of `indices` (any shape, each in 0..size-1) under the permutation, int64."""
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        keys = self._round_keys()
        size = np.uint64(self.size)
        flat = np.atleast_1d(indices).astype(np.uint64).ravel()
        placed = _feistel(flat, half=half, keys=keys)
        outside = np.flatnonzero(placed >= size)
        while outside.size:
            walked = _feistel(placed[outside], half=half, keys=keys)
            placed[outside] = walked
            outside = outside[walked >= size]
        return placed.astype(np.int64).reshape(np.shape(indices))

    def inverse(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The indices that stand at `places` (any shape, each in 0..size-1), int64."""
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        keys = self._round_keys()
        size = np.uint64(self.size)
        found = _unfeistel(np.atleast_1d(places).astype(np.uint64).ravel(), half=half, keys=keys)
        outside = np.flatnonzero(found >= size)
        while outside.size:
            walked = _unfeistel(found[outside], half=half, keys=keys)
            found[outside] = walked
            outside = outside[walked >= size]
        return found.astype(np.int64).reshape(np.shape(places))

    def _round_keys(self) -> NDArray[np.uint64]:
        label = f"megads order\0{self.seed}\0{self.name}\0{self.epoch}\0{self.size}"
        digest = hashlib.blake2b(label.encode("utf-8"), digest_size=8 * NUM_ROUNDS).digest()
        return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: NDArray[np.uint64], *, half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`NUM_ROUNDS` rounds over values of 2 * half bits."""
    width, drop = np.uint64(half), np.uint64(64 - half)
    mask = np.uint64((1 << half) - 1)
    left, right = values >> width, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right, key) >> drop)
    return (left << width) | right


def _unfeistel(values: NDArray[np.uint64], *, half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The inverse of `_feistel`: its rounds backwards."""
    width, drop = np.uint64(half), np.uint64(64 - half)
    left, right = values >> width, values & np.uint64((1 << half) - 1)
    for key in keys[::-1]:
        left, right = right ^ (_mixed(left, key) >> drop), left
    return (left << width) | right


def _mixed(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """F of a round: 64 bits of which the upper ones are used."""
    mixed = (values ^ key) * MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(29)
    mixed *= MULTIPLIERS[1]
    mixed ^= mixed >> np.uint64(32)
    mixed *= MULTIPLIERS[0]
    return mixed


@dataclass(frozen=True, slots=True)
class PageStream:
    """The endless sequence of a corpus' pages: epoch 0 in one order, epoch 1 in another, and so on."""

    num_pages: int
    seed: int
    name: str

    def pages(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which page of the corpus stands at each place `numbers` (>= 0) of the stream; same shape, int64."""
        epochs, within = np.divmod(np.asarray(numbers, dtype=np.int64), self.num_pages)
        placed = np.empty_like(within)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            permutation = Permutation(self.num_pages, self.seed, self.name, int(epoch))
            placed[chosen] = permutation(within[chosen])
        return placed

    def places(self, page: int, *, num_epochs: int) -> NDArray[np.int64]:
        """Where `page` stands in each of the first epochs: [num_epochs] numbers of the stream, int64."""
        within = [
            Permutation(self.num_pages, self.seed, self.name, epoch).inverse(np.array([page]))
            for epoch in range(num_epochs)
        ]
        return np.array(within, dtype=np.int64).ravel() + self.num_pages * np.arange(num_epochs)
