"""The text grid and the SVG."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from megads.pipeline.render import svg, text_grid
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.simulate import Timeline, equal_costs, simulate
from megads.pipeline.text import format_schedule, parse_schedule
from tests.pipeline.cases import on_ranks, rank_costs

ONE_F_ONE_B = """\
0 |F0F1F2F3............B0--F4B1--F5B2--F6B3--F7B4--..B5--..B6--..B7--
1 |..F0F1F2........B0--F3B1--F4B2--F5B3--F6B4--F7B5--..B6--..B7--....
2 |....F0F1....B0--F2B1--F3B2--F4B3--F5B4--F6B5--F7B6--..B7--........
3 |......F0B0--F1B1--F2B2--F3B3--F4B4--F5B5--F6B6--F7B7--............"""

INTERLEAVED = """\
0 |0F0-0F1-2F0-2F1-0F2-....2B0-----0F3-2B1-----2F2-
1 |....1F0-1F1-3F0-3B0-----3F1-3B1-----1F2-1B0-----

0 |0B0-----2F3-0B1-----....2B2-----....2B3-----0B2-
1 |1F3-1B1-----3F2-3B2-----3F3-3B3-----1B2-----1B3-

0 |----0B3-----
1 |----........"""

PAIRS = (
    "schedule pairs\nmicro_batches 2\nplacement 0 1 1 0\nmax_live 4 4\n"
    "rank 0: 0F0 3F0 (0F1+3B0) 3F1 3I1 0B0 3W1 0B1\nrank 1: 1F0 2F0 2B0 1F1 2F1 1B0 2B1 1B1\n"
)


def timeline(name: str, p: int, m: int, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    schedule = build(name, num_stages=p, num_micro_batches=m)
    return simulate(schedule, equal_costs(p, forward=forward, backward=backward))


def pairs() -> Timeline:
    return simulate(parse_schedule(PAIRS), equal_costs(4))


def test_text_grid_is_the_known_picture() -> None:
    assert text_grid(timeline("one_f_one_b", 4, 8)) == ONE_F_ONE_B


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
@pytest.mark.parametrize(("forward", "backward"), [(1, 2), (1.37, 2.9), (3, 1)])
def test_text_grid_keeps_labels_columns_and_width(name: str, forward: float, backward: float) -> None:
    grid = text_grid(timeline(name, 3, 12, forward, backward), width=70)
    blocks = [block.splitlines() for block in grid.split("\n\n")]
    assert len(blocks) > 1 and all(len(block) == 3 for block in blocks)
    assert max(len(line) for block in blocks for line in block) <= 70
    for rank in range(3):
        assert len({len(block[rank]) for block in blocks[:-1]}) == 1
        line = "".join(block[rank].removeprefix(f"{rank} |") for block in blocks)
        for m in range(12):
            assert line.count(f"F{m}") >= 1 and line.count(f"B{m}") >= 1
        assert line.isascii()


def test_idle_columns_are_the_bubble() -> None:
    for line in text_grid(timeline("gpipe", 4, 4)).splitlines():
        assert line.count(".") == 2 * 9  # two columns a time unit


def test_stages_of_a_rank_are_told_apart_and_no_label_is_cut() -> None:
    schedule = build("interleaved", num_stages=4, num_micro_batches=4, num_chunks=2)
    drawn = simulate(schedule, equal_costs(4))
    assert text_grid(drawn, width=54) == INTERLEAVED
    fills = [box.attrib["fill"] for box in boxes(svg(drawn))]
    assert {fills.count(color) for color in fills} == {8}  # F and B in two shades, stages 0 and 1 alike
    assert len(set(fills)) == 4
    assert "darker: a later stage" in svg(drawn)
    assert "darker" not in svg(timeline("one_f_one_b", 4, 8))


def test_cells_with_stage_names_and_pairs() -> None:
    grid = text_grid(pairs())
    assert "(0F1+3B0)" in grid and "3W1" in grid


def boxes(text: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    return [element for element in root.iter(f"{space}rect") if element.find(f"{space}title") is not None]


def test_svg_is_well_formed_and_to_scale() -> None:
    drawn = timeline("one_f_one_b", 4, 8)
    text = svg(drawn)
    found = boxes(text)
    assert len(found) == 4 * 8 * 2
    widths = sorted({round(float(box.attrib["width"]) + 1, 1) for box in found})
    assert len(widths) == 2 and widths[1] == pytest.approx(2 * widths[0], abs=0.1)
    assert ">one_f_one_b: 4 stages on 4 ranks, 8 micro-batches<" in text
    assert "bubble 27.3% where the optimizer waits for all ranks, 27.3% where it does not" in text
    for word in ("forward (F)", "backward (B)", "idle", "rank 3", "time"):
        assert f">{word}<" in text
    assert "weight gradient" not in text
    right = max(float(box.attrib["x"]) + float(box.attrib["width"]) for box in found)
    assert right <= float(ElementTree.fromstring(text).attrib["width"])


def test_svg_of_split_and_overlapped_cells() -> None:
    text = svg(pairs())
    assert len(boxes(text)) == 17  # a pair is two boxes
    assert ">input gradient (I)<" in text and ">weight gradient (W)<" in text


@pytest.mark.parametrize("name", SCHEDULES)
def test_svg_of_every_schedule_shows_each_action_once(name: str) -> None:
    """Boxes of a rank do not overlap but for the halves of a pair, and none is left of or beyond the time axis."""
    schedule = on_ranks(name, 4, 8)
    text = svg(simulate(schedule, rank_costs(schedule)))
    found = boxes(text)
    assert len(found) == sum(len(cell.actions) for _, _, cell in schedule.cells())
    corners = sorted((float(b.attrib["y"]), float(b.attrib["x"]), float(b.attrib["width"])) for b in found)
    for (y, x, width), (next_y, next_x, _) in itertools.pairwise(corners):
        assert y != next_y or x + width <= next_x
    has_pairs = name.startswith("dualpipe")
    assert ("one above the other" in text) == has_pairs
    assert ("the other direction" in text) == (name == "dualpipe")


def test_svg_escapes_the_users_name() -> None:
    text = format_schedule(build("gpipe", num_stages=1, num_micro_batches=1)).replace("gpipe", "<&>")
    root = ElementTree.fromstring(svg(simulate(parse_schedule(text), equal_costs(1))))
    assert "<&>" in "".join(root.itertext())
