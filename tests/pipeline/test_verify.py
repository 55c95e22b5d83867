"""Every way to spoil a good schedule is refused, with the reason and the place."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Schedule
from megads.pipeline.lower import lower
from megads.pipeline.schedules import SCHEDULES
from megads.pipeline.text import parse_cell, parse_schedule
from megads.pipeline.verify import verify
from tests.pipeline.cases import WHOLE, is_legal, on_ranks


def change(schedule: Schedule, rank: int, edit: Callable[[list[str]], None]) -> Schedule:
    """The schedule with one row edited as a list of texts."""
    row = [str(cell) for cell in schedule.rows[rank]]
    edit(row)
    rows = list(schedule.rows)
    rows[rank] = tuple(map(parse_cell, row))
    return replace(schedule, rows=tuple(rows))


def drop(rank: int, text: str) -> Callable[[Schedule], Schedule]:
    return lambda schedule: change(schedule, rank, lambda row: row.remove(text))


def double(rank: int, text: str) -> Callable[[Schedule], Schedule]:
    return lambda schedule: change(schedule, rank, lambda row: row.insert(row.index(text), text))


def move(rank: int, text: str, *, before: str | None) -> Callable[[Schedule], Schedule]:
    """Put `text` before another cell of the row, or at the end."""

    def edit(row: list[str]) -> None:
        row.remove(text)
        row.insert(len(row) if before is None else row.index(before), text)

    return lambda schedule: change(schedule, rank, edit)


def swap(rank: int, one: str, other: str) -> Callable[[Schedule], Schedule]:
    def edit(row: list[str]) -> None:
        i, j = row.index(one), row.index(other)
        row[i], row[j] = row[j], row[i]

    return lambda schedule: change(schedule, rank, edit)


def rename(rank: int, text: str, new: str) -> Callable[[Schedule], Schedule]:
    return lambda schedule: change(schedule, rank, lambda row: row.__setitem__(row.index(text), new))


def add(rank: int, text: str) -> Callable[[Schedule], Schedule]:
    return lambda schedule: change(schedule, rank, lambda row: row.append(text))


def give(source: int, text: str, target: int) -> Callable[[Schedule], Schedule]:
    """Take `text` from one rank and put it first on another."""
    return lambda schedule: change(drop(source, text)(schedule), target, lambda row: row.insert(0, text))


def send_past_the_end(schedule: Schedule) -> Schedule:
    return add(3, f"{schedule.num_stages - 1}SEND_F0")(schedule)


def lower_bound(rank: int) -> Callable[[Schedule], Schedule]:
    def spoil(schedule: Schedule) -> Schedule:
        bounds = list(schedule.max_live)
        bounds[rank] -= 1
        return replace(schedule, max_live=tuple(bounds))

    return spoil


@dataclass(frozen=True)
class Mutation:
    what: str
    spoil: Callable[[Schedule], Schedule]
    message: str
    marked: str
    """What else the message must hold: the place in the grid. In both texts {last} is the last stage."""


# On schedules of 4 ranks and 6 micro-batches, lowered; stages 0 to 3 are on the ranks of these numbers.
MUTATIONS = (
    Mutation("F dropped", drop(1, "1F2"), "1F2 is missing", "[end]"),
    Mutation("B dropped", drop(3, "3B5"), "3B5 is missing", "[end]"),
    Mutation("F doubled", double(2, "2F3"), "2F3 stands 2 times", "[2F3]"),
    Mutation("B doubled", double(0, "0B0"), "0B0 stands 2 times", "[0B0]"),
    Mutation("F on a wrong rank", give(1, "1F4", 0), "1F4 stands on rank 0", "rank 0  | [1F4]"),
    Mutation("B on a wrong rank", give(2, "2B1", 3), "2B1 stands on rank 3", "rank 3  | [2B1]"),
    Mutation("B without its W: half split", rename(1, "1B2", "1I2"), "1W2 is missing", "[end]"),
    Mutation("W beside B", add(1, "1W2"), "1B2 stands beside 1I2 or 1W2", "[1B2]"),
    Mutation("F and B swapped", swap(3, "3F1", "3B1"), "3F1 does not stand before 3B1", "[3F1]"),
    Mutation("stage that does not exist", rename(0, "0F0", "8F0"), "8F0 names a stage", "[8F0]"),
    Mutation("micro-batch that does not exist", rename(2, "2B5", "2B6"), "2B6 names", "[2B6]"),
    Mutation("SEND dropped", drop(0, "0SEND_F3"), "0SEND_F3 is missing", "[end]"),
    Mutation("RECV dropped", drop(2, "2RECV_B1"), "2RECV_B1 is missing", "[end]"),
    Mutation("SEND doubled", double(1, "1SEND_B2"), "1SEND_B2 stands 2 times", "[1SEND_B2]"),
    Mutation("RECV doubled", double(3, "3RECV_F0"), "3RECV_F0 stands 2 times", "[3RECV_F0]"),
    Mutation("SEND before it is made", move(1, "1SEND_F2", before="1F2"),
             "1F2 does not stand before 1SEND_F2", "[1F2]"),
    Mutation("RECV after its use", move(1, "1RECV_F2", before=None),
             "1RECV_F2 does not stand before 1F2", "[1RECV_F2]"),
    Mutation("gradient RECV after its use", move(0, "0RECV_B5", before=None),
             "0RECV_B5 does not stand before 0B5", "[0RECV_B5]"),
    Mutation("RECV on a wrong rank", give(1, "1RECV_F0", 2), "1RECV_F0 stands on rank 2",
             "rank 2  | [1RECV_F0]"),
    Mutation("SEND to a wrong peer", rename(1, "1SEND_F0", "1SEND_B0"), "1SEND_F0 is missing", "[end]"),
    Mutation("RECV from a wrong peer", rename(2, "2RECV_F1", "2RECV_B1"), "2RECV_F1 is missing", "[end]"),
    Mutation("SEND past the last stage", send_past_the_end, "{last}SEND_F0 carries nothing", "[{last}SEND_F0]"),
    Mutation("gradient SEND before the first stage", add(0, "0SEND_B0"), "0SEND_B0 carries nothing",
             "[0SEND_B0]"),
    Mutation("RECV of the first stage", add(0, "0RECV_F0"), "0RECV_F0 carries nothing", "[0RECV_F0]"),
    Mutation("sends out of order", swap(0, "0SEND_F4", "0SEND_F5"),
             "0F5 does not stand before 0SEND_F5", "[0F5]"),
    Mutation("receives out of order", move(1, "1RECV_F1", before="1RECV_F0"),
             "rank 0 sends 0SEND_F0 where rank 1 expects 1RECV_F1", "rank 1  | [1RECV_F1]"),
    Mutation("REDUCE dropped", drop(1, "1REDUCE"), "1REDUCE is missing", "[end]"),
    Mutation("REDUCE doubled", double(1, "1REDUCE"), "1REDUCE stands 2 times", "[1REDUCE]"),
    Mutation("REDUCE too early", move(2, "2REDUCE", before="2B5"), "2REDUCE stands before 2B5", "[2REDUCE]"),
    Mutation("REDUCE of another's stage", add(3, "2REDUCE"), "rank 3 does not hold the stage of 2REDUCE",
             "[2REDUCE]"),
    Mutation("bound too low on the first rank", lower_bound(0), "rank 0 holds", "max_live"),
    Mutation("bound too low further on", lower_bound(1), "rank 1 holds", "max_live"),
)  # fmt: skip


# On the same sizes: ZB-H1 (stage r on rank r), ZB-V (stages r and 7 - r), DualPipe (r and 3 - r, micro-batches 3 to 5
# the other way).
SPLIT_MUTATIONS = (
    ("zero_bubble_h1", Mutation("I dropped", drop(1, "1I2"), "1I2 is missing", "[end]")),
    ("zero_bubble_h1", Mutation("W dropped", drop(3, "3W0"), "3W0 is missing", "[end]")),
    ("zero_bubble_h1", Mutation("W doubled", double(2, "2W1"), "2W1 stands 2 times", "[2W1]")),
    ("zero_bubble_h1", Mutation("W before its I", move(2, "2W4", before="2I4"),
                                "2I4 does not stand before 2W4", "[2I4]")),
    ("zero_bubble_h1", Mutation("I before its F", move(3, "3I5", before="3F5"),
                                "3F5 does not stand before 3I5", "[3F5]")),
    ("zero_bubble_h1", Mutation("B beside I and W", add(0, "0B3"), "0B3 stands beside 0I3 or 0W3", "[0B3]")),
    ("zero_bubble_h1", Mutation("REDUCE before the last W", move(3, "3REDUCE", before="3W5"),
                                "3REDUCE stands before 3W5", "[3REDUCE]")),
    ("zero_bubble_h1", Mutation("gradient sent before its I", move(2, "2SEND_B1", before="2I1"),
                                "2I1 does not stand before 2SEND_B1", "[2I1]")),
    ("zero_bubble_h2", Mutation("bound too low", lower_bound(1), "rank 1 holds 6", "max_live 5")),
    ("zbv", Mutation("stage on its mirror's rank", give(1, "6F2", 2), "6F2 stands on rank 2", "rank 2  | [6F2]")),
    ("zbv", Mutation("tip of the V sends to itself", add(3, "3SEND_F0"), "3SEND_F0 carries nothing",
                     "[3SEND_F0]")),
    ("zbv", Mutation("one REDUCE for two stages", drop(0, "7REDUCE"), "7REDUCE is missing on", "[end]")),
    ("dualpipe_v", Mutation("half of a pair dropped", rename(3, "(4F4+3B0)", "4F4"), "3B0 is missing", "[end]")),
    ("dualpipe_v", Mutation("pair doubled", double(3, "(4F4+3B0)"), "3B0 stands 2 times", "[(4F4+3B0)]")),
    ("dualpipe", Mutation("micro-batch the wrong way", give(0, "0F1", 3), "0F1 stands on rank 3",
                          "rank 3  | [0F1]")),
    ("dualpipe", Mutation("REDUCE of one twin alone", drop(3, "0REDUCE"), "0REDUCE is missing on rank 3", "[end]")),
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mutation"), SPLIT_MUTATIONS, ids=[f"{name}-{m.what}" for name, m in SPLIT_MUTATIONS]
)
def test_mutations_of_split_and_vee_schedules_are_refused(name: str, mutation: Mutation) -> None:
    good = lower(on_ranks(name, 4, 6))
    verify(good)
    with pytest.raises(ScheduleError) as caught:
        verify(mutation.spoil(good))
    assert str(caught.value).startswith(f"schedule {name}: {mutation.message}")
    assert mutation.marked in str(caught.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_proven_on_three_transports(name: str) -> None:
    """Up to 16 ranks, random micro-batches and chunks."""
    draw = random.Random(name)
    for p in (1, 2, 3, 4, 6, 7, 16):
        m = draw.randint(1, 32)
        if is_legal(name, p, m + m % 2):
            verify(on_ranks(name, p, m + m % 2, draw.randint(2, 4) if name == "interleaved" else None))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_size_is_proven(name: str) -> None:
    draw = random.Random(name)
    for p in range(1, 17):
        for m in (*range(1, 7), *(draw.randint(7, 96) for _ in range(2))):
            for chunks in range(1, 4) if name == "interleaved" else (None,):
                if is_legal(name, p, m):
                    verify(on_ranks(name, p, m, chunks))


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_mutations_are_refused(name: str, mutation: Mutation) -> None:
    good = lower(on_ranks(name, 4, 6))
    verify(good)
    with pytest.raises(ScheduleError) as caught:
        verify(mutation.spoil(good))
    message, last = str(caught.value), good.num_stages - 1
    assert message.startswith(f"schedule {name}: {mutation.message.format(last=last)}")
    assert mutation.marked.format(last=last) in message
    assert message.count("rank 3  |") == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_action_can_be_spared_or_repeated(name: str) -> None:
    """Exhaustively: each cell of the lowered schedule dropped, and doubled at a random other place."""
    good = lower(on_ranks(name, 2 if name == "dualpipe" else 3, 4))
    random_ = random.Random(7)
    for rank, index, cell in good.cells():
        row = good.rows[rank]
        place = random_.randint(0, len(row))
        for bad in (row[:index] + row[index + 1 :], (*row[:place], cell, *row[place:])):
            rows = (*good.rows[:rank], bad, *good.rows[rank + 1 :])
            with pytest.raises(ScheduleError, match="|".join(map(str, cell.actions))):
                verify(replace(good, rows=rows))


def runs_blocking(schedule: Schedule) -> bool:
    """A second opinion, written apart from `verify`: run rows whose every message is a rendezvous."""
    rows = [list(row) for row in schedule.rows]
    values: set[tuple[int, str, int, int]] = set()  # (rank, F, B (also made by I) or W, stage, micro-batch)
    kinds = {(a.kind, a.stage, a.micro_batch) for row in rows for cell in row for a in cell.actions}

    def way(micro_batch: int) -> tuple[int, ...]:
        second_half = 2 * micro_batch >= schedule.num_micro_batches
        return schedule.placement[1 if len(schedule.placement) == 2 and second_half else 0]

    def compute(rank: int, cell: Cell) -> bool:
        """Whether all that the cell needs is there; an action that uses what it has not received fails at once."""
        made = set()
        for action in cell.actions:
            kind, s, m = action.kind, action.stage, action.micro_batch
            if kind is Kind.F:
                needs = [("F", s - 1)] if s > 0 else []
            elif kind is Kind.W:
                needs = [("B", s)]
            else:
                needs = [("F", s), *([("B", s + 1)] if s < schedule.num_stages - 1 else [])]
            if any((rank, letter, stage, m) not in values for letter, stage in needs):
                return False
            made.add((rank, "B" if kind is Kind.I else kind.value, s, m))
        values.update(made)
        return True

    def reduced(rank: int, stage: int) -> bool:
        for m in range(schedule.num_micro_batches):
            last = "W" if (Kind.W, stage, m) in kinds else "B"
            if way(m)[stage] == rank and (rank, last, stage, m) not in values:
                return False
        return True

    def meets(rank: int, end: Action) -> bool | None:
        """Whether a message has passed; None if its value was never made."""
        letter, step = ("F", 1) if end.kind in (Kind.SEND_F, Kind.RECV_F) else ("B", -1)
        source = end.stage if end.kind.is_send else end.stage - step
        other_stage = source + step if end.kind.is_send else source
        ends = {Kind.SEND_F: Kind.RECV_F, Kind.RECV_F: Kind.SEND_F,
                Kind.SEND_B: Kind.RECV_B, Kind.RECV_B: Kind.SEND_B}  # fmt: skip
        m = end.micro_batch
        other, peer = Action(ends[end.kind], other_stage, m), way(m)[other_stage]
        if not rows[peer] or rows[peer][0] != other:
            return False
        sender = rank if end.kind.is_send else peer
        if (sender, letter, source, m) not in values:
            return None
        values.add((rank if end.kind.is_receive else peer, letter, source, m))
        rows[peer].pop(0)
        return True

    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            if not row:
                continue
            cell = row[0]
            if cell.is_compute:
                if not compute(rank, cell):
                    return False
            elif cell.actions[0].kind is Kind.REDUCE:
                if not reduced(rank, cell.actions[0].stage):
                    return False
            else:
                passed = meets(rank, cell.actions[0])
                if passed is None:
                    return False
                if not passed:
                    continue
            row.pop(0)
            moved = True
    return not any(rows)


@pytest.mark.parametrize("name", SCHEDULES)
def test_random_disorder_is_judged_as_running_it_would(name: str) -> None:
    """Two cells of a row swapped, neighbours or not: `verify` accepts exactly what runs to its end."""
    p = 2 if name == "dualpipe" else 3
    good = lower(on_ranks(name, p, 4 if name == "dualpipe" else 3))
    good = replace(good, max_live=(100,) * p)
    random_ = random.Random(3)
    accepted = 0
    for _ in range(160):
        rank = random_.randrange(p)
        row = list(good.rows[rank])
        i = random_.randrange(len(row) - 1)
        j = i + 1 if random_.random() < 0.7 else random_.randrange(len(row))
        row[i], row[j] = row[j], row[i]
        disorder = replace(good, rows=(*good.rows[:rank], tuple(row), *good.rows[rank + 1 :]))
        assert is_accepted(disorder) == runs_blocking(disorder), disorder.rows[rank]
        accepted += is_accepted(disorder)
    assert 10 < accepted < 150


def is_accepted(schedule: Schedule) -> bool:
    try:
        verify(schedule)
    except ScheduleError:
        return False
    return True


def test_gradients_sent_in_another_order_than_expected_are_refused() -> None:
    """Both rows are fine alone; together rank 0 would take micro-batch 1's gradient for micro-batch 0's."""
    text = (
        "schedule crossed\nmicro_batches 2\nplacement 0 1\nmax_live 2 2\n"
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0RECV_B1 0B0 0B1 0REDUCE\n"
        "rank 1: 1RECV_F0 1F0 1RECV_F1 1F1 1B1 1SEND_B1 1B0 1SEND_B0 1REDUCE\n"
    )
    with pytest.raises(ScheduleError, match="rank 1 sends 1SEND_B1 where rank 0 expects 0RECV_B0"):
        verify(parse_schedule(text))
    verify(parse_schedule(text.replace("0RECV_B0 0RECV_B1 0B0", "0RECV_B1 0RECV_B0 0B0")))


SPLIT = (
    "schedule split\nmicro_batches 2\nplacement 0 1\nmax_live 2 2\n"
    "rank 0: 0F0 0F1 0I0 0W0 0I1 0W1\nrank 1: 1F0 1I0 1F1 1I1 1W0 1W1\n"
)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("0I0 0W0", "0W0 0I0", "0I0 does not stand before 0W0"),
        (" 1W1", "", "1W1 is missing"),
        ("1I0 1F1", "1F1", "1I0 is missing"),
        ("1F1 1I1", "1I1 1F1", "1F1 does not stand before 1I1"),
        ("1W0 1W1", "1W0 1W1 1B1", "1B1 stands beside 1I1 or 1W1"),
        ("max_live 2 2", "max_live 2 1", r"rank 1 holds 2 live activations(.|\n)*\[1F1\]"),
        ("1F1 1I1", "(1F1+1I1)", "1F1 does not stand before 1I1"),
    ],
)
def test_split_backward(old: str, new: str, message: str | None) -> None:
    """A split backward: I before W, both there, activations alive until W."""
    text = SPLIT.replace(old, new, 1) if old else SPLIT
    if message is None:
        verify(parse_schedule(text))
        return
    with pytest.raises(ScheduleError, match=message):
        verify(parse_schedule(text))


def test_an_empty_row_is_refused() -> None:
    text = "schedule idle\nmicro_batches 1\nplacement 0 1\nmax_live 1 1\nrank 0: 0F0 0B0\nrank 1:\n"
    with pytest.raises(ScheduleError, match=r"1F0 is missing(.|\n)*rank 1  \| \[end\]"):
        verify(parse_schedule(text))


def test_crossed_sends_deadlock_is_named() -> None:
    """Each rank sends before it posts its receive: fine with free queues, a deadlock where sends wait."""
    text = (
        "schedule facing\nmicro_batches 2\nplacement 0 1\nmax_live 2 2\n"
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1 0REDUCE\n"
        "rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1 1REDUCE\n"
    )
    with pytest.raises(
        ScheduleError, match=r"(?s)deadlock on a blocking rendezvous.*\[0SEND_F1\].*\[1SEND_B0\]"
    ):
        verify(parse_schedule(text))
