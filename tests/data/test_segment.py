"""A history moves the cursors without losing or repeating a token, whatever changes; every arrow has its inverse."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.blend import Blend
from megads.data.segment import CorpusShare, Segment, extend_history, segment_at
from megads.errors import DataError


def share(name: str, weight: float = 1.0, cursor: int = 0) -> CorpusShare:
    return CorpusShare(f"/data/{name}", f"print of {name}", weight, cursor)


def segment(
    first_step: int, *shares: CorpusShare, batch: int = 8, length: int = 64, page: int = 64
) -> Segment:
    return Segment(first_step, batch, length, page, shares or (share("a", 0.7), share("b", 0.3)))


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


def test_a_planned_change_that_is_no_longer_wanted_leaves_no_row() -> None:
    history = extend_history(extend_history((), segment(1)), segment(20, batch=16))
    assert extend_history(history, segment(20)) == history[:1]


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
    with pytest.raises(DataError, match=r"data\.page .*\n.*128\n.*64\n.*set data\.page=64"):
        extend_history(extend_history((), segment(1)), segment(11, page=128, length=128))


def test_steps_before_the_history_are_refused() -> None:
    with pytest.raises(DataError):
        segment_at(extend_history((), segment(1)), 0)
    with pytest.raises(DataError):
        extend_history((), segment(5))


def test_packing_cannot_change_and_has_rows_of_one_length() -> None:
    packed = Segment(1, 8, 64, 64, (share("a"),), packing="best_fit")
    with pytest.raises(DataError, match=r"data\.packing"):
        extend_history((packed,), segment(11, share("a")))
    with pytest.raises(DataError, match="rows of one length"):
        Segment(1, 8, 32, 64, (share("a"),), packing="best_fit")


PAGE = 16
changes = st.lists(
    st.tuples(
        st.integers(1, 5),  # steps
        st.integers(1, 9),  # batch
        st.sampled_from([1, 2, 3, 5, 8, 12, 16, 24, 32, 48, 64]),  # sequence length
        st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=3, max_size=3).filter(any),
    ),
    min_size=1,
    max_size=8,
)
Changes = list[tuple[int, int, int, list[float]]]


def history_of(plan: Changes) -> tuple[tuple[Segment, ...], int]:
    """The history of these changes, and the step behind its last."""
    history: tuple[Segment, ...] = ()
    step = 1
    for num_steps, batch, length, weights in plan:
        mix = [share(name, weight) for name, weight in zip("abc", weights, strict=True) if weight]
        history = extend_history(history, Segment(step, batch, length, PAGE, tuple(mix)))
        step += num_steps
    return history, step


def stretches_of(segment: Segment, step: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """(corpus, stretches of its stream) of each row of a step."""
    assignment = segment.assign(segment.samples(step, start=0, stop=segment.batch_size))
    return [
        (corpus, segment.corpora[corpus].stretches(index, segment.sequence_length))
        for corpus, index in zip(assignment.corpus.tolist(), assignment.index.tolist(), strict=True)
    ]


@settings(max_examples=150, deadline=None)
@given(changes)
def test_reads_and_rests_are_the_head_of_every_stream_exactly_once(plan: Changes) -> None:
    history, stop = history_of(plan)
    read: dict[str, Counter[int]] = {f"print of {name}": Counter() for name in "abc"}
    for step in range(1, stop):
        part = segment_at(history, step)
        for corpus, stretches in stretches_of(part, step):
            assert sum(last - first for first, last in stretches) == part.sequence_length
            for first, last in stretches:
                read[part.corpora[corpus].fingerprint].update(range(first, last))
    for left in history[-1].shares(stop):
        seen = read[left.fingerprint]
        for first, last in left.rests:
            seen.update(range(first, last))
        assert sorted(seen.elements()) == list(range(left.cursor))
        assert left.num_resting < 2 * max(PAGE, 64)


@settings(max_examples=150, deadline=None)
@given(changes)
def test_samples_lie_in_whole_pages_or_equal_cuts_of_one(plan: Changes) -> None:
    """But for those made of rests, and for lengths that fit no page."""
    history, _ = history_of(plan)
    for part in history:
        length = part.sequence_length
        unit = PAGE if length % PAGE == 0 else length
        if length % PAGE and PAGE % length:
            continue
        for step in range(part.first_step, part.first_step + 3):
            for corpus, stretches in stretches_of(part, step):
                ((first, last), *_) = stretches
                is_rest = first < part.corpora[corpus].cursor
                assert is_rest or (len(stretches) == 1 and first % unit == last % unit == 0)


@settings(max_examples=100, deadline=None)
@given(changes, st.data())
def test_every_arrow_has_its_inverse(plan: Changes, data: st.DataObject) -> None:
    history, stop = history_of(plan)
    step = data.draw(st.integers(1, stop - 1))
    part = segment_at(history, step)
    row = data.draw(st.integers(0, part.batch_size - 1))
    corpus, stretches = stretches_of(part, step)[row]
    for first, last in stretches:
        token = data.draw(st.integers(first, last - 1))
        index = part.corpora[corpus].index(token, part.sequence_length)
        assert index is not None
        assert part.place(part.sample(corpus, index)) == (step, row)


def test_a_skipped_sample_has_no_place() -> None:
    skipping = Segment(1, 4, 64, 64, segment(1).corpora, ((4, 8), (9, 13)))
    for step in range(1, 6):
        for row, sample in enumerate(skipping.samples(step, start=0, stop=4).tolist()):
            assert skipping.place(sample) == (step, row)
    assert [sample for sample in range(14) if skipping.place(sample) is None] == [4, 5, 6, 7, 9, 10, 11, 12]


def test_shares_stay_exact_when_only_the_batch_changes() -> None:
    """100 segments of one sample each: without the memory of the blend the smaller corpus would never have a turn."""
    history: tuple[Segment, ...] = ()
    for step in range(1, 101):
        shares = share("a", 0.7), share("b", 0.3)
        history = extend_history(history, segment(step, *shares, batch=1, length=64 if step % 2 else 32))
    assert len(history) == 100
    read = Counter(stretches_of(segment_at(history, step), step)[0][0] for step in range(1, 101))
    assert read == {0: 70, 1: 30}


def test_rests_are_read_as_soon_as_they_fill_a_sample() -> None:
    """Samples of 8, then of 16, which leave half a page behind, and of 8 again."""
    history: tuple[Segment, ...] = ()
    found = []
    for step in range(1, 7):
        length = 8 if step % 2 else 16
        history = extend_history(history, Segment(step, 1, length, 16, (share("a"),)))
        found.append(stretches_of(history[-1], step)[0][1])
    assert found == [[(0, 8)], [(16, 32)], [(8, 16)], [(32, 48)], [(48, 56)], [(64, 80)]]


def test_a_step_at_ten_billion_samples_is_as_near_as_the_first() -> None:
    far = Segment(1, 4096, 64, 64, (share("a", 0.7), share("b", 0.3), share("c", 0.1)))
    step = 10**10 // 4096
    rows = stretches_of(far, step)
    corpus, ((first, _),) = rows[17]
    assert far.place(far.sample(corpus, first // 64)) == (step, 17)
