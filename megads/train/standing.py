"""Where a run stands: the step it goes on from and the data it goes on with. Loading it, and going back to it.

    resume      a saved step -> engine, schedule, guard, history              (or a fresh start)
    roll back   the last saved step again, but the batches from there to the one that was out of line are read by nobody

A rollback is a row of the history with skipped samples. It is in `run.dir/history.json` at once and in every later
checkpoint: a run that is killed before the next one finds it in the file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megads.assemble import source
from megads.assemble.source import Source
from megads.assemble.wiring import Model
from megads.checkpoint.load import Resumed, Tolerance, resume
from megads.checkpoint.preflight import check_writable
from megads.checkpoint.reader import StepReader
from megads.checkpoint.share import Reading
from megads.config.root import Config
from megads.data.loader import check_epochs
from megads.data.segment import Segment, stream_tokens
from megads.errors import NumericsError
from megads.optim.ema import kind_of
from megads.optim.engine import Engine
from megads.optim.guard import SpikeGuard
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh
from megads.train import history as run_history
from megads.train.pace import Pace
from megads.train.start import start_from, take_over
from megads.train.verdict import RollBack

_log = logging.getLogger("megads.train")

# averages that came or went since: see `_say_averages`
AVERAGES = Tolerance(unread=("ema_",), missing=("ema_*",))


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands.

    Attributes:
        step: the last one that is done; 0: none.
        history: what all steps read.
    """

    step: int
    history: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Holder:
    """What a checkpoint is loaded into.

    Attributes:
        guard: None: the run has none.
    """

    model: Model
    engine: Engine
    pace: Pace
    guard: SpikeGuard | None


class Restorer:
    """Brings a run to where it stands. All ranks call it."""

    def __init__(self, config: Config, opened: Source, held: Holder, *, mesh: Mesh, control: Control) -> None:
        self._config = config
        self._source = opened
        self._held = held
        self._control = control
        self._directory = Path(config.run.dir)
        self._checkpoints = self._directory / "checkpoints"
        self._reading = Reading(config.checkpoint.checked_share, mesh.group("dp_cp"), mesh.device)
        self._num_rollbacks = 0

    def resume(self) -> Standing:
        """Load the step to go on from, as `checkpoint.load` says, if there is one.

        Raises:
            CheckpointError, DataError: what is there cannot be gone on from.
        """
        state = self._held.engine.state()
        size = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in state)
        check_writable(self._checkpoints, sum(self._control.all_gather(size)), control=self._control)
        resumed = self._load(self._config.checkpoint.load)
        _log.info("%s", resumed.sentence)
        if resumed.reader is None:
            started = start_from(
                self._config.checkpoint,
                self._held.engine,
                parameters=self._held.model.parameters,
                control=self._control,
                reading=self._reading,
            )
            if started:
                _log.info("%s", started)
            return self._planned(0, (), skipped_tokens=0)
        self._say_averages(resumed.reader)
        step, saved = resumed.reader.step, take_over(self._held.engine, resumed.reader)
        is_own = resumed.reader.path.parent.resolve() == self._checkpoints.resolve()
        skipped = self._recorded_skip(step + 1) if is_own else 0
        if skipped:
            _log.info("%d tokens from step %d on stay out, as a rollback wants", skipped, step + 1)
        standing = self._planned(step, saved, skipped_tokens=skipped)
        self._num_rollbacks = sum(bool(segment.skipped) for segment in standing.history)
        return standing

    def roll_back(self, cause: RollBack, history: Sequence[Segment]) -> Standing:
        """Load the last saved step and leave out what was read from there to the step that is the cause.

        Raises:
            NumericsError: nothing is saved, or the run has gone back too often.
        """
        guard = self._config.optim.guard
        assert guard is not None  # it asked for this
        self._num_rollbacks += 1
        resumed = None if self._num_rollbacks > guard.limit else self._load("auto")
        if resumed is None or resumed.reader is None:
            raise NumericsError(
                f"step {cause.step} is out of line and the run cannot go back",
                found=f"{cause}; {'no step is saved' if resumed else f'{guard.limit} rollbacks before'}",
                allowed=f"a saved step, and at most {guard.limit} rollbacks (optim.guard.limit)",
                do="go on from an earlier checkpoint with a lower optim.lr",
            )
        step = resumed.reader.step
        take_over(self._held.engine, resumed.reader)
        skipped = stream_tokens(history, range(step + 1, cause.step + 1))
        _log.warning(
            "step %d is out of line: %s; back to step %d, and what steps %d to %d read stays out (%d tokens)",
            cause.step,
            cause,
            step,
            step + 1,
            cause.step,
            skipped,
        )
        saved = tuple(segment for segment in history if segment.first_step <= step)
        return self._planned(step, saved, skipped_tokens=skipped)

    def _load(self, wanted: str) -> Resumed:
        """Fill the engine's tensors, the schedule and the guard from a step; `take_over` makes weights of them."""
        resumed = resume(
            wanted,
            self._checkpoints,
            pieces=self._held.engine.targets(),
            control=self._control,
            on_damage=self._config.checkpoint.on_damage,
            reading=self._reading,
            tolerance=AVERAGES,
        )
        if resumed.reader is not None:
            objects = resumed.reader.objects
            self._held.pace.load(objects.get("schedule", {}))
            if self._held.guard is not None and objects.get("guard"):
                self._held.guard.load(objects["guard"])
        return resumed

    def _planned(self, step: int, saved: Sequence[Segment], *, skipped_tokens: int) -> Standing:
        """The whole run's history, with the config's plan from the next step on."""
        config, opened = self._config, self._source
        history = source.wanted_history(
            config, opened.train, saved=saved, first_step=step + 1, skipped_tokens=skipped_tokens
        )
        limits = {s.path: s.max_epochs for s in opened.shares if s.max_epochs is not None}
        check_epochs(history, opened.train, last_step=config.run.steps, max_epochs=limits)
        return Standing(step, history)

    def _recorded_skip(self, first_step: int) -> int:
        """Tokens that `run.dir/history.json` leaves out before a step: of a rollback that no checkpoint knows yet."""
        found = 0
        if self._control.rank == 0:
            rows = run_history.read(self._directory / "history.json") or ()
            row = next((row for row in rows if row.first_step == first_step), None)
            if row is not None:
                found = sum(stop - start for start, stop in row.skipped) * row.sequence_length
        return int(self._control.all_gather(found)[0])

    def _say_averages(self, reader: StepReader) -> None:
        saved = {float(decay) for decay in reader.objects.get("optim", {}).get("ema", ())}
        wanted = set(self._config.optim.ema)
        for decay in sorted(wanted - saved):
            _log.info("%s begins as the weights are now: the checkpoint has no such average", kind_of(decay))
        for decay in sorted(saved - wanted):
            _log.info("%s is dropped: optim.ema has no such average", kind_of(decay))
