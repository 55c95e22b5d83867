"""What follows from a step that was not taken: the run ends, goes on, or goes back.

    numbers not finite, no guard    stop            fp16's loss scale was too large    go on
    out of line, optim.guard        stop | skip | rollback                             never more often than its limit

The step itself changed nothing: that was decided on the device (`optim/guard.py`). Every rank reads the same numbers
and comes to the same verdict. The documents of the batch are named by the rank that speaks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from megads.assemble.step import StepResult
from megads.config.root import Config
from megads.data.corpus import Corpus
from megads.data.segment import Segment
from megads.errors import NumericsError
from megads.train.ledger import lines_of_step

_log = logging.getLogger("megads.train")

NUM_SHOWN = 8  # documents in the log


class RollBack(Exception):
    """The run goes back to its last checkpoint because of step `step`; caught in `trainer.py`."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(reason)
        self.step = step


class Judge:
    """Reads the numbers of one run's steps.

    Args:
        corpora: those of `data.train`.
        speaks: whether this rank names documents.
    """

    def __init__(self, config: Config, corpora: Sequence[Corpus], *, speaks: bool) -> None:
        self._config = config
        self._corpora = corpora
        self._speaks = speaks
        self._num_in_a_row = 0

    def judge(
        self, step: int, result: StepResult, *, loss: float, norm: float, history: Sequence[Segment]
    ) -> None:
        """Let a step pass, or say what follows.

        Raises:
            NumericsError: the run ends; with the step.
            RollBack: it goes back.
        """
        report, guard = result.report, self._config.optim.guard
        if math.isfinite(loss) and report.taken.item():
            self._num_in_a_row = 0
            return
        scale = report.loss_scale.item()
        is_overflow = self._config.optim.precision == "fp16" and math.isfinite(loss) and scale >= 1.0
        if is_overflow and not report.finite.item():
            _log.info("step %d skipped: a gradient is too large for fp16; loss scale now %g", step, scale)
            return
        if guard is None:
            raise _not_finite(step, loss=loss, norm=norm)
        reason = _reason(result, loss=loss, norm=norm)
        if self._speaks:
            self._name_documents(step, history)
        if guard.policy == "rollback":
            raise RollBack(step, reason)
        self._num_in_a_row += 1
        if guard.policy == "stop" or self._num_in_a_row > guard.limit:
            allowed = (
                f"at most {guard.limit} such steps in a row (optim.guard.limit)"
                if guard.policy == "skip"
                else "the range of the last steps (optim.guard)"
            )
            raise NumericsError(
                f"step {step} is out of line and was not taken",
                found=reason,
                allowed=allowed,
                do="go on from the last checkpoint with a lower optim.lr, or with optim.guard.policy=rollback",
            )
        _log.warning("step %d is out of line and was skipped: %s", step, reason)

    def _name_documents(self, step: int, history: Sequence[Segment]) -> None:
        """Say what the batch was: the first documents in the log, all in a file."""
        lines = tuple(lines_of_step(self._corpora, history, step=step, seed=self._config.run.seed))
        path = Path(self._config.run.dir) / "out_of_line" / f"step-{step:08d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        _log.warning("the batch of step %d:\n%s", step, "\n".join(_head(lines, path)))


def _head(lines: Sequence[str], path: Path) -> Iterator[str]:
    yield from lines[: NUM_SHOWN + 1]
    rest = len(lines) - NUM_SHOWN - 1
    yield f"... and {rest} more in {path}" if rest > 0 else f"also in {path}"


def _reason(result: StepResult, *, loss: float, norm: float) -> str:
    bounds = [math.inf, math.inf] if result.bounds is None else result.bounds.tolist()
    if not all(map(math.isfinite, bounds)):
        return f"loss {loss:.6g}, gradient norm {norm:.6g}"
    return f"loss {loss:.6g} (at most {bounds[0]:.6g}), gradient norm {norm:.6g} (at most {bounds[1]:.6g})"


def _not_finite(step: int, *, loss: float, norm: float) -> NumericsError:
    return NumericsError(
        f"step {step}: the loss or a gradient is not finite",
        found=f"loss {loss}, gradient norm {norm}",
        allowed="finite numbers",
        do="weights are those of the step before; lower optim.lr, or go on from the last checkpoint; "
        "optim.guard skips such steps or goes back by itself",
    )
