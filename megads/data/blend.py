"""The history of a run and the weighted blend: which tokens of which corpus sample i of a segment reads.

Lives here: `Segment`, how a history grows, and the arithmetic from (segment, step) to token ranges of corpus
streams. Does not live here: the order of pages within a corpus (order) and reading (loader).

    history       segment 0              segment 1: other batch, length, mix or corpora      segment 2
    steps         1 ..................99 100 ........................................... 249 250 ...
    corpus A      cursor 0               cursor 811008 (tokens of A's page stream)           cursor ...

A corpus' stream is its pages, one epoch's permutation after another, seen as one line of tokens. A cursor
counts tokens on that line. Sample j of a corpus within a segment is [cursor + j * length, cursor + (j + 1) *
length): so a page that a segment leaves half used is continued by the next one, and nothing is lost or
repeated whatever changes.

The blend is exact and needs no index: corpora are the leaves of a balanced binary tree, and at each node
round(i * share of the left side) of its first i samples go left. So among the first i samples of a segment a
corpus has its due share to within half a sample for each level of the tree (two corpora: 1/2, up to four: 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megads.errors import DataError

SHARE_BITS = 32
"""A share at a node is a multiple of 2 ** -SHARE_BITS."""


@dataclass(frozen=True, slots=True)
class CorpusShare:
    """One corpus in a segment. Weight 0: out of the mix for now, its cursor kept."""

    path: str
    fingerprint: str
    weight: float
    cursor: int = 0
    """Tokens of the corpus' page stream that earlier segments consumed."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of steps, from `first_step` on, in which nothing about the data changes."""

    first_step: int
    batch_size: int
    """Samples of one step, over all ranks."""
    sequence_length: int
    page: int
    """Tokens of the unit that is permuted; the same in all segments of a history."""
    corpora: tuple[CorpusShare, ...]
    skipped: tuple[tuple[int, int], ...] = ()
    """Ranges [start, stop) of this segment's samples that no step reads; ascending, disjoint."""

    def __post_init__(self) -> None:
        sizes = (self.first_step, self.batch_size, self.sequence_length, self.page)
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise DataError("impossible segment", found=self, allowed="whole steps and sizes, 1 or more")
        if self.page % self.sequence_length and self.sequence_length % self.page:
            raise DataError(
                "data.sequence_length and data.page do not fit",
                found=f"sequence_length {self.sequence_length}, page {self.page}",
                allowed="a sample is a whole number of pages, or an equal cut of one",
            )
        edges = [edge for pair in self.skipped for edge in pair]
        if edges != sorted(edges) or min(edges, default=0) < 0:
            raise DataError("skipped ranges are not ascending and disjoint", found=self.skipped)
        if not all(type(share.cursor) is int and share.cursor >= 0 for share in self.corpora):
            raise DataError("impossible cursor of a corpus", found=self.corpora, allowed="0 or more tokens")
        self.blend()  # refuses impossible weights

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able value; `from_dict` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Segment:
        """Rebuild a segment. Raises DataError where a field is missing, unknown or impossible."""
        try:
            fields = dict(value)
            fields["corpora"] = tuple(CorpusShare(**share) for share in fields["corpora"])
            fields["skipped"] = tuple((int(start), int(stop)) for start, stop in fields.get("skipped", ()))
            return Segment(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise DataError("a segment of the history cannot be read", found=error) from error

    def samples(self, step: int, *, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers within the segment of the samples `start..stop-1` of a step's batch, int64."""
        first = (step - self.first_step) * self.batch_size
        return self._unskipped(np.arange(first + start, first + stop, dtype=np.int64))

    def cursors(self, step: int) -> tuple[int, ...]:
        """The cursor of each corpus when `step` (>= first_step) begins, in tokens."""
        num_samples = int(self.samples(step, start=0, stop=1)[0])
        counts = self.blend().counts(num_samples)
        return tuple(
            share.cursor + count * self.sequence_length
            for share, count in zip(self.corpora, counts, strict=True)
        )

    def blend(self) -> Blend:
        """The blend of this segment's weights."""
        return Blend(tuple(share.weight for share in self.corpora))

    def _unskipped(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        for start, stop in self.skipped:
            numbers = np.where(numbers >= start, numbers + (stop - start), numbers)
        return numbers


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


def segment_at(history: Sequence[Segment], step: int) -> Segment:
    """The segment that `step` belongs to. Raises DataError before the first."""
    for segment in reversed(history):
        if segment.first_step <= step:
            return segment
    raise DataError("the history has no segment for this step", found=step, allowed="a step from 1")


def tokens_by(history: Sequence[Segment], step: int) -> int:
    """Tokens that steps 1 .. `step` read."""
    total = 0
    for number, segment in enumerate(history):
        following = history[number + 1].first_step if number + 1 < len(history) else step + 1
        num_steps = min(following, step + 1) - segment.first_step
        total += max(0, num_steps) * segment.batch_size * segment.sequence_length
    return total


def extend_history(history: Sequence[Segment], wanted: Segment) -> tuple[Segment, ...]:
    """The history of a run that goes on as `wanted` from step `wanted.first_step`.

    Later segments are cut off (the run resumes before them). If nothing differs, no row is added. The cursors
    of `wanted` are ignored: each corpus goes on where it stood, a new one at 0, and one that left the mix is
    kept with weight 0.

    Raises:
        DataError: the page changed, or a corpus' files are not those the run began with.
    """
    kept = tuple(segment for segment in history if segment.first_step < wanted.first_step)
    replaced = [segment for segment in history if segment.first_step == wanted.first_step]
    if not kept and not replaced:
        if wanted.first_step != 1:
            raise DataError("a history begins with step 1", found=wanted.first_step, allowed=1)
        return (wanted,)
    last = replaced[0] if replaced else kept[-1]
    if last.page != wanted.page:
        raise DataError(
            "data.page cannot change during a run",
            found=wanted.page,
            allowed=last.page,
            do="keep data.page (null means data.sequence_length; set it when the sequence length changes)",
        )
    _check_same_files(last, wanted)
    cursors = last.cursors(wanted.first_step)
    stood = {share.fingerprint: cursor for share, cursor in zip(last.corpora, cursors, strict=True)}
    shares = [
        CorpusShare(share.path, share.fingerprint, share.weight, stood.get(share.fingerprint, 0))
        for share in wanted.corpora
    ]
    present = {share.fingerprint for share in shares}
    shares += [
        CorpusShare(share.path, share.fingerprint, 0.0, stood[share.fingerprint])
        for share in last.corpora
        if share.fingerprint not in present
    ]
    if not wanted.skipped and _plan(last) == _plan(wanted, shares):
        return (*kept, *replaced)
    segment = Segment(
        wanted.first_step,
        wanted.batch_size,
        wanted.sequence_length,
        wanted.page,
        tuple(shares),
        wanted.skipped,
    )
    return (*kept, segment)


def _plan(segment: Segment, shares: Sequence[CorpusShare] | None = None) -> tuple[object, ...]:
    """What two segments must share so that the second need not be written down."""
    corpora = segment.corpora if shares is None else shares
    weights = tuple((share.fingerprint, share.weight) for share in corpora)
    return segment.batch_size, segment.sequence_length, weights


def _check_same_files(last: Segment, wanted: Segment) -> None:
    began = {share.path: share.fingerprint for share in last.corpora}
    for share in wanted.corpora:
        expected = began.get(share.path, share.fingerprint)
        if expected != share.fingerprint:
            raise DataError(
                f"{share.path}: the corpus is not the one this run began with",
                found=f"fingerprint {share.fingerprint[:16]}",
                allowed=f"fingerprint {expected[:16]}",
                do="put the old files back, or give the new corpus another name and list both",
            )
