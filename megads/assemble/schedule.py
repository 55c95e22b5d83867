"""The schedule that a config names: one of the table, or the user's own from a file. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from megads.config.parallel import ParallelConfig
from megads.pipeline.action import Schedule
from megads.pipeline.schedules import SCHEDULES, build, placement_of
from megads.pipeline.text import read_schedule


def own_schedule(parallel: ParallelConfig) -> Schedule | None:
    """The schedule in the file that `parallel.schedule` names; None if it names one of the table.

    Raises:
        ScheduleError: there is no such file, or it is not well formed.
    """
    return None if parallel.schedule in SCHEDULES else read_schedule(Path(parallel.schedule))


def placement(parallel: ParallelConfig) -> tuple[int, ...]:
    """The pipeline rank of each stage.

    Raises:
        ScheduleError: as `own_schedule`.
    """
    own = own_schedule(parallel)
    if own is not None:
        return own.placement[0]
    return placement_of(parallel.schedule, num_ranks=parallel.pipeline, num_chunks=parallel.virtual_stages)


def schedule_of(parallel: ParallelConfig, *, num_micro_batches: int) -> Schedule:
    """The schedule of one optimizer step of this many micro-batches, compute alone or lowered, as it was written.

    A file holds for the number of micro-batches that it says (`rules_schedule.py` compares).

    Raises:
        ScheduleError: as `own_schedule`, or counts that the schedule cannot have.
    """
    own = own_schedule(parallel)
    if own is not None:
        return own
    return build(
        parallel.schedule,
        num_stages=parallel.pipeline * parallel.virtual_stages,
        num_micro_batches=num_micro_batches,
        num_chunks=parallel.virtual_stages,
    )
