"""What a fresh run starts from: the weights of another run or of an imported model, wholly or in part.

checkpoint.start     weights alone; step 0, new optimizer state, the run's own data from its beginning
checkpoint.load      all of a run: weights, optimizer state, data (`checkpoint/load.py`)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from megads.checkpoint.load import Tolerance, load
from megads.checkpoint.logical import newest_reader
from megads.checkpoint.reader import StepReader
from megads.checkpoint.share import Reading
from megads.config.checkpoint import CheckpointConfig
from megads.data.segment import Segment
from megads.optim.engine import Engine
from megads.parallel.control import Control
from megads.parallel.parameter import ShardedParameter, stored_name
from megads.train import history

_log = logging.getLogger("megads.train")


def take_over(engine: Engine, reader: StepReader) -> tuple[Segment, ...]:
    """Bring an engine whose tensors were filled to the state of a step; returns the history of the data up to there.

    A converted step is step 0 and knows of no data; one without the object `optim` has no optimizer state either, which
    then starts anew. Both are said aloud.

    Raises:
        CheckpointError: a later step without a history.
    """
    objects = reader.objects
    if "optim" in objects:
        engine.load_scalars(objects["optim"])
    else:
        _start_anew(engine)
        _log.info("%s holds a model alone: the optimizer starts with new moments", reader.path)
    if reader.step == 0 and "history" not in objects:
        _log.info("%s comes from another program: the data is read from its beginning", reader.path)
        return ()
    return history.from_objects(objects)


def start_from(
    config: CheckpointConfig,
    engine: Engine,
    *,
    parameters: Iterable[ShardedParameter],
    control: Control,
    reading: Reading,
) -> str | None:
    """Load the weights of `checkpoint.start` into the engine's masters; returns a sentence for the user.

    All ranks call it. None: the config names nothing to start from.

    Args:
        parameters: this rank's, which tell what is cut by the vocabulary.

    Raises:
        CheckpointError: on all ranks: nothing there, damage, or weights that do not fit, by name.
    """
    if config.start is None:
        return None
    vocabulary = {
        f"model/{stored_name(parameter)}"
        for parameter in parameters
        if config.start_other_vocab and any(cut.pad for cut in parameter.spec.cuts)
    }
    every: set[str] = set().union(*control.all_gather(sorted(vocabulary)))  # also of other stages
    step = newest_reader(Path(config.start))
    tolerance = Tolerance(
        unread=("optim/", "router/", "ema_", *(f"model/{prefix}" for prefix in config.start_unused)),
        missing=tuple(f"model/{pattern}" for pattern in config.start_missing),
        resized=frozenset(every),
    )
    wanted = [piece for piece in engine.targets() if piece.name.startswith("model/")]
    load(step.path, wanted, control=control, reading=reading, tolerance=tolerance)
    _start_anew(engine)
    kept = sorted({piece.name for piece in wanted if piece.name not in step.manifest.tensors})
    rest = f"; {len(kept)} that it lacks keep their initial values" if kept else ""
    return f"starts from the weights of {step.path}{rest}"


def _start_anew(engine: Engine) -> None:
    """Make weights of masters that were filled. Averages of the weights before do not count: they begin with these."""
    engine.load_scalars({name: value for name, value in engine.scalars().items() if name != "ema"})
