"""The rank grid: coordinates and groups as arithmetic, against brute force."""

from __future__ import annotations

import itertools
from dataclasses import fields

import pytest

from megads.errors import LayoutError
from megads.parallel.layout import AXES, Layout, sequence_unit

LAYOUTS = tuple(
    Layout(tensor=t, context=c, data=d, pipeline=p)
    for t, c, d, p in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2, 3))
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_rank_are_inverse(layout: Layout) -> None:
    for rank in range(layout.world_size):
        c = layout.coordinates(rank)
        assert layout.rank(tensor=c.tensor, context=c.context, data=c.data, pipeline=c.pipeline) == rank


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_groups_partition_the_ranks_and_differ_in_their_axis_alone(layout: Layout) -> None:
    own = {
        "tp": {"tensor"},
        "cp": {"context"},
        "dp": {"data"},
        "pp": {"pipeline"},
        "dp_cp": {"data", "context"},
    }
    own |= {"model": {"tensor", "pipeline"}, "world": {"tensor", "context", "data", "pipeline"}}
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
        assert all(list(group) == sorted(group) for group in groups)
        for group in groups if axis in own else ():
            coordinates = [layout.coordinates(rank) for rank in group]
            for field in ("tensor", "context", "data", "pipeline"):
                distinct = {getattr(c, field) for c in coordinates}
                full = getattr(layout, field)
                assert len(distinct) == (full if field in own[axis] else 1)


def test_tensor_ranks_are_neighbours() -> None:
    layout = Layout(tensor=2, data=2, pipeline=2)
    assert layout.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups("dp") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("pp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_ends_are_the_first_and_last_stage() -> None:
    layout = Layout(tensor=1, data=2, pipeline=4)
    assert {g for g in layout.groups("ends") if len(g) > 1} == {(0, 6), (1, 7)}


def test_ends_follow_the_placement_of_stages() -> None:
    """In a V the first and the last stage are on one rank, which sums tied parameters alone."""
    assert [Layout(pipeline=2, virtual_stages=2).pipeline_rank_of(stage) for stage in range(4)] == [
        0,
        1,
        0,
        1,
    ]
    layout = Layout(data=2, pipeline=3, virtual_stages=2, placement=(0, 1, 2, 2, 1, 0))
    assert [layout.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert all(len(group) == 1 for group in layout.groups("ends") if 0 in group or 1 in group)
    crossed = Layout(pipeline=3, placement=(1, 0, 2))
    assert {g for g in crossed.groups("ends") if len(g) > 1} == {(1, 2)}


def test_experts_split_context_and_data() -> None:
    layout = Layout(tensor=2, context=2, data=4, expert=4)
    assert layout.groups("ep")[0] == (0, 2, 4, 6)
    assert layout.groups("edp")[0] == (0, 8)
    assert layout.groups("etp")[0] == (0, 1)
    other = Layout(tensor=4, data=2, expert=8, expert_tensor=1)
    assert other.groups("ep") == (tuple(range(8)),)


def test_shards_are_blocks_of_neighbours() -> None:
    layout = Layout(tensor=2, data=4, pipeline=2, shard=2, expert=4, expert_tensor=1)
    assert layout.groups("dp_cp_shard")[:4] == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups("dp_cp_replica")[:4] == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups("edp")[:4] == ((0, 4), (1, 5), (2, 6), (3, 7))  # a block holds all experts once
    assert set(map(len, layout.groups("edp_shard"))) == {1}
    assert layout.groups("edp_replica") == layout.groups("edp")
    whole = Layout(tensor=2, data=4, pipeline=2, expert=2)
    assert whole.groups("dp_cp_shard") == whole.groups("dp_cp")
    assert whole.groups("edp_shard") == whole.groups("edp")
    assert set(map(len, (*whole.groups("dp_cp_replica"), *whole.groups("edp_replica")))) == {1}
    with pytest.raises(LayoutError, match="3 of 1 x 4 ranks"):
        Layout(data=4, shard=3)
    with pytest.raises(LayoutError, match="experts in 3 x 1"):
        Layout(data=6, shard=2, expert=3)


@pytest.mark.parametrize(
    "name", [f.name for f in fields(Layout) if f.name not in ("expert_tensor", "placement")]
)
def test_degrees_below_one_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match=name):
        Layout(**{name: 0})


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(LayoutError, match="3 x 2"):
        Layout(tensor=2, expert=3, expert_tensor=2)
    with pytest.raises(LayoutError, match="6 ranks with 4 x 1 x 1"):
        Layout.fit(6, tensor=4)
    with pytest.raises(LayoutError, match="axis"):
        Layout().groups("xp")
    with pytest.raises(LayoutError, match=r"0\.\.0"):
        Layout().coordinates(1)
    with pytest.raises(LayoutError, match=r"1 stages on each of the ranks 0\.\.1"):
        Layout(pipeline=2, placement=(0, 0))


def test_fit_leaves_the_rest_to_data_parallel() -> None:
    assert Layout.fit(12, tensor=2, pipeline=3).data == 2


def test_the_sequence_unit_is_the_least_that_every_rank_can_share() -> None:
    for context, tensor in itertools.product(range(1, 7), range(1, 7)):
        chunks = 2 * context if context > 1 else 1
        fitting = (
            n for n in range(1, 200) if n % chunks == 0 and n % context == 0 and n // context % tensor == 0
        )
        assert sequence_unit(context=context, tensor=tensor) == next(fitting)
