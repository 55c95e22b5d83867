"""`log.py`: who speaks, what a terminal and a file see, and that no digit of a metric is lost."""

from __future__ import annotations

import io
import json
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads import log


@pytest.fixture(autouse=True)
def restore_logger() -> object:
    yield
    for handler in tuple(logging.getLogger(log.LOGGER).handlers):
        logging.getLogger(log.LOGGER).removeHandler(handler)
        handler.close()


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "hello\nwarning (rank 0): careful\n"), (3, "warning (rank 3): careful\n")]
)
def test_only_rank_0_informs_and_every_rank_warns(
    rank: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # a second setup does not say everything twice
        log.setup(rank, file=tmp_path / "log")
    logging.getLogger("megads.train").info("hello")
    logging.getLogger("megads.train").warning("careful")
    assert capsys.readouterr().err == said
    assert (tmp_path / "log").exists() == (rank == 0)
    if rank == 0:
        assert (tmp_path / "log").read_text() == said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


COLOUR = re.compile(r"\x1b\[(3|9)\d")  # how many there are depends on the terminal


def test_a_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen, file, hidden, plain = Terminal(), io.StringIO(), Terminal(), Terminal()
    _run(screen)
    _run(file)
    _run(hidden, is_shown=False)
    monkeypatch.setenv("NO_COLOR", "1")
    _run(plain)
    assert "3/4" in screen.getvalue()
    assert "eta" in screen.getvalue()
    assert COLOUR.search(screen.getvalue())
    assert "3/4" in plain.getvalue()
    assert not COLOUR.search(plain.getvalue())
    assert file.getvalue() == hidden.getvalue() == ""


def _run(stream: io.StringIO, *, is_shown: bool = True) -> None:
    with log.Progress("train", total=4, done=1, is_shown=is_shown, stream=stream) as progress:
        progress.advance()
        progress.advance()


@settings(max_examples=50, deadline=None)
@given(value=st.floats())
def test_metrics_keep_every_digit(value: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    writer = log.MetricsWriter(path)
    writer.write({"step": 1, "loss": value})
    writer.close()
    (record,) = log.read_metrics(path)
    assert record == {"step": 1, "loss": value if abs(value) < float("inf") else None}


def test_metrics_are_there_at_once_and_a_torn_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = log.MetricsWriter(path)
    for step in range(1, 6):
        writer.write({"step": step, "loss": step / 3})
        assert len(log.read_metrics(path)) == step  # not only when the file is closed
    whole = path.read_bytes()
    for size in range(len(whole) - 10, len(whole)):
        path.write_bytes(whole[:size])
        assert [record["step"] for record in log.read_metrics(path)] == [1, 2, 3, 4]
        resumed = log.MetricsWriter(path)
        resumed.cut_back(3)
        resumed.write({"step": 4, "loss": 0.0})
        resumed.close()
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_torn_line_is_dropped_before_appending(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    log.MetricsWriter(path).write({"step": 2})
    assert [record["step"] for record in log.read_metrics(path)] == [1, 2]


def test_cutting_back_nothing(tmp_path: Path) -> None:
    log.MetricsWriter(tmp_path / "none.jsonl").cut_back(0)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_step_is_one_line() -> None:
    record = {"step": 12, "loss": 5.12341, "lr": 3e-4, "grad_norm": 0.912, "tokens_per_second": 14233.0}
    line = log.format_step(record | {"mfu": 0.4612, "memory_bytes": 1.3 * 2**30}, total=200, eta=192)
    assert (
        line == "step 12/200 loss 5.1234 lr 3.00e-04 gnorm 0.91 tok/s 14.2k mfu 46.1% mem 1.30GiB eta 3m12s"
    )
    assert log.format_step({"step": 1, "loss": 1.0, "lr": 0.0, "grad_norm": 1.0}, total=2, eta=0) == (
        "step 1/2 loss 1.0000 lr 0.00e+00 gnorm 1.00 eta 0s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3599.7, "1h00m"),
        (11100, "3h05m"),
        (187200, "2d04h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert log.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (950, "950"), (0.5, "0.50"), (999.9, "1.00k"), (14233, "14.2k"), (999_999, "1.00M"),
     (124_439_808, "124M"), (1.2358e9, "1.24B"), (8.03e9, "8.03B"), (5e15, "5000T")],
)  # fmt: skip
def test_counts(number: float, text: str) -> None:
    assert log.format_count(number) == text


@pytest.mark.parametrize(("number", "text"), [(512, "512B"), (1536, "1.50KiB"), (80 * 2**30, "80GiB")])
def test_bytes(number: float, text: str) -> None:
    assert log.format_bytes(number) == text
