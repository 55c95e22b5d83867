"""The weighted blend: which corpus sample i of a mix comes from, and the how manieth of that corpus it is.

Lives here: the arithmetic, both ways. Does not live here: when a mix changes (segment) and the order of pages within a
corpus (order).

The blend is exact and needs no index: corpora are the leaves of a balanced binary tree, and at each node
round(i * share of the left side) of its first i samples go left. So among the first i samples of a mix a corpus has
its due share to within half a sample for each level of the tree (two corpora: 1/2, up to four: 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megads.errors import DataError

SHARE_BITS = 32
"""A share at a node is a multiple of 2 ** -SHARE_BITS."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """For each sample: its corpus, and its number among that corpus' samples; both [num samples] int64."""

    corpus: NDArray[np.int64]
    index: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Blend:
    """Interleave corpora by weight: a pure function of the sample's number, O(log corpora) a sample.

    Weights are relative; a weight of 0 gets no sample.

    Raises:
        DataError: a weight is negative, not finite, or too small beside the others to be kept exactly.
    """

    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for weight in self.weights:
            if not (math.isfinite(weight) and weight >= 0):
                raise DataError("impossible weight of a corpus", found=weight, allowed="a number, 0 or more")
        if not sum(self.weights) > 0:
            raise DataError("no corpus has a weight above 0", found=self.weights)
        self._check_shares(self._mixed())

    def assign(self, samples: NDArray[np.int64]) -> Assignment:
        """Corpus and index for each sample number [num samples], in any order."""
        corpus = np.empty(samples.size, dtype=np.int64)
        index = np.empty(samples.size, dtype=np.int64)
        where = np.arange(samples.size)
        self._descend(self._mixed(), samples.astype(np.int64), where, Assignment(corpus, index))
        return Assignment(corpus, index)

    def counts(self, num_samples: int) -> tuple[int, ...]:
        """How many of the first `num_samples` samples each corpus has."""
        counts = [0] * len(self.weights)
        pending = [(self._mixed(), num_samples)]
        while pending:
            leaves, number = pending.pop()
            if len(leaves) == 1:
                counts[leaves[0]] = number
                continue
            left, right = _halves(leaves)
            to_left = int(_num_left(np.array([number], dtype=np.int64), self._share(leaves))[0])
            pending += [(left, to_left), (right, number - to_left)]
        return tuple(counts)

    def number(self, corpus: int, index: int) -> int:
        """The number of the sample that is sample `index` of `corpus`: the inverse of `assign`."""
        path = []
        leaves = self._mixed()
        while len(leaves) > 1:
            left, right = _halves(leaves)
            share = self._share(leaves)
            path.append((corpus in left, share))
            leaves = left if corpus in left else right
        for is_left, share in reversed(path):
            index = _number_of(index, share if is_left else (1 << SHARE_BITS) - share, is_left=is_left)
        return index

    def _mixed(self) -> tuple[int, ...]:
        return tuple(i for i, weight in enumerate(self.weights) if weight > 0)

    def _share(self, leaves: tuple[int, ...]) -> int:
        """The left half's part of a node, in units of 2 ** -SHARE_BITS."""
        left, _ = _halves(leaves)
        part = math.fsum(self.weights[i] for i in left) / math.fsum(self.weights[i] for i in leaves)
        return round(part * (1 << SHARE_BITS))

    def _check_shares(self, leaves: tuple[int, ...]) -> None:
        if len(leaves) == 1:
            return
        if not 0 < self._share(leaves) < 1 << SHARE_BITS:
            raise DataError(
                "the weights of the corpora differ by too much",
                found=", ".join(f"{self.weights[i]:g}" for i in leaves),
                allowed=f"no weight below 2**-{SHARE_BITS} of the others",
            )
        for half in _halves(leaves):
            self._check_shares(half)

    def _descend(
        self,
        leaves: tuple[int, ...],
        numbers: NDArray[np.int64],
        where: NDArray[np.int64],
        result: Assignment,
    ) -> None:
        """Fill `result` at the places `where`, which are samples `numbers` of the node over `leaves`."""
        if len(leaves) == 1:
            result.corpus[where] = leaves[0]
            result.index[where] = numbers
            return
        left, right = _halves(leaves)
        share = self._share(leaves)
        before = _num_left(numbers, share)
        goes_left = _num_left(numbers + 1, share) > before
        self._descend(left, before[goes_left], where[goes_left], result)
        self._descend(right, (numbers - before)[~goes_left], where[~goes_left], result)


def _halves(leaves: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    middle = len(leaves) // 2
    return leaves[:middle], leaves[middle:]


def _num_left(numbers: NDArray[np.int64], share: int) -> NDArray[np.int64]:
    """round(number * share / 2 ** SHARE_BITS), exact to number < 2 ** 63 / share * 2 ** SHARE_BITS."""
    bits, factor = np.uint64(SHARE_BITS), np.uint64(share)
    unsigned = numbers.astype(np.uint64)
    high, low = unsigned >> bits, unsigned & np.uint64((1 << SHARE_BITS) - 1)
    rounded = (low * factor + np.uint64(1 << (SHARE_BITS - 1))) >> bits
    return (high * factor + rounded).astype(np.int64)


def _number_of(index: int, share: int, *, is_left: bool) -> int:
    """The sample of a node that is sample `index` of one side, whose part is `share` * 2 ** -SHARE_BITS.

    Of the first n the left side has floor(n * share + 1/2), the right side what is left: ceil(n * share - 1/2).
    """
    half = 1 << (SHARE_BITS - 1)
    if is_left:
        return -(-(((index + 1) << SHARE_BITS) - half) // share) - 1
    return ((index << SHARE_BITS) + half) // share


def temperature_weights(sizes: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Relative weights size ** (1 / temperature): 1 is by size, a high temperature is nearly alike (mT5, section 3.1).

    Twelve digits are kept, so that the last bit of a host's pow() does not matter.
    """
    largest = max(sizes)
    return tuple(float(f"{(size / largest) ** (1.0 / temperature):.12g}") for size in sizes)
