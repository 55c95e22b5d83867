"""What a config changes while a run goes on: batch size by tokens read, sequence length by step. Needs no torch."""

from __future__ import annotations

from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.data.curriculum import Constant, Curriculum, Discrete, Root
from megads.data.plan import Ramp


def ramp_of(batch: BatchConfig) -> Ramp:
    """The batch size by tokens read that the config asks for."""
    if batch.ramp is None:
        return Ramp(((0, batch.global_size),))
    return Ramp(tuple((point.tokens, point.global_size) for point in batch.ramp), batch.ramp_unit)


def curriculum_of(data: DataConfig) -> Curriculum:
    """The sequence length by step that the config asks for."""
    end, given = data.sequence_length, data.curriculum
    if given is None:
        return Constant(end)
    if given.kind == "fixed_discrete":
        return Discrete(given.lengths, given.until, end)
    degree = given.root if given.kind == "fixed_root" else 1
    return Root(given.start or end, end, given.steps or 1, given.unit, degree)
