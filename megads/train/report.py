"""What one rank tells about a run: metrics.jsonl, one line a step, TensorBoard, samples.

Only the rank that speaks writes; what the numbers are is decided in `trainer.py` and `metrics.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megads import log
from megads.config.root import Config
from megads.train.board import Board

_log = logging.getLogger("megads.train")


class Reporter:
    """Writes to `directory`, if `speaks`.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(self, config: Config, *, directory: Path, speaks: bool) -> None:
        self._config = config
        self._speaks = speaks
        self._metrics = log.MetricsWriter(directory / "metrics.jsonl")
        self._board = Board(directory / "tensorboard") if speaks and config.log.tensorboard else None
        self._seconds_per_step: float | None = None

    def resume(self, step: int) -> None:
        """Forget what an earlier start wrote of the steps after `step`: they are run again."""
        if self._speaks:
            self._metrics.cut_back(step)

    def step(self, record: Mapping[str, float], *, is_shown: bool) -> None:
        """Write a step's record; say it if `is_shown`."""
        seconds, old = record["seconds"], self._seconds_per_step
        self._seconds_per_step = seconds if old is None else 0.9 * old + 0.1 * seconds
        if not self._speaks:
            return
        self._metrics.write(record)
        if self._board is not None:
            self._board.scalars(record)
        if is_shown:
            total = self._config.run.steps
            eta = (total - record["step"]) * self._seconds_per_step
            _log.info("%s", log.format_step(record, total=total, eta=eta))
        for name, value in record.items():
            if name.startswith("valid/"):
                _log.info("step %d %s %.4f", record["step"], name, value)

    def sample(self, prompt: str, text: str, *, step: int) -> None:
        """Say how the model continues a prompt."""
        if not self._speaks:
            return
        _log.info("step %d sample %r -> %s", step, prompt, text)
        if self._board is not None:
            self._board.text(f"sample/{prompt}", text, step=step)

    def close(self) -> None:
        """Write what is buffered."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()


def short_names(paths: list[str]) -> list[str]:
    """Names of corpora for metrics: the last part of the path, or the whole path where two would be the same."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
