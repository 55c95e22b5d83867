"""Builders that split the backward, so that weight gradients (W), which nobody waits for, fill the idle time.

    ZB-H1, 3 ranks:    the last rank's W are two late, the first rank's at once: all ranks hold p micro-batches.
    rank 0 | F0 F1 F2 .. I0 W0 F3 I1 W1 I2 W2 I3 W3                      F forward, I input gradient
    rank 1 | .. F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
    rank 2 | .. .. F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3

    ZB-H2 starts twice as many forwards and is twice as late with W: up to 2p - 1 micro-batches, a third of the bubble
    less again. ZB-V holds two stages a rank, placed as a V, and has no bubble where F = I = W, in the memory of 1F1B:

    rank 0 | 0     5      the last stage is beside the first, so its I can start as soon as its F is done,
    rank 1 |  1   4       and warming up and cooling down have the same shape on every rank
    rank 2 |   2 3

Source: Qi et al. 2024, "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241), sections 2 and 6. The table of all
builders is in `schedules.py`.
"""

from __future__ import annotations

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Kind, Row, Schedule, check_counts, make_schedule


def zero_bubble_h1(num_stages: int, num_micro_batches: int) -> Schedule:
    """ZB-H1: 1F1B with a split backward; on rank r the W of a micro-batch comes r micro-batches after its I.

    Bubble (p - 1)(F + I - W) a rank if W <= min(F, I). Rank r holds p - r micro-batches before their I and r between
    I and W. Source: Qi et al. 2024, section 2.1 and table 2.

    Raises:
        ScheduleError: a count below 1.
    """
    check_counts(num_stages, num_micro_batches)
    rows = tuple(
        _split_row(stage, num_micro_batches, ahead=num_stages - stage, late=stage)
        for stage in range(num_stages)
    )
    return make_schedule(
        "zero_bubble_h1", num_micro_batches, placement=(tuple(range(num_stages)),), rows=rows
    )


def zero_bubble_h2(num_stages: int, num_micro_batches: int) -> Schedule:
    """ZB-H2: forwards fill the time in which ZB-H1 waits for the first gradient, W the time after the last.

    Bubble (p - 1)(F + I - 2W) a rank if W <= min(F, I), none where F = I = W. Rank r holds 2(p - r) - 1 micro-batches
    before their I and 2r between I and W. Source: Qi et al. 2024, section 2.2 and table 2.

    Raises:
        ScheduleError: a count below 1.
    """
    check_counts(num_stages, num_micro_batches)
    rows = tuple(
        _split_row(stage, num_micro_batches, ahead=2 * (num_stages - stage) - 1, late=2 * stage)
        for stage in range(num_stages)
    )
    return make_schedule(
        "zero_bubble_h2", num_micro_batches, placement=(tuple(range(num_stages)),), rows=rows
    )


def _split_row(stage: int, num_micro_batches: int, *, ahead: int, late: int) -> Row:
    """`ahead` forwards, then I, W and F in turn; each W comes `late` micro-batches after its I."""
    row = [Action(Kind.F, stage, m) for m in range(min(ahead, num_micro_batches))]
    for m in range(num_micro_batches):
        row.append(Action(Kind.I, stage, m))
        if m >= late:
            row.append(Action(Kind.W, stage, m - late))
        if m + ahead < num_micro_batches:
            row.append(Action(Kind.F, stage, m + ahead))
    row += [Action(Kind.W, stage, m) for m in range(max(num_micro_batches - late, 0), num_micro_batches)]
    return tuple(row)


def vee(num_ranks: int) -> tuple[int, ...]:
    """The rank of each of 2p stages placed as a V: out over all ranks and back again."""
    return (*range(num_ranks), *reversed(range(num_ranks)))


def ranks_of_vee(name: str, num_stages: int) -> int:
    """How many ranks hold `num_stages` stages that are placed as a V.

    Raises:
        ScheduleError: an odd number of stages.
    """
    num_ranks, left_over = divmod(num_stages, 2)
    if left_over:
        raise ScheduleError(
            f"schedule {name} holds two stages on every rank",
            found=f"{num_stages} stages",
            allowed="an even number",
        )
    return num_ranks


def zbv(num_stages: int, num_micro_batches: int) -> Schedule:
    """ZB-V: two stages a rank, placed as a V, with a split backward.

    No bubble where F = I = W; 2p live activations of one stage on every rank, p micro-batches of a rank. Fewer than
    2p - 1 micro-batches are built for 2p - 1 and the missing actions left out. Source: Qi et al. 2024, section 6.

    Args:
        num_stages: stages of all ranks together, 2p.

    Raises:
        ScheduleError: a count below 1, or an odd number of stages.
    """
    check_counts(num_stages, num_micro_batches)
    num_ranks = ranks_of_vee("zbv", num_stages)
    rows = [
        tuple(
            action
            for action in _vee_row(rank, num_ranks, max(num_micro_batches, 2 * num_ranks - 1))
            if action.micro_batch < num_micro_batches
        )
        for rank in range(num_ranks)
    ]
    return make_schedule("zbv", num_micro_batches, placement=(vee(num_ranks),), rows=rows)


def _vee_row(rank: int, num_ranks: int, num_micro_batches: int) -> list[Action]:
    """One rank's row of ZB-V for at least 2p - 1 micro-batches."""
    out, back, m = rank, 2 * num_ranks - 1 - rank, num_micro_batches
    f, i, w = Kind.F, Kind.I, Kind.W
    num_first = 2 * (num_ranks - rank) - 1  # forwards until the first comes back from the tip of the V
    row = [Action(f, out, j) for j in range(num_first)]
    for j in range(rank):
        row += [Action(f, back, j), Action(f, out, num_first + j)]
    num_out, num_back = num_first + rank, rank  # forwards done
    for j in range(num_ranks - rank):
        row += [Action(f, back, num_back + j), Action(i, back, j), Action(w, back, j)]
    num_back = num_ranks
    for j in range(m - num_ranks):  # each stage in turn: F of a new micro-batch, I and W of an old one
        if num_out + j < m:
            row.append(Action(f, out, num_out + j))
        row += [Action(i, out, j), Action(w, out, j)]
        row += [Action(f, back, num_back + j)]
        row += [Action(i, back, num_ranks - rank + j), Action(w, back, num_ranks - rank + j)]
    # From here W wait: first the I that other ranks wait for, then both in turn, last the W that are left.
    for j in range(m - rank, m):
        row += [Action(i, out, j - num_ranks + rank), Action(i, back, j)]
    left = range(m - num_ranks, m)
    for j in left[rank:]:
        row += [Action(i, out, j), Action(w, out, j - rank)]
    row += [Action(w, back, j) for j in range(m - rank, m)]
    row += [Action(w, out, j) for j in range(m - rank, m)]
    return row
