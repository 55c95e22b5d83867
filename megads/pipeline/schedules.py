"""The builders: pure functions (stages, micro-batches) -> `Schedule`, and the table of their names.

    GPipe:  all forwards, then all backwards.       1F1B:  as few forwards ahead as keep the last stage busy.
    rank 0 | F F F F . . B B B B                    rank 0 | F F . B F B F B . B     at most 2 alive
    rank 1 | . F F F F B B B B .                    rank 1 | . F B F B F B F B .     at most 1 alive

A new schedule is a builder and a row of `SCHEDULES`. Sends, receives and reductions are not written here
(`lower.py` adds them), and no builder has to be trusted: `verify.py` proves what it returns.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Row, Schedule, parse_schedule


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """GPipe: every forward, then every backward, both in order; one stage a rank.

    Bubble (p - 1)(F + B) a rank; m live activations on each rank. Source: Narayanan et al., SC'21,
    section 2.2.1.

    Raises:
        ScheduleError: a count below 1.
    """
    _check_counts(num_stages, num_micro_batches)
    micro_batches = range(num_micro_batches)
    rows = [
        tuple(Action(Kind.F, stage, m) for m in micro_batches)
        + tuple(Action(Kind.B, stage, m) for m in micro_batches)
        for stage in range(num_stages)
    ]
    return _one_stage_a_rank("gpipe", rows, num_micro_batches, (num_micro_batches,) * num_stages)


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """1F1B (PipeDream-flush): p - r forwards ahead on rank r, then one backward for each forward.

    Bubble (p - 1)(F + B) a rank; min(p - r, m) live activations on rank r. Source: Narayanan et al., SC'21,
    section 2.2.1 (figure 4).

    Raises:
        ScheduleError: a count below 1.
    """
    _check_counts(num_stages, num_micro_batches)
    rows = []
    ahead = tuple(min(num_stages - stage, num_micro_batches) for stage in range(num_stages))
    for stage in range(num_stages):
        row = [Action(Kind.F, stage, m) for m in range(ahead[stage])]
        for m in range(num_micro_batches):
            row.append(Action(Kind.B, stage, m))
            if m + ahead[stage] < num_micro_batches:
                row.append(Action(Kind.F, stage, m + ahead[stage]))
        rows.append(tuple(row))
    return _one_stage_a_rank("one_f_one_b", rows, num_micro_batches, ahead)


def _one_stage_a_rank(
    name: str, rows: Sequence[Row], num_micro_batches: int, max_live: tuple[int, ...]
) -> Schedule:
    return Schedule(name, num_micro_batches, (tuple(range(len(rows))),), max_live, tuple(rows))


def _check_counts(num_stages: int, num_micro_batches: int) -> None:
    for what, count in (("stages", num_stages), ("micro-batches", num_micro_batches)):
        if count < 1:
            raise ScheduleError(f"a schedule needs at least one of its {what}", found=count, allowed=">= 1")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the table knows of a schedule.

    Args:
        build: (num_stages, num_micro_batches) -> Schedule.
        bubble: (num_stages, num_micro_batches, forward, backward) -> idle time of each rank, in closed form,
            in the unit of the two durations (those of one stage), every stage costing the same.
        bubble_formula: the same for a reader.
    """

    build: Callable[[int, int], Schedule]
    bubble: Callable[[int, int, float, float], float]
    bubble_formula: str


def _fill_and_drain(num_stages: int, num_micro_batches: int, forward: float, backward: float) -> float:
    return (num_stages - 1) * (forward + backward)


SCHEDULES: Mapping[str, Recipe] = MappingProxyType(
    {
        "gpipe": Recipe(gpipe, _fill_and_drain, "(p-1)(F+B)"),
        "one_f_one_b": Recipe(one_f_one_b, _fill_and_drain, "(p-1)(F+B)"),
    }
)
"""Name -> recipe, for `parallel.schedule` and `python -m megads schedule`."""


def build(name: str, *, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """Build the schedule called `name`.

    Args:
        name: a key of `SCHEDULES`.
        num_stages: pipeline stages, >= 1.
        num_micro_batches: micro-batches of one optimizer step, >= 1; any number will do.
        num_chunks: stages that each rank holds; 1 for gpipe and one_f_one_b.

    Raises:
        ScheduleError: an unknown name, or counts that this schedule cannot have.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.4)
        raise ScheduleError(
            f"schedule {name!r} is unknown",
            found=name,
            allowed=", ".join(SCHEDULES),
            do=f"did you mean {near[0]}?" if near else None,
        )
    if num_chunks != 1:
        raise ScheduleError(
            f"schedule {name} has one stage a rank", found=f"{num_chunks} chunks", allowed="1 chunk"
        )
    return SCHEDULES[name].build(num_stages, num_micro_batches)


def read_schedule(path: Path) -> Schedule:
    """Read a schedule from a file in the text form of `action.py`. It is not verified.

    Raises:
        ScheduleError: the file cannot be read or is not well formed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"schedule file {path} cannot be read", found=error) from error
    return parse_schedule(text, source=str(path))
