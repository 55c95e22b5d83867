"""The table of schedules by name, for `parallel.schedule` and `python -m megads schedule`.

    name -> Recipe: builder (pure function: stages, micro-batches, chunks -> `Schedule`), placement, closed form

A new schedule is a builder and a row of `SCHEDULES`. Builders live in `one_f_one_b.py`, `zero_bubble.py` and
`dualpipe.py`; they write compute alone. Sends, receives and reductions are added in `lower.py`, and no builder has to
be trusted: `verify.py` proves what it returns.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from megads.errors import ScheduleError
from megads.pipeline import closed_form
from megads.pipeline.action import Schedule
from megads.pipeline.closed_form import Bubble
from megads.pipeline.dualpipe import dualpipe, dualpipe_v
from megads.pipeline.one_f_one_b import gpipe, interleaved, one_f_one_b
from megads.pipeline.zero_bubble import vee, zbv, zero_bubble_h1, zero_bubble_h2


class Builder(Protocol):
    """A builder as the table holds it; the arguments are those of `build`."""

    def __call__(self, num_stages: int, num_micro_batches: int, *, num_chunks: int) -> Schedule: ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the table knows of a schedule.

    Args:
        build: the builder.
        num_chunks: stages of one direction that a rank holds; None: any number.
        is_vee: whether stages are placed as a V; else they are dealt in turn.
        bubble: its bubble in closed form.
        bubble_formula: the same for a reader.
        note: what a user who compares schedules should know.
    """

    build: Builder
    num_chunks: int | None
    is_vee: bool
    bubble: Bubble
    bubble_formula: str
    note: str


def _fixed(builder: Callable[[int, int], Schedule], wanted: int) -> Builder:
    """A builder that has one number of chunks, as one that refuses others."""

    def build_fixed(num_stages: int, num_micro_batches: int, *, num_chunks: int) -> Schedule:
        if num_chunks != wanted:
            raise ScheduleError(
                f"schedule {builder.__name__} has {'one stage' if wanted == 1 else 'two stages'} a rank",
                found=f"{num_chunks} chunks",
                allowed=f"{wanted} chunk{'s' if wanted > 1 else ''}",
            )
        return builder(num_stages, num_micro_batches)

    return build_fixed


SCHEDULES: Mapping[str, Recipe] = MappingProxyType(
    {
        "gpipe": Recipe(
            _fixed(gpipe, 1),
            1,
            False,
            closed_form.fill_and_drain,
            "(p-1)(F+B)",
            "memory grows with micro-batches",
        ),
        "one_f_one_b": Recipe(
            _fixed(one_f_one_b, 1), 1, False, closed_form.fill_and_drain, "(p-1)(F+B)", "least communication"
        ),
        "interleaved": Recipe(
            interleaved, None, False, closed_form.interleaved, "(p-1)(F+B)/v", "v times the messages"
        ),
        "zero_bubble_h1": Recipe(
            _fixed(zero_bubble_h1, 1),
            1,
            False,
            closed_form.zero_bubble_h1,
            "(p-1)(F+I-W)",
            "splits backwards",
        ),
        "zero_bubble_h2": Recipe(
            _fixed(zero_bubble_h2, 1),
            1,
            False,
            closed_form.zero_bubble_h2,
            "(p-1)(F+I-2W)",
            "splits backwards",
        ),
        "zbv": Recipe(_fixed(zbv, 2), 2, True, closed_form.zbv, "0", "splits backwards, twice the messages"),
        "dualpipe_v": Recipe(
            _fixed(dualpipe_v, 2),
            2,
            True,
            closed_form.dualpipe_v,
            "(p-1)(F&B+B-3W) of one stage",
            "overlaps pairs (--overlap), splits backwards, twice the messages",
        ),
        "dualpipe": Recipe(
            _fixed(dualpipe, 1),
            1,
            False,
            closed_form.dualpipe,
            "(p/2-1)(F&B+B-3W)",
            "overlaps pairs (--overlap); twin parameters: simulated, not trained (dualpipe_v is)",
        ),
    }
)
"""Name -> recipe, for `parallel.schedule` and `python -m megads schedule`."""


def recipe_of(name: str) -> Recipe:
    """The recipe of the schedule called `name`.

    Raises:
        ScheduleError: an unknown name.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.4)
        raise ScheduleError(
            f"schedule {name!r} is unknown",
            found=name,
            allowed=", ".join(SCHEDULES),
            do=f"did you mean {near[0]}?" if near else None,
        )
    return SCHEDULES[name]


def build(name: str, *, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """Build the schedule called `name`.

    Args:
        name: a key of `SCHEDULES`.
        num_stages: stages of the whole pipeline, >= 1: pipeline ranks x num_chunks.
        num_micro_batches: micro-batches of one optimizer step, >= 1; any number will do (dualpipe: any even one).
        num_chunks: stages that each rank holds: 1, but any number for interleaved and 2 for zbv and dualpipe_v.

    Raises:
        ScheduleError: an unknown name, or counts that this schedule cannot have.
    """
    return recipe_of(name).build(num_stages, num_micro_batches, num_chunks=num_chunks)


def placement_of(name: str, *, num_ranks: int, num_chunks: int = 1) -> tuple[int, ...]:
    """The pipeline rank of each stage under the schedule called `name`: `Layout.placement`, `Schedule.placement[0]`.

    Stages are dealt in turn (p = 2, v = 2: 0 1 0 1), or as a V (0 1 1 0), so that the first and the last stage are on
    rank 0.

    Args:
        num_ranks: pipeline ranks, p.
        num_chunks: stages that each rank holds, v.

    Raises:
        ScheduleError: an unknown name.
    """
    return vee(num_ranks) if recipe_of(name).is_vee else tuple(range(num_ranks)) * num_chunks
