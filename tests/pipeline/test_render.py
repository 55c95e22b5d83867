"""The text grid, the SVG, and the verb with right and wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megads.errors import ScheduleError
from megads.pipeline.lower import lower
from megads.pipeline.render import main, svg, text_grid
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.simulate import Timeline, equal_costs, simulate
from megads.pipeline.text import format_schedule, parse_schedule

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


@pytest.mark.parametrize("name", SCHEDULES)
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
    assert "one_f_one_b: 4 stages on 4 ranks, 8 micro-batches, bubble 27.3%" in text
    for word in ("forward (F)", "backward (B)", "idle", "rank 3", "time"):
        assert f">{word}<" in text
    assert "weight gradient" not in text
    right = max(float(box.attrib["x"]) + float(box.attrib["width"]) for box in found)
    assert right <= float(ElementTree.fromstring(text).attrib["width"])


def test_svg_of_split_and_overlapped_cells() -> None:
    text = svg(pairs())
    assert len(boxes(text)) == 17  # a pair is two boxes
    assert ">input gradient (I)<" in text and ">weight gradient (W)<" in text


def test_svg_escapes_the_users_name() -> None:
    text = format_schedule(build("gpipe", num_stages=1, num_micro_batches=1)).replace("gpipe", "<&>")
    root = ElementTree.fromstring(svg(simulate(parse_schedule(text), equal_costs(1))))
    assert "<&>" in "".join(root.itertext())


def test_verb_prints_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.svg"
    assert main(["one_f_one_b", "--stages", "4", "--micro-batches", "8", "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    assert ONE_F_ONE_B in out
    assert "bubble       27.3%, 9 of 33 on each rank" in out
    assert "closed form  27.3%, (p-1)(F+B) = 9" in out
    assert "live peak    4 3 2 1" in out
    assert max(map(len, out.splitlines())) <= 100
    assert len(boxes(picture.read_text())) == 64


@pytest.mark.parametrize(
    ("micro_batches", "bubble", "closed_form"),
    [
        (8, "15.8%, 4.5 of 28.5 on each rank", "15.8%, (p-1)(F+B)/v = 4.5"),
        (6, "26.5%, 6.5 of 24.5 on each rank", "none: 6 micro-batches are no multiple of 4"),
    ],
)
def test_verb_interleaves(
    micro_batches: int, bubble: str, closed_form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """--stages counts ranks; F and B are a rank's, so that schedules of the same work compare."""
    assert main(f"interleaved --stages 4 --chunks 2 --micro-batches {micro_batches}".split()) == 0
    out = capsys.readouterr().out
    assert f"interleaved: 8 stages on 4 ranks, {micro_batches} micro-batches, F = 1, B = 2" in out
    assert f"bubble       {bubble}\nclosed form  {closed_form}\n" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("lowered", [False, True])
def test_verb_takes_a_file(lowered: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = build("gpipe", num_stages=3, num_micro_batches=4)
    path = tmp_path / "mine"
    path.write_text(format_schedule(lower(schedule) if lowered else schedule))
    assert main([str(path)]) == 0
    assert main([str(path), "--stages", "3", "--micro-batches", "4", "--chunks", "1", "--f", "2"]) == 0
    out = capsys.readouterr().out
    assert "gpipe: 3 stages on 3 ranks, 4 micro-batches, F = 2, B = 2" in out
    assert "closed form" not in out  # a file is what it says, not what its name promises


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("gpip --stages 2 --micro-batches 2", "unknown(.|\n)*gpipe, one_f_one_b(.|\n)*did you mean gpipe"),
        ("one_f_one_b --micro-batches 2", "needs --stages"),
        ("one_f_one_b --stages 2", "needs --micro-batches"),
        ("gpipe --stages 0 --micro-batches 2", "at least one of its stages"),
        ("gpipe --stages 2 --micro-batches -1", "at least one of its micro-batches"),
        ("gpipe --stages 2 --micro-batches 2 --chunks 2", "one stage a rank"),
        ("gpipe --stages 2 --micro-batches 2 --chunks 0", "one stage a rank"),
        ("interleaved --stages 2 --micro-batches 2 --chunks 0", "at least one of its chunks"),
        ("interleaved --stages 0 --micro-batches 2 --chunks 2", "at least one of its stages"),
        ("gpipe --stages 2 --micro-batches 2 --f 0", "--f is not a duration"),
        ("gpipe --stages 2 --micro-batches 2 --b nan", "--b is not a duration"),
        ("gpipe --stages 2 --micro-batches 2 --svg absent/a.svg", "cannot be written"),
        ("absent.txt", r"absent\.txt does not exist"),
        ("FILE --stages 3", "--stages is not what the file says(.|\n)*3(.|\n)*2"),
        ("FILE --micro-batches 9", "--micro-batches is not what the file says"),
        ("FILE --chunks 2", "--chunks is not what the file says"),
        ("SPOILT", "1F1 is missing"),
    ],
)
def test_wrong_input_is_refused(
    argv: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = format_schedule(build("gpipe", num_stages=2, num_micro_batches=2))
    Path("FILE").write_text(text)
    Path("SPOILT").write_text(text.replace("1F1 ", ""))
    with pytest.raises(ScheduleError, match=message) as caught:
        main(argv.split())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("argv", ["", "gpipe --stages two", "gpipe --color red"])
def test_wrong_options_exit_with_2(argv: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv.split())
    assert caught.value.code == 2
    assert "python -m megads schedule" in capsys.readouterr().err


def test_the_command_line_needs_no_torch() -> None:
    """Through the real entry point: exit code 2, one message, no traceback; and torch is never imported."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "megads", "schedule", "gpip", "--stages", "2", "--micro-batches", "2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("schedule 'gpip' is unknown") and "Traceback" not in done.stderr
    probe = "import megads.pipeline.render, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=root, timeout=60, check=False).returncode == 0
