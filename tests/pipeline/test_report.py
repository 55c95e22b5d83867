"""The verb `schedule`: one schedule, the table of all, files, and wrong input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megads.errors import ScheduleError
from megads.pipeline.lower import lower
from megads.pipeline.report import main
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.text import format_csv, format_schedule, read_schedule
from tests.pipeline.cases import on_ranks

GRID = "0 |F0F1F2F3............B0--F4B1--F5B2--F6B3--F7B4--..B5--..B6--..B7--"

TABLE = """\
schedule        chunks  step  bubble  no barrier  bubble  peak  parameters  notes
gpipe                1    33   27.3%          33   27.3%     8          1x
one_f_one_b          1    33   27.3%          33   27.3%     4          1x
interleaved          2  28.5   15.8%        28.5   15.8%   5.5          1x
zero_bubble_h1       1    27   11.1%          27   11.1%     4          1x
zero_bubble_h2       1    27   11.1%          24    0.0%     7          1x
zbv                  2  25.5    5.9%          24    0.0%     4          1x
dualpipe_v           2    27   11.1%          27   11.1%   4.5          1x
dualpipe             1    26    7.7%          26    7.7%     5          2x"""


def test_table_compares_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """p = 4, m = 8, F = I = W: the figures of every schedule, with and without the barrier; a picture of each."""
    assert main(["all", "--stages", "4", "--micro-batches", "8", "--svg", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out
    width = TABLE.index("  notes")
    assert [line[:width].rstrip() for line in out.splitlines()[4:]] == [
        line[:width].rstrip() for line in TABLE.splitlines()
    ]
    assert "simulated, not trained" in out
    for name in SCHEDULES:
        ElementTree.parse(tmp_path / "made" / f"{name}.svg")
    assert main(["all", "--stages", "4", "--micro-batches", "8", "--text"]) == 0
    out = capsys.readouterr().out
    assert GRID in out and "(0F6+3B0)" not in out and out.count("\n0 |") >= len(SCHEDULES)


def test_table_says_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "--stages", "3", "--micro-batches", "5", "--chunks", "4"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[4:]}
    assert (
        "gives one half of its ranks to each direction found: 3 ranks allowed: an even number"
        in lines["dualpipe"]
    )
    assert lines["interleaved"].split()[1] == "4"


def test_verb_prints_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.svg"
    assert main(["one_f_one_b", "--stages", "4", "--micro-batches", "8", "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    assert GRID in out
    assert "bubble       27.3%, 9 of 33 on each rank, where the optimizer waits for all" in out
    assert "no barrier   27.3%, 33 a step" in out
    assert "closed form  27.3% without barrier, (p-1)(F+B) = 9" in out
    assert "live peak    4 3 2 1 micro-batches of a rank" in out
    assert "parameters   1 x" in out
    assert max(map(len, out.splitlines())) <= 100
    ElementTree.parse(picture)


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (
            "interleaved --chunks 2 --micro-batches 8",
            (
                "8 stages on 4 ranks, 8 micro-batches, F = 1, I = 1, W = 1",
                "15.8%, 4.5 of 28.5",
                "(p-1)(F+B)/v = 4.5",
            ),
        ),
        (
            "interleaved --micro-batches 6",
            ("26.5%, 6.5 of 24.5", "none for these numbers; else (p-1)(F+B)/v"),
        ),
        (
            "zbv --micro-batches 8 --costs 2,2,2",
            ("5.9%, 3 of 51", "0.0%, 48 a step", "0.0% without barrier, 0 = 0"),
        ),
        ("zero_bubble_h1 --micro-batches 8 --kept 0.5", ("(p-1)(F+I-W) = 3", "live peak    4 3.5 3 2.5")),
        ("zero_bubble_h2 --micro-batches 8 --costs 1,1,3", ("closed form  none for these numbers",)),
        ("dualpipe --micro-batches 8", ("parameters   2 x", "(p/2-1)(F&B+B-3W) = 2")),
        ("dualpipe_v --micro-batches 8 --overlap 0.8", ("closed form  none: --latency",)),
        ("one_f_one_b --micro-batches 1 --latency 0.5 --transfer 0.25", ("of 16.5 on each rank",)),
        ("zbv --micro-batches 8 --costs 1,1,1/1,1,1/1,1,1/2,2,2", ("costs of 4 slices",)),
        ("gpipe --micro-batches 1 --costs 1,1,1/1,1,1/1,1,1/4,4,4", ("of 21 on each rank",)),
    ],
)
def test_figures_of_one_schedule(
    argv: str, lines: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """--stages counts ranks; F, I and W are a rank's, so that schedules of the same work compare."""
    assert main([*argv.split(), "--stages", "4"]) == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line in out


@pytest.mark.parametrize("lowered", [False, True])
def test_verb_takes_a_file(lowered: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = build("gpipe", num_stages=3, num_micro_batches=4)
    path = tmp_path / "mine"
    path.write_text(format_schedule(lower(schedule) if lowered else schedule))
    assert main([str(path)]) == 0
    assert (
        main([str(path), "--stages", "3", "--micro-batches", "4", "--chunks", "1", "--costs", "2,1,1"]) == 0
    )
    out = capsys.readouterr().out
    assert "gpipe: 3 stages on 3 ranks, 4 micro-batches, F = 2, I = 1, W = 1" in out
    assert "closed form" not in out  # a file is what it says, not what its name promises


def test_a_schedule_is_saved_and_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mine.txt", "mine.csv"):
        path = tmp_path / name
        assert main(["zbv", "--stages", "2", "--micro-batches", "5", "--save", str(path)]) == 0
        assert read_schedule(path).rows == on_ranks("zbv", 2, 5).rows
        assert main([str(path)]) == 0
    assert "mine: 4 stages on 2 ranks, 5 micro-batches" in capsys.readouterr().out


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
        ("gpipe --stages 2 --micro-batches 2 --costs 1,1", "--costs is not durations(.|\n)*1,1(.|\n)*three"),
        ("gpipe --stages 2 --micro-batches 2 --costs 1,0,1", "--costs is not durations"),
        ("gpipe --stages 2 --micro-batches 2 --costs 1,nan,1", "--costs is not durations"),
        ("gpipe --stages 2 --micro-batches 2 --costs 1,1,1/x,1,1", "--costs is not durations(.|\n)*x,1,1"),
        (
            "zbv --stages 4 --micro-batches 2 --costs 1,1,1/1,1,1",
            "does not fit(.|\n)*2 triples(.|\n)*4 slices.*8 st",
        ),
        ("gpipe --stages 2 --micro-batches 2 --latency -1", "costs.latency cannot be"),
        ("gpipe --stages 2 --micro-batches 2 --kept 2", "--kept is not a share"),
        ("gpipe --stages 2 --micro-batches 2 --save absent/a.csv", "--save absent/a.csv cannot be written"),
        ("all --micro-batches 2", "all needs --stages"),
        ("all --stages 2 --micro-batches 2 --save a.csv", "--save writes one schedule"),
        ("all --stages 2 --micro-batches 2 --svg absent/more", "absent/more/gpipe.svg cannot be written"),
        ("all --stages 0 --micro-batches 2", "at least one of its stages"),
        ("zbv --stages 2 --micro-batches 2 --chunks 1", "zbv has two stages a rank"),
        ("BAD.csv", r"BAD\.csv:2: cell 2: not an action"),
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
    Path("BAD.csv").write_text(format_csv(on_ranks("gpipe", 2, 2)).replace("1F1", "1X1"))
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
    probe = "import megads.pipeline.report, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=root, timeout=60, check=False).returncode == 0
