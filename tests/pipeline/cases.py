"""The schedules of the table as the tests build them: a number of ranks, with the chunks that each needs."""

from __future__ import annotations

from megads.pipeline.action import Schedule
from megads.pipeline.schedules import SCHEDULES, build
from megads.pipeline.simulate import Costs, split_costs

WHOLE = ("gpipe", "one_f_one_b", "interleaved")
"""Schedules without I and W."""

SPLIT = tuple(name for name in SCHEDULES if name not in WHOLE)


def chunks_of(name: str) -> int:
    """Chunks a rank: 2 where a schedule takes any number."""
    return SCHEDULES[name].num_chunks or 2


def is_legal(name: str, p: int, m: int) -> bool:
    return name != "dualpipe" or (p % 2 == 0 and m % 2 == 0)


def on_ranks(name: str, p: int, m: int, num_chunks: int | None = None) -> Schedule:
    """The schedule called `name` on p ranks."""
    chunks = num_chunks or chunks_of(name)
    return build(name, num_stages=p * chunks, num_micro_batches=m, num_chunks=chunks)


def rank_costs(
    schedule: Schedule,
    forward: float = 1.0,
    input_gradient: float = 1.0,
    weight_gradient: float = 1.0,
    *,
    latency: float = 0.0,
) -> Costs:
    """Costs of equal stages from those of a micro-batch on all stages of a rank."""
    num, share = schedule.num_stages, 1 / schedule.num_chunks
    return split_costs(
        [forward * share] * num,
        input_gradient=[input_gradient * share] * num,
        weight_gradient=[weight_gradient * share] * num,
        latency=latency,
    )
