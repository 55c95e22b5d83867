"""The history of a run: which tokens of which corpus stream every step reads.

Lives here: `Segment`, how a history grows, and the arithmetic from (segment, step) to stretches of corpus streams and
back. Does not live here: the blend of a mix (blend), the order of pages within a corpus (order), when a config asks
for a change (plan) and reading (loader).

    history       segment 0              segment 1: other batch, length, mix or corpora      segment 2
    steps         1 ..................99 100 ........................................... 249 250 ...
    corpus A      cursor 0               cursor 811008 (tokens of A's page stream)           cursor ...

A corpus' stream is its pages, one epoch's permutation after another, seen as one line of tokens. A cursor counts
tokens on that line. Sample j of a corpus within a segment is [cursor + j * length, cursor + (j + 1) * length).

Where a segment ends inside a page and the next one reads longer samples, these begin at the next edge, so that no
sample holds halves of two pages for the rest of the run. The stretch that was passed over is a *rest* of the corpus:
rests follow one another on a line of their own, and as soon as they fill a sample, a segment's first samples read
them. So nothing is lost or repeated whatever changes: reads and rests together are [0, cursor).

    page edges    |       |       |       |
    stream        aaaaaaaaaa......bbbbbbbbbbbbbbbb        a: samples of an earlier segment, b: of this one
                            rest  cursor of this one
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megads.data.blend import Assignment, Blend
from megads.errors import DataError

PackingKind = Literal["cut", "best_fit"]
Stretch = tuple[int, int]
"""Tokens [start, stop) of a corpus' stream."""


@dataclass(frozen=True, slots=True)
class CorpusShare:
    """One corpus in a segment. Weight 0: out of the mix for now, its cursor kept."""

    path: str
    fingerprint: str
    weight: float
    cursor: int = 0
    """Tokens of the corpus' page stream that earlier segments consumed or passed over."""
    rests: tuple[Stretch, ...] = ()
    """What they passed over; ascending, disjoint, before the cursor."""

    def __post_init__(self) -> None:
        if type(self.cursor) is not int or self.cursor < 0:
            raise DataError("impossible cursor of a corpus", found=self.cursor, allowed="0 or more tokens")
        edges = [edge for rest in self.rests for edge in rest]
        if edges != sorted(edges) or min(edges, default=0) < 0 or max(edges, default=0) > self.cursor:
            raise DataError(
                "impossible rests of a corpus", found=self.rests, allowed=f"ascending, in [0, {self.cursor}]"
            )

    @property
    def num_resting(self) -> int:
        """Tokens of the rests."""
        return sum(stop - start for start, stop in self.rests)

    def stretches(self, index: int, length: int) -> list[Stretch]:
        """Where sample `index` of the corpus in a segment of samples of `length` tokens lies on the stream."""
        from_rests = self.num_resting // length
        if index >= from_rests:
            start = self.cursor + (index - from_rests) * length
            return [(start, start + length)]
        return _part(self.rests, index * length, stop=(index + 1) * length)

    def index(self, token: int, length: int) -> int | None:
        """The sample that reads a token of the stream: the inverse of `stretches`; None: it is read before or later."""
        from_rests = self.num_resting // length
        if token >= self.cursor:
            return from_rests + (token - self.cursor) // length
        passed = 0
        for start, stop in self.rests:
            if start <= token < stop:
                index = (passed + token - start) // length
                return index if index < from_rests else None
            passed += stop - start
        return None

    def after(self, num_samples: int, length: int) -> CorpusShare:
        """The share when `num_samples` samples of `length` tokens were read."""
        from_rests = self.num_resting // length
        rests = _part(self.rests, min(num_samples, from_rests) * length, stop=self.num_resting)
        cursor = self.cursor + max(0, num_samples - from_rests) * length
        return replace(self, cursor=cursor, rests=tuple(rests))

    def aligned(self, length: int, page: int) -> CorpusShare:
        """The share whose next samples of `length` tokens do not begin inside a page where they need not."""
        unit = page if length % page == 0 else length if page % length == 0 else 1
        edge = -(-self.cursor // unit) * unit
        if edge == self.cursor:
            return self
        return replace(self, cursor=edge, rests=(*self.rests, (self.cursor, edge)))


def _part(stretches: Iterable[Stretch], start: int, *, stop: int) -> list[Stretch]:
    """Tokens start..stop-1 of the line that the stretches make one after another."""
    found = []
    passed = 0
    for begin, end in stretches:
        first, last = begin + max(0, start - passed), min(end, begin + stop - passed)
        if first < last:
            found.append((first, last))
        passed += end - begin
    return found


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
    num_mixed: int = 0
    """Samples that earlier segments with the same weights read: the blend goes on behind them."""
    packing: PackingKind = "cut"
    """What a page is: `page` tokens in a row, or a row of documents of the corpus' PREFIX.pack-`page`."""

    def __post_init__(self) -> None:
        sizes = (self.first_step, self.batch_size, self.sequence_length, self.page, self.num_mixed + 1)
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise DataError("impossible segment", found=self, allowed="whole steps and sizes, 1 or more")
        if self.packing not in ("cut", "best_fit"):
            raise DataError("impossible packing of a segment", found=self.packing, allowed="cut, best_fit")
        if self.packing == "best_fit" and self.page != self.sequence_length:
            raise DataError(
                "data.packing best_fit has rows of one length",
                found=f"sequence_length {self.sequence_length}, page {self.page}",
                allowed="equal ones",
            )
        edges = [edge for pair in self.skipped for edge in pair]
        if edges != sorted(edges) or min(edges, default=0) < 0:
            raise DataError("skipped ranges are not ascending and disjoint", found=self.skipped)
        self.blend()  # refuses impossible weights

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able value; `from_dict` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Segment:
        """Rebuild a segment. Raises DataError where a field is missing, unknown or impossible."""
        try:
            fields = dict(value)
            fields["corpora"] = tuple(
                CorpusShare(**{**share, "rests": _pairs(share.get("rests", ()))})
                for share in fields["corpora"]
            )
            fields["skipped"] = _pairs(fields.get("skipped", ()))
            return Segment(**fields)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise DataError("a segment of the history cannot be read", found=error) from error

    def samples(self, step: int, *, start: int, stop: int) -> NDArray[np.int64]:
        """Numbers within the segment of the samples `start..stop-1` of a step's batch, int64."""
        first = (step - self.first_step) * self.batch_size
        return self._unskipped(np.arange(first + start, first + stop, dtype=np.int64))

    def place(self, sample: int) -> tuple[int, int] | None:
        """(step, row of its batch) of a sample of the segment: the inverse of `samples`; None: it is skipped."""
        skipped = 0
        for start, stop in self.skipped:
            if start <= sample < stop:
                return None
            skipped += max(0, min(stop, sample) - start)
        steps, row = divmod(sample - skipped, self.batch_size)
        return self.first_step + steps, row

    def assign(self, samples: NDArray[np.int64]) -> Assignment:
        """Corpus of each sample of the segment, and its number among the segment's samples of that corpus."""
        assignment = self.blend().assign(samples + self.num_mixed)
        before = np.array(self.blend().counts(self.num_mixed), dtype=np.int64)
        return Assignment(assignment.corpus, assignment.index - before[assignment.corpus])

    def sample(self, corpus: int, index: int) -> int:
        """The sample of the segment that is sample `index` of a corpus in it: the inverse of `assign`."""
        blend = self.blend()
        return blend.number(corpus, index + blend.counts(self.num_mixed)[corpus]) - self.num_mixed

    def shares(self, step: int) -> tuple[CorpusShare, ...]:
        """Each corpus as it stands when `step` (>= first_step) begins."""
        num_samples = self.num_samples(step)
        blend = self.blend()
        before, after = blend.counts(self.num_mixed), blend.counts(self.num_mixed + num_samples)
        return tuple(
            share.after(last - first, self.sequence_length)
            for share, first, last in zip(self.corpora, before, after, strict=True)
        )

    def cursors(self, step: int) -> tuple[int, ...]:
        """The cursor of each corpus when `step` (>= first_step) begins, in tokens."""
        return tuple(share.cursor for share in self.shares(step))

    def blend(self) -> Blend:
        """The blend of this segment's weights."""
        return Blend(tuple(share.weight for share in self.corpora))

    def followed_by(self, wanted: Segment) -> Segment:
        """`wanted` from its first step on, with every corpus where this segment leaves it."""
        stood = {share.fingerprint: share for share in self.shares(wanted.first_step)}
        none = CorpusShare("", "", 0.0)
        shares = [
            replace(share, cursor=old.cursor, rests=old.rests)
            for share in wanted.corpora
            for old in [stood.get(share.fingerprint, none)]
        ]
        present = {share.fingerprint for share in shares}
        shares += [replace(share, weight=0.0) for name, share in stood.items() if name not in present]
        aligned = [share.aligned(wanted.sequence_length, wanted.page) for share in shares]
        same_mix = self._weights() == tuple((share.fingerprint, share.weight) for share in shares)
        num_mixed = self.num_mixed + self.num_samples(wanted.first_step) if same_mix else 0
        return replace(wanted, corpora=tuple(aligned), num_mixed=num_mixed)

    def num_samples(self, step: int) -> int:
        """Samples of the segment that the steps before `step` read or skipped."""
        return int(self.samples(step, start=0, stop=1)[0])

    def goes_on_as(self, wanted: Segment) -> bool:
        """Whether steps of `wanted`, which follows this segment, read what this segment would read."""
        plans = [
            (segment.batch_size, segment.sequence_length, segment._weights()) for segment in (self, wanted)
        ]
        return plans[0] == plans[1] and not wanted.skipped

    def _weights(self) -> tuple[tuple[str, float], ...]:
        return tuple((share.fingerprint, share.weight) for share in self.corpora)

    def _unskipped(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        for start, stop in self.skipped:
            numbers = np.where(numbers >= start, numbers + (stop - start), numbers)
        return numbers


def _pairs(values: Iterable[Sequence[int]]) -> tuple[Stretch, ...]:
    return tuple((int(start), int(stop)) for start, stop in values)


def segment_at(history: Sequence[Segment], step: int) -> Segment:
    """The segment that `step` belongs to. Raises DataError before the first."""
    for segment in reversed(history):
        if segment.first_step <= step:
            return segment
    raise DataError("the history has no segment for this step", found=step, allowed="a step from 1")


def tokens_by(history: Sequence[Segment], step: int) -> int:
    """Tokens that steps 1 .. `step` read, the padding of packed rows included."""
    total = 0
    for number, segment in enumerate(history):
        following = history[number + 1].first_step if number + 1 < len(history) else step + 1
        num_steps = min(following, step + 1) - segment.first_step
        total += max(0, num_steps) * segment.batch_size * segment.sequence_length
    return total


def stream_tokens(history: Sequence[Segment], steps: range) -> int:
    """Tokens of the corpora that `steps` read or that were skipped before them: what lies between two places."""
    total = 0
    for number, segment in enumerate(history):
        following = history[number + 1].first_step if number + 1 < len(history) else steps.stop
        first, stop = max(steps.start, segment.first_step), min(steps.stop, following)
        if first < stop:
            before = 0 if first == segment.first_step else segment.num_samples(first)
            total += (segment.num_samples(stop) - before) * segment.sequence_length
    return total


def extend_history(history: Sequence[Segment], wanted: Segment) -> tuple[Segment, ...]:
    """The history of a run that goes on as `wanted` from step `wanted.first_step`.

    Later segments are cut off (the run resumes before them). If nothing differs, no row is added. The cursors of
    `wanted` are ignored: each corpus goes on where it stood, a new one at 0, and one that left the mix is kept with
    weight 0.

    Raises:
        DataError: the page or the packing changed, or a corpus' files are not those the run began with.
    """
    kept = tuple(segment for segment in history if segment.first_step < wanted.first_step)
    replaced = tuple(segment for segment in history if segment.first_step == wanted.first_step)
    if not kept and not replaced:
        if wanted.first_step != 1:
            raise DataError("a history begins with step 1", found=wanted.first_step, allowed=1)
        return (wanted,)
    last = (*kept, *replaced)[-1]
    _check_same_stream(last, wanted)
    following = kept[-1].followed_by(wanted) if kept else wanted
    if last.goes_on_as(following):
        return (*kept, *replaced)
    return kept if kept and kept[-1].goes_on_as(following) else (*kept, following)


def _check_same_stream(last: Segment, wanted: Segment) -> None:
    """Refuse what would make another stream of a corpus that was read in part."""
    if last.page != wanted.page:
        raise DataError(
            "data.page cannot change during a run",
            found=wanted.page,
            allowed=last.page,
            do=f"set data.page={last.page} (null means data.sequence_length, which has changed)"
            if wanted.page == wanted.sequence_length
            else "keep it",
        )
    if last.packing != wanted.packing:
        raise DataError("data.packing cannot change during a run", found=wanted.packing, allowed=last.packing)
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
