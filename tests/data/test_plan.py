"""A planned history is that of a run that looks at its config before every step, wherever it was interrupted."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.curriculum import Constant, Curriculum, Discrete, Root
from megads.data.plan import Ramp, plan_history
from megads.data.segment import (
    CorpusShare,
    Segment,
    extend_history,
    segment_at,
    stream_tokens,
    tokens_by,
)

WANTED = Segment(1, 99, 99, 16, (CorpusShare("a", "print a", 0.7), CorpusShare("b", "print b", 0.3)))

ramps = st.one_of(
    st.builds(lambda size: Ramp(((0, size),)), st.integers(1, 9)),
    st.tuples(
        st.lists(st.integers(1, 4000), max_size=3, unique=True),
        st.lists(st.integers(1, 40), min_size=4, max_size=4),
        st.one_of(st.none(), st.integers(1, 5)),
    ).map(lambda draw: Ramp(tuple(zip([0, *sorted(draw[0])], sorted(draw[1]), strict=False)), draw[2])),
)
curricula = st.sampled_from(
    [Constant(16), Root(2, 16, 9, 2), Root(3, 48, 20, 1, 2), Discrete((4, 8), (3, 11), 16)]
)


def plan(history: tuple[Segment, ...], ramp: Ramp, curriculum: Curriculum, first: int) -> tuple[Segment, ...]:
    wanted = replace(WANTED, first_step=first)
    return plan_history(history, wanted, ramp=ramp, curriculum=curriculum, last_step=60)


@settings(max_examples=80, deadline=None)
@given(ramps, curricula, st.integers(2, 60))
def test_plan_is_what_step_by_step_gives_and_survives_resuming(
    ramp: Ramp, curriculum: Curriculum, resumed: int
) -> None:
    expected: tuple[Segment, ...] = ()
    for step in range(1, 61):
        size = ramp.size(tokens_by(expected, step - 1) if step > 1 else 0)
        row = replace(WANTED, first_step=step, batch_size=size, sequence_length=curriculum.length(step))
        expected = extend_history(expected, row)
    planned = plan((), ramp, curriculum, 1)
    assert planned == expected
    assert plan(planned, ramp, curriculum, resumed) == planned
    saved = tuple(segment for segment in planned if segment.first_step <= resumed)
    assert plan(saved, ramp, curriculum, resumed) == planned


def test_a_ramp_of_stairs_and_one_along_a_line() -> None:
    stairs = Ramp(((0, 4), (100, 8), (200, 16)))
    assert [stairs.size(tokens) for tokens in (0, 99, 100, 199, 200, 10**9)] == [4, 4, 8, 8, 16, 16]
    line = Ramp(((0, 4), (100, 16)), unit=4)
    assert [line.size(tokens) for tokens in (0, 33, 34, 66, 67, 99, 100)] == [4, 4, 8, 8, 12, 12, 16]
    assert [line.next_change(tokens) for tokens in (0, 34, 67, 100)] == [34, 67, 100, None]


def test_the_ramp_of_deepseek_v3() -> None:
    """3072 to 15360 samples over the first 469 B tokens, then 15360 (section 4.2), in stairs of 512."""
    ramp = Ramp(((0, 3072), (469_000_000_000, 15360)), unit=512)
    wanted = replace(WANTED, sequence_length=4096, page=4096)
    start = time.perf_counter()
    history = plan_history((), wanted, ramp=ramp, curriculum=Constant(4096), last_step=10**6)
    assert time.perf_counter() - start < 5
    assert [row.batch_size for row in history] == list(range(3072, 15361, 512))
    last = history[-1].first_step
    tokens = tokens_by(history, last - 1)
    assert tokens - segment_at(history, last - 1).batch_size * 4096 < 469_000_000_000 <= tokens


def read(history: tuple[Segment, ...], steps: range) -> list[tuple[str, int]]:
    """Corpus and first token of every sample that steps read, in order."""
    found = []
    for step in steps:
        segment = segment_at(history, step)
        assigned = segment.assign(segment.samples(step, start=0, stop=segment.batch_size))
        for corpus, index in zip(assigned.corpus.tolist(), assigned.index.tolist(), strict=True):
            share = segment.corpora[corpus]
            ((start, _),) = share.stretches(index, segment.sequence_length)
            found.append((share.fingerprint, start))
    return found


def roll_back(history: tuple[Segment, ...], ramp: Ramp, *, to: int, spike: int) -> tuple[Segment, ...]:
    """The history of a run that went back to step `to` because of step `spike`."""
    skipped = stream_tokens(history, range(to + 1, spike + 1))
    wanted = replace(WANTED, first_step=to + 1)
    kept = tuple(segment for segment in history if segment.first_step <= to)
    return plan_history(
        kept, wanted, ramp=ramp, curriculum=Constant(16), last_step=60, skipped_tokens=skipped
    )


@pytest.mark.parametrize("ramp", [Ramp(((0, 5),)), Ramp(((0, 2), (130, 3), (400, 8)))], ids=["flat", "ramp"])
def test_after_a_rollback_the_stream_goes_on_behind_what_is_left_out(ramp: Ramp) -> None:
    straight = plan((), ramp, Constant(16), 1)
    once = roll_back(straight, ramp, to=4, spike=9)
    assert read(once, range(1, 5)) == read(straight, range(1, 5))
    behind = read(straight, range(10, 40))
    assert read(once, range(5, 12)) == behind[: len(read(once, range(5, 12)))]
    assert sum(bool(segment.skipped) for segment in once) == 1
    # again to the same step: what the first rollback left out stays out
    twice = roll_back(once, ramp, to=4, spike=6)
    rest = read(once, range(7, 40))
    assert read(twice, range(5, 12)) == rest[: len(read(twice, range(5, 12)))]
    # and later: a resumed run keeps the row
    later = roll_back(twice, ramp, to=8, spike=8)
    assert read(later, range(1, 9)) == read(twice, range(1, 9))
    assert plan(later, ramp, Constant(16), 30) == later
    taken = [*read(later, range(1, 40))]
    assert len(set(taken)) == len(taken)
