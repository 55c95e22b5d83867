"""What a person reads while a run goes, and the file of metrics that programs read.

    logging      rank 0 says everything, other ranks only warnings and errors, with their rank; all on stderr
    Progress     one bar with the time left where stderr is a terminal, nothing elsewhere
    MetricsWriter   metrics.jsonl, one object a step, the source of truth

What is measured is decided in `train/metrics.py`; here it is only written.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from megads.errors import DataError

LOGGER = "megads"


def setup(rank: int, *, file: Path | None = None) -> None:
    """Send the messages of logger "megads" to stderr, and rank 0's also to `file`; the last call counts."""
    logger = logging.getLogger(LOGGER)
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    handlers: list[logging.Handler] = [_StderrHandler()]
    if file is not None and rank == 0:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_RankFormatter(rank))
        logger.addHandler(handler)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the `sys.stderr` of the moment, which a running bar replaces to keep lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _RankFormatter(logging.Formatter):
    """Information plainly; warnings and errors with level and rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno <= logging.INFO:
            return text
        return f"{record.levelname.lower()} (rank {self._rank}): {text}"


class Progress:
    """A bar with the time left, where stderr is a terminal; elsewhere it shows nothing.

    Args:
        total: steps of the whole run.
        done: steps done before.
        is_shown: False on all ranks but the one that speaks.
        stream: stderr, or another stream in tests.
    """

    def __init__(
        self, what: str, *, total: int, done: int = 0, is_shown: bool = True, stream: TextIO | None = None
    ) -> None:
        console = Console(file=stream or sys.stderr)
        self._bar = Bar(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not (is_shown and console.is_terminal),
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(what, total=total, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """Say that `steps` more are done."""
        self._bar.update(self._task, advance=steps)


class MetricsWriter:
    """Appends one JSON object a line to a file.

    Floats keep all their digits: the shortest text that reads back equal. Every object has the key `step`. A
    line that a killed process left torn is no line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: TextIO | None = None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system; NaN and infinity become null."""
        if self._stream is None:
            _drop_torn_line(self._path)
            self._stream = self._path.open("a", encoding="utf-8")
        self._stream.write(json.dumps({key: _finite(value) for key, value in record.items()}) + "\n")
        self._stream.flush()

    def cut_back(self, step: int) -> None:
        """Drop the records of all steps after `step`, and a torn last line (a resumed run repeats them).

        Raises:
            DataError: the file holds something else too; it is left as it is.
        """
        self.close()
        kept = [line for line in _whole_lines(self._path) if _record(line, self._path)["step"] <= step]
        if self._path.exists():
            scratch = self._path.with_name(self._path.name + ".tmp")
            scratch.write_text("".join(kept), encoding="utf-8")
            os.replace(scratch, self._path)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, without a torn last line. Raises DataError for what is no record."""
    return [_record(line, path) for line in _whole_lines(path)]


def format_step(record: Mapping[str, float], *, total: int, eta: float) -> str:
    """One line a step, loss first.

    Args:
        record: `step`, `loss`, `lr`, `grad_norm`, and where known `tokens_per_second`, `mfu` (0 to 1) and
            `memory_bytes` (peak of this rank).
        total: steps of the run.
        eta: seconds left.
    """
    words = [
        f"step {record['step']:.0f}/{total}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"gnorm {record['grad_norm']:.2f}",
    ]
    if "tokens_per_second" in record:
        words.append(f"tok/s {format_count(record['tokens_per_second'])}")
    if "mfu" in record:
        words.append(f"mfu {100 * record['mfu']:.1f}%")
    if "memory_bytes" in record:
        words.append(f"mem {format_bytes(record['memory_bytes'])}")
    return " ".join([*words, f"eta {format_duration(eta)}"])


def format_duration(seconds: float) -> str:
    """`9s`, `3m12s`, `3h05m`, `2d04h`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def format_count(number: float) -> str:
    """Three digits and a decimal power: `950`, `14.2k`, `124M`, `1.24B`."""
    for unit, suffix in ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T")):
        text = _three_digits(number / unit)
        if abs(float(text)) < 1000 or suffix == "T":
            break
    return text + suffix


def format_bytes(number: float) -> str:
    """Three digits and a binary power: `512B`, `1.30GiB`."""
    for unit, suffix in enumerate(("B", "KiB", "MiB", "GiB", "TiB")):
        text = _three_digits(number / 1024**unit)
        if abs(float(text)) < 1000 or suffix == "TiB":
            break
    return text + suffix


def _three_digits(number: float) -> str:
    if number == round(number) and abs(number) < 1000:
        return f"{number:.0f}"
    digits = 0 if abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}"


def _finite(value: Any) -> Any:
    return (
        None
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf")))
        else value
    )


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _record(line: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise DataError(
            f"{path}: a line that is no record of a step",
            found=repr(line[:80].rstrip()),
            allowed='a JSON object with a whole "step" on every line',
            do="remove the line, or move the file away",
        )
    return record


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
