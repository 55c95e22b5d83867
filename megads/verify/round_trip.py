"""Save under one layout, load under another: the same bits, and the same step after it.

    layout A   steps 1..N, save, step N + 1  ------------------------+
    layout B   load: weights and moments bit for bit, step N + 1  ---+-> the same loss and weights to rounding

B is one process and every other layout of the command (A itself if there is none), in A's precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megads.checkpoint.load import load
from megads.checkpoint.reader import step_name
from megads.checkpoint.save import save
from megads.config.root import Config
from megads.parallel.control import Control
from megads.verify.compare import BOUNDS, Bounds
from megads.verify.measure import Trainee
from megads.verify.outcome import Arrays, assemble, parts_of
from megads.verify.ranks import STALL, fork_ranks
from megads.verify.trial import Trial

LOW = Bounds(loss=1e-2, gradient=1.0, norm=1.0, weight=1.0, output=1.0)  # of bf16 and fp16


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What became of a checkpoint.

    Attributes:
        name: of the layout that loaded it.
        failure: what is wrong; None: nothing.
    """

    name: str
    failure: str | None


@dataclass(frozen=True, slots=True)
class _State:
    """Logical tensors at the end of step N, and the loss of step N + 1."""

    tensors: Arrays
    scalars: dict[str, Any]
    loss: float


def round_trips(trial: Trial, others: Sequence[Trial], *, steps: int) -> tuple[RoundTrip, ...]:
    """Save `trial` after `steps` steps and load it in each of `others`, which have its precision.

    Raises:
        RanksError: ranks failed.
    """
    with tempfile.TemporaryDirectory(prefix="megads-verify-") as name:
        directory = Path(name)
        saved = _run(trial.config, trial.world_size, directory, steps=steps, loads=False)
        bounds = BOUNDS.get(trial.config.optim.precision, LOW)
        found = []
        for other in others:
            loaded = _run(other.config, other.world_size, directory, steps=steps, loads=True)
            found.append(RoundTrip(other.name, _difference(saved, loaded, bounds)))
    return tuple(found)


def _run(config: Config, world_size: int, directory: Path, *, steps: int, loads: bool) -> _State:
    """Train and save, or load; then one step more."""

    def work(control: Control) -> Any:
        trainee = Trainee.build(config, control, stall=STALL)
        engine = trainee.engine
        if loads:
            reader = load(directory / step_name(steps), engine.targets(), control=control)
            engine.load_scalars(reader.objects["optim"])
        else:
            for number in range(1, steps + 1):
                trainee.step(number)
            objects = {"optim": dict(engine.scalars())}
            save(directory, steps, pieces=engine.state(), objects=objects, control=control)
        parts, scalars = parts_of(engine.state()), dict(engine.scalars())
        return parts, scalars, trainee.step(steps + 1).loss.item()

    ranks = fork_ranks(work, world_size)
    return _State(assemble([parts for parts, _, _ in ranks], {}), ranks[0][1], ranks[0][2])


def _difference(saved: _State, loaded: _State, bounds: Bounds) -> str | None:
    if saved.tensors.keys() != loaded.tensors.keys():
        names = sorted(saved.tensors.keys() ^ loaded.tensors.keys())
        return f"{names[0]}: only one of them has it"
    wrong = [
        name for name, values in saved.tensors.items() if not np.array_equal(values, loaded.tensors[name])
    ]
    if wrong:
        return f"{wrong[0]}: not the bits that were saved ({len(wrong)} tensors)"
    if saved.scalars != loaded.scalars:
        return f"state of the optimizer: {loaded.scalars}, saved {saved.scalars}"
    error = abs(loaded.loss / saved.loss - 1.0)
    if not error <= bounds.loss:
        return f"loss of the next step differs by {error:.1e} (bound {bounds.loss:.0e}): weights are not those loaded"
    return None
