"""How far a tool is: a bar with the time left on a terminal, plain lines elsewhere.

Lives here: the one progress display of the data tools. `rich` is imported only on a terminal.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_INTERVAL = 10.0
"""Seconds between two plain lines."""


class Progress(Protocol):
    """A display of `done` bytes out of a total."""

    def update(self, done: int, note: str) -> None:
        """Show that `done` bytes are done."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_progress(label: str, total: int, *, done: int = 0, is_shown: bool = True) -> Progress:
    """A display on stderr for `total` bytes, of which `done` were done by an earlier run."""
    if not is_shown:
        return NoProgress()
    kind = BarProgress if sys.stderr.isatty() else LineProgress
    return kind(label, total, done=done)


class NoProgress:
    """Shows nothing: of several processes one speaks."""

    def update(self, done: int, note: str) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to put back."""


class LineProgress:
    """A plain line every `LINE_INTERVAL` seconds."""

    def __init__(self, label: str, total: int, *, done: int = 0) -> None:
        self._label, self._total, self._first = label, total, done
        self._start = self._shown = time.monotonic()

    def update(self, done: int, note: str) -> None:
        now = time.monotonic()
        if now - self._shown < LINE_INTERVAL or done <= self._first:
            return
        self._shown = now
        rate = (done - self._first) / (now - self._start)
        if self._total:  # standard input has no size
            how_far = f"{100 * done / self._total:.0f}% of {self._total / 1e6:.1f} MB"
            left = f", {duration((self._total - done) / rate)} left"
        else:
            how_far, left = f"{done / 1e6:.1f} MB", ""
        print(f"{self._label}: {how_far}, {rate / 1e6:.1f} MB/s, {note}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to put back."""


class BarProgress:
    """A bar that draws itself over."""

    def __init__(self, label: str, total: int, *, done: int = 0) -> None:
        import rich.console
        import rich.progress

        self._bar: RichProgress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TransferSpeedColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
        )
        self._task = self._bar.add_task(label, total=total or None, completed=done, note="")
        self._bar.start()

    def update(self, done: int, note: str) -> None:
        self._bar.update(self._task, completed=done, note=note)

    def close(self) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
