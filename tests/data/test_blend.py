"""The blend is exact at every prefix, and a history moves the cursors without losing or repeating a token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.blend import Blend, CorpusShare, Segment, extend_history, segment_at
from megads.errors import DataError

MakeSegment = Callable[..., Segment]


def share(name: str, weight: float = 1.0, cursor: int = 0) -> CorpusShare:
    return CorpusShare(f"/data/{name}", f"print of {name}", weight, cursor)


def segment(
    first_step: int, *shares: CorpusShare, batch: int = 8, length: int = 64, page: int = 64
) -> Segment:
    return Segment(first_step, batch, length, page, shares or (share("a", 0.7), share("b", 0.3)))


def deviations(weights: tuple[float, ...], num_samples: int) -> np.ndarray:
    """|count - due share| of each corpus after each number of samples: [corpora, num_samples]."""
    assignment = Blend(weights).assign(np.arange(num_samples))
    counts = np.stack([np.cumsum(assignment.corpus == c) for c in range(len(weights))])
    due = np.outer(np.array(weights) / sum(weights), np.arange(1, num_samples + 1))
    return np.abs(counts - due)


@pytest.mark.parametrize("weights", [(1, 1), (0.3, 0.7), (1, 999), (0.123456, 3.0), (5, 0, 2)])
def test_two_corpora_are_within_half_a_sample_at_every_prefix(weights: tuple[float, ...]) -> None:
    assert deviations(weights, 20000).max() <= 0.5 + 1e-4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=12))
def test_more_corpora_are_within_half_a_sample_a_level(weights: list[float]) -> None:
    levels = math.ceil(math.log2(len(weights)))
    assert deviations(tuple(weights), 3000).max() <= 0.5 * levels + 1e-4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.integers(1, 3000))
def test_each_corpus_counts_its_samples_without_gap(weights: list[float], num_samples: int) -> None:
    if not any(weights) or min(w for w in weights if w > 0) < 1e-6 * max(weights):
        return
    blend = Blend(tuple(weights))
    assignment = blend.assign(np.arange(num_samples))
    counts = blend.counts(num_samples)
    assert sum(counts) == num_samples
    for corpus, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        index = assignment.index[assignment.corpus == corpus]
        assert np.array_equal(index, np.arange(count))
        assert weight > 0 or count == 0


def test_assignment_far_out_equals_the_exact_arithmetic() -> None:
    """At 10 ** 12 samples, beyond what a product of 64 bits would hold."""
    start = 10**12
    assignment = Blend((0.3, 0.7)).assign(np.arange(start, start + 1000))
    factor = round(0.3 * 2**32)
    for sample, corpus, index in zip(
        range(start, start + 1000), assignment.corpus, assignment.index, strict=True
    ):
        before, after = ((n * factor + 2**31) >> 32 for n in (sample, sample + 1))
        assert corpus == (0 if after > before else 1)
        assert index == (before if corpus == 0 else sample - before)


@pytest.mark.parametrize(
    "weights", [(), (0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0), (1e-12, 1.0)]
)
def test_impossible_weights_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="weight"):
        Blend(weights)


def test_segment_survives_json() -> None:
    first = Segment(3, 8, 64, 128, (share("a", 0.7, 640), share("b", 0.3)), ((5, 9), (12, 20)))
    assert Segment.from_dict(json.loads(json.dumps(first.to_dict()))) == first


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": "8"},
        {"extra": 1},
        {"corpora": 3},
        {"page": 0},
        {"skipped": [[5, 3]]},
        {"first_step": 0},
    ],
)
def test_damaged_segments_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(DataError):
        Segment.from_dict({**segment(1).to_dict(), **change})


@pytest.mark.parametrize(("length", "page"), [(64, 96), (96, 64), (100, 64)])
def test_lengths_that_do_not_fit_pages_are_refused(length: int, page: int) -> None:
    with pytest.raises(DataError, match=r"sequence_length.*\n.*page"):
        segment(1, length=length, page=page)


def test_skipped_samples_are_read_by_no_step() -> None:
    plain = segment(1, batch=4)
    skipping = Segment(1, 4, 64, 64, plain.corpora, ((4, 8), (9, 13)))
    read = np.concatenate([skipping.samples(step, start=0, stop=4) for step in range(1, 6)])
    assert read.tolist() == [0, 1, 2, 3, 8, 13, 14, 15, *range(16, 28)]
    assert skipping.cursors(2) == plain.cursors(3)  # step 2 begins behind the first skipped range


def test_history_moves_cursors_by_what_was_read() -> None:
    history = extend_history((), segment(1))
    history = extend_history(history, segment(11, batch=16))
    counts = Blend((0.7, 0.3)).counts(80)
    assert [part.cursor for part in history[1].corpora] == [count * 64 for count in counts]
    assert segment_at(history, 10) == history[0]
    assert segment_at(history, 11) == history[1]


def test_history_grows_only_when_something_changes() -> None:
    history = extend_history((), segment(1))
    assert extend_history(history, segment(50)) == history
    assert len(extend_history(history, segment(50, batch=4))) == 2


def test_resume_before_a_change_cuts_the_history_back() -> None:
    history = extend_history(extend_history((), segment(1)), segment(20, batch=16))
    assert extend_history(history, segment(15)) == history[:1]
    assert extend_history(history, segment(20, batch=16)) == history
    replaced = extend_history(history, segment(20, batch=32))
    assert [part.batch_size for part in replaced] == [8, 32]
    assert replaced[1].corpora == history[1].corpora


def test_a_corpus_that_leaves_and_returns_goes_on_where_it_stood() -> None:
    history = extend_history((), segment(1))
    history = extend_history(history, segment(11, share("a"), share("c")))
    a, c, b = history[-1].corpora
    assert (c.cursor, b.weight) == (0, 0.0)
    assert b.cursor == history[0].cursors(11)[1] > 0
    history = extend_history(history, segment(21, share("a"), share("b")))
    assert history[-1].corpora[1] == share("b", 1.0, b.cursor)
    assert history[-1].corpora[0].cursor > a.cursor


def test_an_exchanged_corpus_is_refused_naming_both_prints() -> None:
    history = extend_history((), segment(1))
    exchanged = CorpusShare("/data/a", "print of another", 1.0)
    with pytest.raises(DataError, match=r"/data/a.*\n.*print of another\n.*print of a"):
        extend_history(history, segment(11, exchanged))


def test_page_cannot_change() -> None:
    with pytest.raises(DataError, match=r"data\.page"):
        extend_history(extend_history((), segment(1)), segment(11, page=128))


def test_steps_before_the_history_are_refused() -> None:
    with pytest.raises(DataError):
        segment_at(extend_history((), segment(1)), 0)
    with pytest.raises(DataError):
        extend_history((), segment(5))
