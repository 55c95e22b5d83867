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
    """A display of `done` out of a total."""

    def update(self, done: int, note: str) -> None:
        """Show that `done` bytes are done."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_progress(label: str, total: int) -> Progress:
    """A display on stderr for `total` bytes."""
    return BarProgress(label, total) if sys.stderr.isatty() else LineProgress(label, total)


class LineProgress:
    """A plain line every `LINE_INTERVAL` seconds."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._start = self._shown = time.monotonic()

    def update(self, done: int, note: str) -> None:
        now = time.monotonic()
        if now - self._shown < LINE_INTERVAL or not done:
            return
        self._shown = now
        left = (now - self._start) * (self._total - done) / done
        share = 100 * done / max(1, self._total)
        print(
            f"{self._label}: {share:.0f}% of {self._total / 1e6:.1f} MB, {note}, {left:.0f} s left",
            file=sys.stderr,
        )

    def close(self) -> None:
        """Nothing to put back."""


class BarProgress:
    """A bar that draws itself over."""

    def __init__(self, label: str, total: int) -> None:
        import rich.console
        import rich.progress

        self._bar: RichProgress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.DownloadColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeRemainingColumn(),
            console=rich.console.Console(stderr=True),
        )
        self._task = self._bar.add_task(label, total=total, note="")
        self._bar.start()

    def update(self, done: int, note: str) -> None:
        self._bar.update(self._task, completed=done, note=note)

    def close(self) -> None:
        self._bar.stop()
