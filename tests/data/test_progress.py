"""The progress display: plain lines with the time left, a bar on a terminal."""

from __future__ import annotations

import sys
import time

import pytest

from megads.data.progress import BarProgress, LineProgress, open_progress


def test_plain_lines_tell_share_note_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 101.0, 120.0, 121.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    progress = open_progress("read", 4_000_000)
    assert isinstance(progress, LineProgress)
    for done in (500_000, 1_000_000, 1_100_000):  # after 1, 20 and 21 seconds
        progress.update(done, "7 documents")
    progress.close()
    assert capsys.readouterr().err == "read: 25% of 4.0 MB, 0.1 MB/s, 7 documents, 60 s left\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = open_progress("read", 100)
    assert isinstance(progress, BarProgress)
    progress.update(40, "7 documents")
    progress.close()
    assert "7 documents" in capsys.readouterr().err
