"""Cross-checks of the pipeline's schedule: that it exists, that it can be run here, and that a user's own is right.

One small pure function a rule; `rules.py` joins the tables. A file with a schedule is read and proven here, so that a
mistake in it is told before any rank exists.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from megads.assemble.finding import Finding, Rule
from megads.assemble.schedule import own_schedule
from megads.config.root import Config
from megads.errors import ScheduleError
from megads.pipeline.action import Schedule
from megads.pipeline.schedules import SCHEDULES
from megads.pipeline.verify import verify

TWO_DIRECTIONS = ("dualpipe",)  # every rank holds two stages' parameters, whose copies nothing keeps equal


def schedule_is_known(config: Config, world_size: int) -> Finding | None:
    name = config.parallel.schedule
    if name in SCHEDULES or Path(name).is_file():
        return None
    near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.4)
    return Finding(
        "parallel.schedule",
        f"{name}, which is no schedule and no file",
        ", ".join(s for s in SCHEDULES if s not in TWO_DIRECTIONS) + ", or the path of a file",
        f"did you mean {near[0]}?" if near else None,
    )


def schedule_file_is_right(config: Config, world_size: int) -> Finding | None:
    if not Path(config.parallel.schedule).is_file():
        return None
    try:
        own = own_schedule(config.parallel)
        if own is not None:
            verify(own)
    except ScheduleError as error:
        return Finding(
            "parallel.schedule",
            str(error).replace("\n", "\n  "),
            "a schedule that can be run",
            f"python -m megads schedule {config.parallel.schedule} draws it",
        )
    return None


def schedule_has_one_direction(config: Config, world_size: int) -> Finding | None:
    own = _readable(config)
    if config.parallel.schedule not in TWO_DIRECTIONS and (own is None or len(own.placement) == 1):
        return None
    return Finding(
        "parallel.schedule",
        f"{config.parallel.schedule} holds every parameter twice, which can be drawn but not run",
        "a schedule of one direction",
        "dualpipe_v has the same overlap with each parameter once",
    )


def virtual_stages_fit_schedule(config: Config, world_size: int) -> Finding | None:
    parallel, own = config.parallel, _readable(config)
    if own is not None:
        wanted: int | None = own.num_stages // own.num_ranks
    elif parallel.schedule in SCHEDULES:
        wanted = SCHEDULES[parallel.schedule].num_chunks
    else:
        return None
    if wanted in (None, parallel.virtual_stages):
        return None
    return Finding(
        "parallel.virtual_stages",
        f"{parallel.virtual_stages} with parallel.schedule {parallel.schedule}, which has {wanted} a rank",
        str(wanted),
        "parallel.schedule=interleaved has any number" if wanted == 1 else None,
    )


def schedule_file_fits_ranks(config: Config, world_size: int) -> Finding | None:
    own, pipeline = _readable(config), config.parallel.pipeline
    if own is None or len(own.placement) > 1:
        return None
    dealt = sorted(own.placement[0])
    if own.num_ranks == pipeline and dealt == sorted([*range(pipeline)] * (own.num_stages // pipeline)):
        return None
    return Finding(
        "parallel.schedule",
        f"{config.parallel.schedule} has {own.num_stages} stages on {own.num_ranks} ranks; "
        f"parallel.pipeline is {pipeline}",
        "as many ranks as parallel.pipeline, each with the same number of stages",
        f"parallel.pipeline={own.num_ranks}" if own.num_ranks != pipeline else None,
    )


def schedule_file_fits_batch(config: Config, world_size: int) -> Finding | None:
    own, parallel = _readable(config), config.parallel
    replicas, rest = divmod(world_size, parallel.tensor * parallel.context * parallel.pipeline)
    if own is None or rest or config.batch.global_size % (config.batch.micro * replicas):
        return None
    found = config.batch.global_size // (config.batch.micro * replicas)
    if found == own.num_micro_batches:
        return None
    return Finding(
        "batch.global",
        f"{config.batch.global_size} is {found} micro-batches a replica; {parallel.schedule} is a schedule of "
        f"{own.num_micro_batches}",
        f"{own.num_micro_batches * config.batch.micro * replicas}",
    )


def _readable(config: Config) -> Schedule | None:
    """The user's own schedule, if there is one and it can be read."""
    try:
        return own_schedule(config.parallel)
    except ScheduleError:
        return None


RULES: tuple[Rule, ...] = (
    schedule_is_known,
    schedule_file_is_right,
    schedule_has_one_direction,
    virtual_stages_fit_schedule,
    schedule_file_fits_ranks,
    schedule_file_fits_batch,
)
