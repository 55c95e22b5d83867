"""Builders that keep the backward whole: GPipe, 1F1B, interleaved 1F1B.

    GPipe:  all forwards, then all backwards.       1F1B:  as few forwards ahead as keep the last stage busy.
    rank 0 | F F F F . . B B B B                    rank 0 | F F . B F B F B . B     at most 2 alive
    rank 1 | . F F F F B B B B .                    rank 1 | . F B F B F B F B .     at most 1 alive

    Interleaved 1F1B: v stages a rank, dealt in turn (here 0 and 2 to rank 0), so filling and draining pass
    stages 1/v as long. Micro-batches go in rounds of p (here 2): all through one chunk, then through the next.
    rank 0 | 0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1  .  2B2  .  2B3 0B2 0B3    at most 5 alive
    rank 1 |  .  1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3  .     at most 3 alive

The table of all builders is in `schedules.py`.
"""

from __future__ import annotations

from dataclasses import replace

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Row, Schedule, check_counts, make_schedule


def gpipe(num_stages: int, num_micro_batches: int) -> Schedule:
    """GPipe: every forward, then every backward, both in order; one stage a rank.

    Bubble (p - 1)(F + B) a rank; m live activations on each rank. Source: Narayanan et al., SC'21,
    section 2.2.1.

    Raises:
        ScheduleError: a count below 1.
    """
    check_counts(num_stages, num_micro_batches)
    micro_batches = range(num_micro_batches)
    rows = tuple(
        tuple(Action(Kind.F, stage, m) for m in micro_batches)
        + tuple(Action(Kind.B, stage, m) for m in micro_batches)
        for stage in range(num_stages)
    )
    return make_schedule("gpipe", num_micro_batches, placement=(tuple(range(num_stages)),), rows=rows)


def one_f_one_b(num_stages: int, num_micro_batches: int) -> Schedule:
    """1F1B (PipeDream-flush): p - r forwards ahead on rank r, then one backward for each forward.

    Bubble (p - 1)(F + B) a rank; min(p - r, m) live activations on rank r. Source: Narayanan et al., SC'21,
    section 2.2.1 (figure 4).

    Raises:
        ScheduleError: a count below 1.
    """
    check_counts(num_stages, num_micro_batches)
    rows = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage, num_micro_batches)
        row = [Action(Kind.F, stage, m) for m in range(ahead)]
        for m in range(num_micro_batches):
            row.append(Action(Kind.B, stage, m))
            if m + ahead < num_micro_batches:
                row.append(Action(Kind.F, stage, m + ahead))
        rows.append(tuple(row))
    return make_schedule("one_f_one_b", num_micro_batches, placement=(tuple(range(num_stages)),), rows=rows)


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
    check_counts(num_stages, num_micro_batches, num_chunks=num_chunks)
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
    return make_schedule("interleaved", num_micro_batches, placement=(placement,), rows=rows)


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
