"""Proves that a schedule can be run and computes what it should, before any rank exists.

What is proven, in this order (so that the first complaint is the root of the trouble):

    work       every (stage, micro-batch) has one F and one B, or one I and one W, on the rank that holds it
    order      in each row F before B or I, I before W
    memory     live activations never exceed the declared bound
    messages   each value that leaves its rank has one SEND after it is made and one RECV before it is used
    pairs      the two ends of each pair of ranks name their messages in the same order, for each direction
    reduction  one REDUCE a stage and rank, after all backward work of that stage on that rank
    progress   no deadlock on any of three transports, from a rendezvous that blocks both sides to free queues

Nothing is assumed of where a schedule comes from: builders, `lower` and hand-written files take one door.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from enum import Enum
from typing import NoReturn

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Schedule, inputs_of, live_counts
from megads.pipeline.lower import lower, message_of

Places = Mapping[Action, list[tuple[int, int]]]
"""Where each action stands: (rank, index in its row)."""


def verify(schedule: Schedule) -> None:
    """Prove a schedule, lowered or compute-only (which is proven together with what `lower` makes of it).

    Raises:
        ScheduleError: what is wrong, with the rows around the offending place and that place marked.
    """
    _check_ranges(schedule)
    places = _places(schedule)
    _check_work(schedule, places)
    _check_order(schedule, places)
    _check_live(schedule)
    if not schedule.is_lowered:
        schedule = lower(schedule)
        places = _places(schedule)
    _check_messages(schedule, places)
    _check_pairs(schedule)
    _check_reduce(schedule, places)
    for transport in Transport:
        if marks := stuck(schedule, transport):
            _refuse(schedule, f"deadlock on {transport.value} (each rank waits where it is marked)", marks)


def _refuse(schedule: Schedule, what: str, marks: Mapping[int, int], allowed: str | None = None) -> NoReturn:
    raise ScheduleError(
        f"schedule {schedule.name}: {what}", found="\n" + schedule.grid(marks), allowed=allowed
    )


def _places(schedule: Schedule) -> Places:
    places: dict[Action, list[tuple[int, int]]] = {}
    for rank, index, cell in schedule.cells():
        for action in cell.actions:
            places.setdefault(action, []).append((rank, index))
    return places


def _check_ranges(schedule: Schedule) -> None:
    stages, micro_batches = schedule.num_stages, schedule.num_micro_batches
    for rank, index, cell in schedule.cells():
        for action in cell.actions:
            if action.stage >= stages or action.micro_batch >= micro_batches:
                _refuse(
                    schedule,
                    f"{action} names a stage or micro-batch that does not exist",
                    {rank: index},
                    f"stages 0..{stages - 1}, micro-batches 0..{micro_batches - 1}",
                )


def _check_work(schedule: Schedule, places: Places) -> None:
    for stage in range(schedule.num_stages):
        for micro_batch in range(schedule.num_micro_batches):
            whole, half = Action(Kind.B, stage, micro_batch), Action(Kind.I, stage, micro_batch)
            rest = Action(Kind.W, stage, micro_batch)
            is_split = half in places or rest in places
            if is_split and whole in places:
                rank, index = places[whole][0]
                _refuse(schedule, f"{whole} stands beside {half} or {rest}", {rank: index}, "B, or I and W")
            forward = Action(Kind.F, stage, micro_batch)
            for action in (forward, half, rest) if is_split else (forward, whole):
                _check_once(schedule, places, action, schedule.rank_of(stage, micro_batch))


def _check_once(schedule: Schedule, places: Places, action: Action, rank: int) -> None:
    """Refuse a schedule in which `action` does not stand exactly once, and on `rank`."""
    found = places.get(action, [])
    if not found:
        _refuse(schedule, f"{action} is missing", {rank: len(schedule.rows[rank])}, f"once, on rank {rank}")
    if len(found) > 1:
        _refuse(schedule, f"{action} stands {len(found)} times", dict(found), f"once, on rank {rank}")
    if found[0][0] != rank:
        _refuse(schedule, f"{action} stands on rank {found[0][0]}", dict(found), f"rank {rank}")


def _check_before(schedule: Schedule, places: Places, first: Action, then: Action) -> None:
    """Refuse a row in which `first` does not stand in a cell before `then` (both stand once, on one rank)."""
    (rank, index), (_, later) = places[first][0], places[then][0]
    if index >= later:
        _refuse(schedule, f"{first} does not stand before {then}", {rank: index}, f"{first} ... {then}")


def _check_order(schedule: Schedule, places: Places) -> None:
    for action in places:
        if action.kind in (Kind.B, Kind.I):
            _check_before(schedule, places, Action(Kind.F, action.stage, action.micro_batch), action)
        elif action.kind is Kind.W:
            _check_before(schedule, places, Action(Kind.I, action.stage, action.micro_batch), action)


def _check_live(schedule: Schedule) -> None:
    for rank, row in enumerate(schedule.rows):
        for index, live in enumerate(live_counts(row)):
            if live > schedule.max_live[rank]:
                _refuse(
                    schedule,
                    f"rank {rank} holds {live} live activations",
                    {rank: index},
                    f"max_live {schedule.max_live[rank]}",
                )


def _check_messages(schedule: Schedule, places: Places) -> None:
    expected: set[Action] = set()
    for rank, _, cell in schedule.cells():
        for action in cell.actions:
            send = message_of(schedule, action) if action.is_compute else None
            if send is None:
                continue
            receive = send.partner
            expected |= {send, receive}
            _check_once(schedule, places, send, rank)
            _check_once(schedule, places, receive, schedule.peer(send))
            _check_before(schedule, places, action, send)
            _check_before(schedule, places, receive, _user_of(receive, places))
    for action, found in places.items():
        if (action.kind.is_send or action.kind.is_receive) and action not in expected:
            _refuse(schedule, f"{action} carries nothing: no value of its stage leaves its rank", dict(found))


def _user_of(receive: Action, places: Places) -> Action:
    """The compute action that uses a received value."""
    if receive.kind is Kind.RECV_F:
        return Action(Kind.F, receive.stage, receive.micro_batch)
    whole = Action(Kind.B, receive.stage, receive.micro_batch)
    return whole if whole in places else Action(Kind.I, receive.stage, receive.micro_batch)


def _check_pairs(schedule: Schedule) -> None:
    """Refuse two ends of a direction that name their messages in different orders: data would be swapped."""
    sends: dict[tuple[int, int], list[tuple[Action, int]]] = defaultdict(list)
    receives: dict[tuple[int, int], list[tuple[Action, int]]] = defaultdict(list)
    for rank, index, cell in schedule.cells():
        for action in cell.actions:
            if action.kind.is_send:
                sends[rank, schedule.peer(action)].append((action, index))
            elif action.kind.is_receive:
                receives[schedule.peer(action), rank].append((action, index))
    for (source, target), sent in sends.items():
        for (send, at), (receive, to) in zip(sent, receives[source, target], strict=True):
            if send.partner != receive:
                _refuse(
                    schedule,
                    f"rank {source} sends {send} where rank {target} expects {receive}",
                    {source: at, target: to},
                    "the same order at both ends of a direction",
                )


def _check_reduce(schedule: Schedule, places: Places) -> None:
    for rank in range(schedule.num_ranks):
        for stage in schedule.stages_of(rank):
            reduce = Action(Kind.REDUCE, stage)
            own = [index for at, index in places.get(reduce, []) if at == rank]
            if len(own) != 1:
                marks = {rank: own[-1] if own else len(schedule.rows[rank])}
                what = f"{reduce} {f'stands {len(own)} times' if own else 'is missing'} on rank {rank}"
                _refuse(schedule, what, marks, f"once on rank {rank}")
            for index, cell in enumerate(schedule.rows[rank]):
                for action in cell.actions:
                    is_backward = action.kind in (Kind.B, Kind.I, Kind.W)
                    if is_backward and action.stage == stage and index > own[0]:
                        what = f"{reduce} stands before {action}"
                        _refuse(schedule, what, {rank: own[0]}, "after all backward work of its stage")
    for rank, index, cell in schedule.cells():
        for action in cell.actions:
            if action.kind is Kind.REDUCE and action.stage not in schedule.stages_of(rank):
                _refuse(schedule, f"rank {rank} does not hold the stage of {action}", {rank: index})


class Transport(Enum):
    """How messages can travel, by what a SEND or a RECV has to wait for."""

    RENDEZVOUS = "a blocking rendezvous"
    """Both sides stand still until they meet (MPI's synchronous send)."""
    PAIR = "one in-order queue a pair of ranks"
    """Posting never waits; sends *and* receives of a pair complete in the order posted (NCCL)."""
    DIRECTION = "one in-order queue a direction"
    """Posting never waits; messages of one direction complete in the order posted (gloo)."""


def stuck(schedule: Schedule, transport: Transport) -> dict[int, int]:
    """Run a lowered schedule without times: where each rank stands for ever, or {} if every row ran out.

    One run decides, because which cell of a rank can run next does not hang on whom we look at first.
    The messages must be matched, as `verify` checks before it asks.
    """
    run = _Run(schedule, transport)
    while sum(
        run.advance(rank) for rank in range(schedule.num_ranks)
    ):  # whole sweeps: any() stops at the first
        pass
    rows = enumerate(schedule.rows)
    return {rank: run.cursors[rank] for rank, row in rows if run.cursors[rank] < len(row)}


class _Run:
    """Ranks that run their rows over a transport: where each stands, what is there, what is on its way."""

    def __init__(self, schedule: Schedule, transport: Transport) -> None:
        self.schedule = schedule
        self.transport = transport
        self.cursors = [0] * schedule.num_ranks
        self.done: set[Action] = set()  # results of compute, and receives that have completed
        self.queues: defaultdict[tuple[int, int, bool], deque[Action]] = defaultdict(deque)

    def advance(self, rank: int) -> bool:
        """Run the rank's row as far as it goes; whether that was anywhere."""
        start, row = self.cursors[rank], self.schedule.rows[rank]
        while self.cursors[rank] < len(row) and self._can_run(rank, row[self.cursors[rank]]):
            self.cursors[rank] += 1
        return self.cursors[rank] > start

    def _can_run(self, rank: int, cell: Cell) -> bool:
        """Run one cell if nothing holds it up."""
        if cell.is_compute:
            needs = [need for action in cell.actions for need in inputs_of(action, self.schedule.num_stages)]
            if not all(self._has(rank, need) for need in needs):
                return False
            self.done.update(action.result for action in cell.actions)
            return True
        (action,) = cell.actions
        if action.kind is Kind.REDUCE:
            return True
        if self.transport is Transport.RENDEZVOUS:
            return self._meet(self.schedule.peer(action), action)
        self._post(rank, self.schedule.peer(action), action)
        return True

    def _has(self, rank: int, need: Action) -> bool:
        """Whether a result has been made on this rank, or received by it."""
        if self.schedule.rank_of(need.stage, need.micro_batch) == rank:
            return need in self.done
        send = message_of(self.schedule, need)
        return send is not None and send.partner in self.done

    def _meet(self, peer: int, action: Action) -> bool:
        """Pass the message if the peer stands at the other end of it."""
        row, cursor = self.schedule.rows[peer], self.cursors[peer]
        if cursor == len(row) or row[cursor] != action.partner:
            return False
        self.cursors[peer] += 1
        self._pass(action)
        return True

    def _post(self, rank: int, peer: int, action: Action) -> None:
        """Queue one end of a message and pass what has met at the heads of the two queues."""
        by_direction = self.transport is Transport.DIRECTION
        own = self.queues[rank, peer, by_direction and action.kind.is_send]
        other = self.queues[peer, rank, by_direction and not action.kind.is_send]
        own.append(action)
        while own and other and own[0].partner == other[0]:
            self._pass(own.popleft())
            other.popleft()

    def _pass(self, end: Action) -> None:
        self.done.add(end if end.kind.is_receive else end.partner)
