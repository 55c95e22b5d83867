"""How tensors are cut: against the obvious construction, and as exact covers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.errors import LayoutError
from megads.parallel.shard import Box, Cut, ShardSpec, block_box, boxes_of_range, local_shape, regions


def cut(spec: ShardSpec, size: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The local tensor that regions describe (-1 where it is padding), and the global one."""
    whole = np.arange(spec.size).reshape(spec.shape)
    local = np.full(local_shape(spec, {"tp": size}, name="p"), -1)
    for region in regions(spec, {"tp": size}, ranks={"tp": rank}, name="p"):
        local[region.local.slices] = whole[region.source.slices]
    return local, whole


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_even_cut_is_a_slice(size: int, dim: int) -> None:
    spec = ShardSpec((8, 12), (Cut(dim, "tp"),))
    for rank in range(size):
        local, whole = cut(spec, size, rank)
        assert np.array_equal(local, np.split(whole, size, axis=dim)[rank])


@pytest.mark.parametrize("size", [1, 2])
def test_fused_parts_are_cut_one_by_one(size: int) -> None:
    spec = ShardSpec((8, 3), (Cut(0, "tp", blocks=(4, 2, 2)),))
    for rank in range(size):
        local, whole = cut(spec, size, rank)
        parts = np.split(whole, [4, 6])
        assert np.array_equal(local, np.concatenate([np.split(part, size)[rank] for part in parts]))


@pytest.mark.parametrize(("vocab", "size"), [(7, 4), (5, 4), (53, 8), (3, 8)])
def test_padded_cut_covers_every_row_once(vocab: int, size: int) -> None:
    spec = ShardSpec((vocab, 2), (Cut(0, "tp", pad=True),))
    locals_ = [cut(spec, size, rank)[0] for rank in range(size)]
    assert len({local.shape for local in locals_}) == 1
    stacked = np.concatenate(locals_)
    assert np.array_equal(stacked[stacked >= 0], np.arange(vocab * 2))


def test_uneven_cut_names_parameter_dim_axis_and_legal_sizes() -> None:
    spec = ShardSpec((12, 4), (Cut(0, "tp", blocks=(8, 4)),))
    with pytest.raises(
        LayoutError, match=r"(?s)layers.0.w .*dim 0 in parts \(8, 4\) over axis tp.*size 1, 2, 4"
    ):
        local_shape(spec, {"tp": 3}, name="layers.0.w")


def test_block_boxes_tile_the_tensor() -> None:
    spec = ShardSpec((8, 3), (Cut(0, "tp", blocks=(4, 2, 2)),))
    assert [block_box(spec, i).start for i in range(3)] == [(0, 0), (4, 0), (6, 0)]
    assert sum(block_box(spec, i).size for i in range(3)) == spec.size
    assert block_box(ShardSpec((8, 3)), 0) == Box.whole((8, 3))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_of_a_range_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = np.arange(size).reshape(shape)
    boxes = list(boxes_of_range(tuple(shape), start=start, stop=stop))
    found = [whole[box.slices].reshape(-1) for box in boxes]
    assert list(itertools.chain(*found)) == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_boxes_intersect_and_shift() -> None:
    a, b = Box((0, 0), (3, 3)), Box((2, 1), (5, 2))
    assert a.intersect(b) == Box((2, 1), (3, 2))
    assert a.intersect(Box((3, 0), (4, 3))) is None
    assert b.shift((1, 1)) == Box((3, 2), (6, 3))
    assert (b.shape, b.size) == ((3, 1), 3)


def test_a_parameter_of_experts_lies_in_their_grid() -> None:
    """What is reduced over whom, and whose copies are counted once."""
    stacked = ShardSpec((8, 6, 4), (Cut(0, "ep"), Cut(1, "etp", (3, 3))))
    dealt = ShardSpec((8, 6), (Cut(0, "ep"),))
    column, norm = ShardSpec((6, 4), (Cut(0, "tp"),)), ShardSpec((4,))
    found = [(s.is_expert, s.reduction, s.replicas) for s in (stacked, dealt, column, norm)]
    assert found == [
        (True, "edp", ()),
        (True, "edp", ("etp",)),
        (False, "dp_cp", ()),
        (False, "dp_cp", ("tp",)),
    ]


def test_stacked_experts_are_cut_by_both_axes() -> None:
    """8 experts over 4 ranks, gate and up of each over 2: rank (1, 1) has experts 2, 3 and the second halves."""
    spec = ShardSpec((8, 6, 4), (Cut(0, "ep"), Cut(1, "etp", (4, 2))))
    sizes, ranks = {"ep": 4, "etp": 2}, {"ep": 1, "etp": 1}
    assert local_shape(spec, sizes, name="w") == (2, 3, 4)
    found = regions(spec, sizes, ranks=ranks, name="w")
    assert [(r.source.start, r.source.stop, r.local.start, r.block) for r in found] == [
        ((2, 2, 0), (4, 4, 4), (0, 0, 0), 0),
        ((2, 5, 0), (4, 6, 4), (0, 2, 0), 1),
    ]
