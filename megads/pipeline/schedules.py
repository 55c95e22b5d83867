"""The builders: pure functions (stages, micro-batches, chunks) -> `Schedule`, and the table of their names.

    GPipe:  all forwards, then all backwards.       1F1B:  as few forwards ahead as keep the last stage busy.
    rank 0 | F F F F . . B B B B                    rank 0 | F F . B F B F B . B     at most 2 alive
    rank 1 | . F F F F B B B B .                    rank 1 | . F B F B F B F B .     at most 1 alive

    Interleaved 1F1B: v stages a rank, dealt in turn (here 0 and 2 to rank 0), so filling and draining pass
    stages 1/v as long. Micro-batches go in rounds of p (here 2): all through one chunk, then through the next.
    rank 0 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1  .  2B2  .  2B3 0B2 0B3    at most 5 alive
    rank 1 |  .  1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3  .     at most 3 alive

A new schedule is a builder and a row of `SCHEDULES`. Sends, receives and reductions are not written here
(`lower.py` adds them), and no builder has to be trusted: `verify.py` proves what it returns.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Row, Schedule, live_counts, parse_schedule


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


def interleaved(num_stages: int, num_micro_batches: int, *, num_chunks: int) -> Schedule:
    """Interleaved 1F1B: stage s on rank s % p, so that each rank holds v stages that are far apart.

    For m % p == 0: bubble (p - 1)(F + B) / v a rank, F and B of a rank's v stages together, and
    min(2(p - 1 - r) + (v - 1)p + 1, m v) live activations of one stage on rank r. Any other m is built for the
    next multiple of p, and the actions of the micro-batches that do not exist are left out. Whatever an action
    waits for belongs to its own micro-batch, so what is left runs in the order that it had; between equal
    stages its bubble is at least that of whole rounds and at most that of 1F1B. One chunk a rank is 1F1B
    itself. Source: Narayanan et al., SC'21, section 2.2.2 (figure 4).

    Args:
        num_stages: stages of all ranks together, p v.
        num_micro_batches: m, any number.
        num_chunks: v, the stages that each rank holds.

    Raises:
        ScheduleError: a count below 1, or stages that cannot be dealt evenly.
    """
    _check_counts(num_stages, num_micro_batches, num_chunks)
    num_ranks, left_over = divmod(num_stages, num_chunks)
    if left_over:
        raise ScheduleError(
            "schedule interleaved gives every rank the same number of stages",
            found=f"{num_stages} stages in chunks of {num_chunks} a rank",
            allowed=f"a multiple of {num_chunks} stages",
        )
    if num_chunks == 1:
        return replace(one_f_one_b(num_stages, num_micro_batches), name="interleaved")
    placement = tuple(stage % num_ranks for stage in range(num_stages))
    rows = [_interleaved_row(rank, num_ranks, num_micro_batches, num_chunks) for rank in range(num_ranks)]
    max_live = tuple(max(live_counts(row)) for row in rows)
    return Schedule("interleaved", num_micro_batches, (placement,), max_live, tuple(rows))


def _interleaved_row(rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int) -> Row:
    """One rank's row, two chunks or more: whole rounds of p micro-batches, less those that do not exist."""
    rounds = [range(first, first + num_ranks) for first in range(0, num_micro_batches, num_ranks)]
    forward_order = [(chunk, m) for ms in rounds for chunk in range(num_chunks) for m in ms]
    forwards = [Action(Kind.F, chunk * num_ranks + rank, m) for chunk, m in forward_order]
    backwards = [Action(Kind.B, (num_chunks - 1 - c) * num_ranks + rank, m) for c, m in forward_order]
    # A round through all chunks but the last, then two a hop: the way to the last rank and the way back.
    ahead = min((num_chunks - 1) * num_ranks + 2 * (num_ranks - 1 - rank), len(forwards))
    row = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):  # F first, unlike 1F1B's B first
        row += [forward, backward]
    row += backwards[len(forwards) - ahead :]
    return tuple(action for action in row if action.micro_batch < num_micro_batches)


def _one_stage_a_rank(
    name: str, rows: Sequence[Row], num_micro_batches: int, max_live: tuple[int, ...]
) -> Schedule:
    return Schedule(name, num_micro_batches, (tuple(range(len(rows))),), max_live, tuple(rows))


def _check_counts(num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> None:
    counts = (("chunks a rank", num_chunks), ("stages", num_stages), ("micro-batches", num_micro_batches))
    for what, count in counts:
        if count < 1:
            raise ScheduleError(f"a schedule needs at least one of its {what}", found=count, allowed=">= 1")


class Builder(Protocol):
    """A builder as the table holds it; the arguments are those of `build`."""

    def __call__(self, num_stages: int, num_micro_batches: int, *, num_chunks: int) -> Schedule: ...


class Bubble(Protocol):
    """Idle time of each rank in closed form, every stage costing the same; None where there is no such form.

    `forward` and `backward` are those of one micro-batch on all stages of a rank; the result is in their unit.
    """

    def __call__(
        self, num_ranks: int, num_micro_batches: int, *, num_chunks: int, forward: float, backward: float
    ) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the table knows of a schedule.

    Args:
        build: the builder.
        bubble: its bubble in closed form.
        bubble_formula: the same for a reader.
    """

    build: Builder
    bubble: Bubble
    bubble_formula: str


def _unchunked(builder: Callable[[int, int], Schedule]) -> Builder:
    """A builder that knows no chunks, as one that refuses more than one."""

    def build_unchunked(num_stages: int, num_micro_batches: int, *, num_chunks: int) -> Schedule:
        if num_chunks != 1:
            raise ScheduleError(
                f"schedule {builder.__name__} has one stage a rank",
                found=f"{num_chunks} chunks",
                allowed="1 chunk",
            )
        return builder(num_stages, num_micro_batches)

    return build_unchunked


def _fill_and_drain(
    num_ranks: int, num_micro_batches: int, *, num_chunks: int, forward: float, backward: float
) -> float:
    return (num_ranks - 1) * (forward + backward) / num_chunks


def _fill_and_drain_in_rounds(
    num_ranks: int, num_micro_batches: int, *, num_chunks: int, forward: float, backward: float
) -> float | None:
    if num_chunks > 1 and num_micro_batches % num_ranks:
        return None
    return _fill_and_drain(
        num_ranks, num_micro_batches, num_chunks=num_chunks, forward=forward, backward=backward
    )


SCHEDULES: Mapping[str, Recipe] = MappingProxyType(
    {
        "gpipe": Recipe(_unchunked(gpipe), _fill_and_drain, "(p-1)(F+B)"),
        "one_f_one_b": Recipe(_unchunked(one_f_one_b), _fill_and_drain, "(p-1)(F+B)"),
        "interleaved": Recipe(interleaved, _fill_and_drain_in_rounds, "(p-1)(F+B)/v"),
    }
)
"""Name -> recipe, for `parallel.schedule` and `python -m megads schedule`."""


def build(name: str, *, num_stages: int, num_micro_batches: int, num_chunks: int = 1) -> Schedule:
    """Build the schedule called `name`.

    Args:
        name: a key of `SCHEDULES`.
        num_stages: stages of the whole pipeline, >= 1: pipeline ranks x num_chunks.
        num_micro_batches: micro-batches of one optimizer step, >= 1; any number will do.
        num_chunks: stages that each rank holds; more than 1 for interleaved alone.

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
    return SCHEDULES[name].build(num_stages, num_micro_batches, num_chunks=num_chunks)


def placement_of(name: str, *, num_ranks: int, num_chunks: int = 1) -> tuple[int, ...]:
    """The pipeline rank of each stage under the schedule called `name`: `Layout.placement`, `Schedule.placement[0]`.

    Stages are dealt in turn (p = 2, v = 2: 0 1 0 1), or as a V, so that a rank holds a stage of the way out and
    its mirror image of the way back, and the first and the last stage are on rank 0:

        rank 0 | 0     5
        rank 1 |  1   4
        rank 2 |   2 3

    Args:
        num_ranks: pipeline ranks, p.
        num_chunks: stages that each rank holds, v.
    """
    dealt = range(num_ranks)
    if name not in _V_SHAPED:
        return tuple(dealt) * num_chunks
    return tuple(rank for chunk in range(num_chunks) for rank in (reversed(dealt) if chunk % 2 else dealt))


_V_SHAPED = ("zbv", "dualpipe_v")


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
