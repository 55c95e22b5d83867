"""The order is a bijection for every size, keyed, well mixed, and free of memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.order import PageStream, Permutation
from megads.errors import DataError


def is_bijection(placed: np.ndarray, size: int) -> bool:
    return placed.size == size and np.array_equal(np.sort(placed), np.arange(size))


def sizes_to_try() -> list[int]:
    """Every size to 600, the neighbours of every power of two, and random sizes to 1e5."""
    powers = [size for k in range(1, 17) for size in (2**k - 1, 2**k, 2**k + 1)]
    return sorted(
        {*range(1, 601), *powers, *np.random.default_rng(0).integers(600, 100_001, 60).tolist(), 100_000}
    )


def test_bijection_for_every_size() -> None:
    for size in sizes_to_try():
        assert is_bijection(Permutation(size, 7, "corpus", 3)(np.arange(size)), size), size


def test_the_check_fails_without_cycle_walking() -> None:
    placed = Permutation(128, 7, "corpus", 3)(np.arange(100))  # a bijection of 128, used for 100
    assert not is_bijection(placed, 100)


def test_pieces_equal_the_whole_in_any_shape_and_order() -> None:
    permutation = Permutation(12345, 1, "corpus", 0)
    whole = permutation(np.arange(12345))
    asked = np.random.default_rng(1).integers(0, 12345, (17, 5))
    assert np.array_equal(permutation(asked), whole[asked])
    assert permutation(np.array([], dtype=np.int64)).size == 0


def test_order_depends_on_seed_name_and_epoch() -> None:
    index = np.arange(5000)
    base = Permutation(5000, 1, "a", 0)(index)
    for other in (Permutation(5000, 2, "a", 0), Permutation(5000, 1, "b", 0), Permutation(5000, 1, "a", 1)):
        assert np.count_nonzero(base == other(index)) < 10  # a random permutation keeps 1 place on average
    assert np.array_equal(base, Permutation(5000, 1, "a", 0)(index))


@pytest.mark.parametrize("size", [100, 1000, 4097, 65536])
def test_order_looks_random(size: int) -> None:
    """Each tenth of the order draws evenly from each tenth of the corpus; neighbours are torn apart."""
    tables, neighbours = np.zeros((10, 10)), 0
    for seed in range(20):
        placed = Permutation(size, seed, "c", 0)(np.arange(size))
        np.add.at(tables, (np.arange(size) * 10 // size, placed * 10 // size), 1)
        neighbours += int(np.count_nonzero(np.abs(np.diff(placed)) == 1))
    expected = 20 * size / 100
    assert (
        (tables - expected) ** 2 / expected
    ).sum() < 150  # 81 degrees of freedom; a sorted order gives > 10 ** 4
    assert neighbours < 100  # 2 a permutation expected; 20 * (size - 1) if sorted


def test_small_sizes_reach_every_arrangement() -> None:
    seen = {tuple(Permutation(4, seed, "c", 0)(np.arange(4)).tolist()) for seed in range(400)}
    assert len(seen) == 24


def test_ten_billion_samples_in_little_memory() -> None:
    size = 10**10
    permutation = Permutation(size, 5, "corpus", 0)
    tracemalloc.start()
    try:
        placed = permutation(np.arange(size - 4096, size))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6
    assert np.unique(placed).size == 4096
    assert placed.min() >= 0
    assert placed.max() < size
    assert 0.4 < placed.mean() / size < 0.6


def test_stream_runs_through_epochs_in_different_orders() -> None:
    stream = PageStream(50, 3, "corpus")
    pages = stream.pages(np.arange(150)).reshape(3, 50)
    for epoch in pages:
        assert is_bijection(epoch, 50)
    assert not np.array_equal(pages[0], pages[1])
    assert np.array_equal(stream.pages(np.array([149, 0, 75])), pages.ravel()[[149, 0, 75]])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**32), st.integers(0, 5), st.data())
def test_the_inverse_undoes_the_order(size: int, seed: int, epoch: int, data: st.DataObject) -> None:
    permutation = Permutation(size, seed, "corpus", epoch)
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)))
    assert np.array_equal(permutation.inverse(permutation(indices)), indices)
    assert np.array_equal(permutation(permutation.inverse(indices)), indices)


def test_a_page_is_found_in_every_epoch() -> None:
    stream = PageStream(50, 3, "corpus")
    for page in (0, 17, 49):
        assert stream.pages(stream.places(page, num_epochs=4)).tolist() == [page] * 4


@pytest.mark.parametrize("size", [0, -1, 2**62 + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(DataError, match=str(size).replace("-", "\\-")):
        Permutation(size, 0, "c", 0)


def test_no_torch_on_the_way_from_text_to_corpus() -> None:
    code = (
        "import sys, megads.data.preprocess, megads.data.vocabulary, megads.data.order; print(*sys.modules)"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "deepspeed", "sentencepiece", "tokenizers", "pyarrow", "rich"} & set(modules)
