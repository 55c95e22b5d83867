"""The blend is exact at every prefix, and every sample of it is found again."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.blend import Blend, temperature_weights
from megads.errors import DataError


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.integers(0, 10**13))
def test_a_sample_is_found_by_its_corpus_and_number(weights: list[float], sample: int) -> None:
    if not any(weights) or min(w for w in weights if w > 0) < 1e-6 * max(weights):
        return
    blend = Blend(tuple(weights))
    assignment = blend.assign(np.array([sample]))
    assert blend.number(int(assignment.corpus[0]), int(assignment.index[0])) == sample


def test_temperature_weighs_by_a_root_of_the_size() -> None:
    sizes = [10**9, 10**7, 10**3]
    assert np.allclose(temperature_weights(sizes, 1.0), [1.0, 1e-2, 1e-6], rtol=1e-11)
    assert np.allclose(temperature_weights(sizes, 2.0), [1.0, 1e-1, 1e-3], rtol=1e-11)
    assert np.allclose(temperature_weights(sizes, 1e6), 1.0, atol=1e-4)
