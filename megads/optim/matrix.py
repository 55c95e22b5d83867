"""Whole matrices out of what ranks hold of them: each made whole on one rank, its owner, and dealt out again.

A parameter is one matrix or several: q, k and v of a fused weight, gate and up, every expert of a stack. Whatever cuts
them (tensor, expert and data-parallel axes, flat ZeRO shards), a rank's part is a list of boxes:

    rank 0  | ####### |        owner of M: gathers the boxes that ranks own (each element once),
    rank 1  | ##....# |  --->  computes, and sends every rank the boxes that it holds    --->  rank 0, 1, 2, ...
    rank 2  | ....... |

The ranks of a stage share the work: owners are chosen so that their flops are nearly equal. Matrices travel in rounds
of bounded size, the next one while a round is computed. Copies come out bit for bit equal: nobody computes one twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megads.optim.orthogonal import products_cost
from megads.optim.share import Share
from megads.parallel.collectives import Pending, all_reduce_, start_exchange, start_gather_sequence
from megads.parallel.mesh import Group
from megads.parallel.parameter import Piece, stored_name
from megads.parallel.shard import Box, ShardSpec

Compute = Callable[[Tensor], Tensor]
"""[n, a, b] -> [n, a, b], of matrices that do not know of each other."""


def matrices_of(spec: ShardSpec) -> tuple[Box, ...]:
    """The matrices that a parameter is a stack or a fusion of, as boxes of it."""
    blocks = {cut.dim: cut.blocks for cut in spec.cuts if cut.blocks}
    per_dim = []
    for dim, size in enumerate(spec.shape):
        lengths = (1,) * size if dim < len(spec.shape) - 2 else blocks.get(dim, (size,))
        stops = tuple(itertools.accumulate(lengths))
        per_dim.append([(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)])
    return tuple(
        Box(tuple(start for start, _ in parts), tuple(stop for _, stop in parts))
        for parts in itertools.product(*per_dim)
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of matrix number `matrix`: rows and columns, half-open."""

    matrix: int
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True)
class _Mine:
    """A part and the memory that holds it, [rows, columns]."""

    part: _Part
    memory: Tensor


class MatrixExchange:
    """Replaces matrices that lie cut in `flats` by what is computed of each whole one.

    All ranks of the stage make it together.

    Args:
        shares: of parameters with at least two dims, whose last two are those of the matrices.
        flats: the memory of each share, as long as its master.
        group: the ranks of the stage.
        dtype: in which matrices travel and are computed.
        max_elements: a round brings an owner about this many.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        flats: Sequence[Tensor],
        *,
        group: Group,
        dtype: torch.dtype,
        max_elements: int,
    ) -> None:
        self._group = group
        self._dtype = dtype
        boxes = _boxes_by_name(shares)
        self._shapes = [box.shape[-2:] for found in boxes.values() for box in found]
        self._device = flats[0].device
        numbers = _first_numbers(boxes)
        held: list[_Mine] = []
        owned: list[_Mine] = []
        for share, flat in zip(shares, flats, strict=True):
            for piece in share.pieces(flat, kind=""):
                held += _parts(piece, boxes, numbers)
            for piece in share.owned_pieces(flat, kind=""):
                owned += _parts(piece, boxes, numbers)
        self._held, self._owned = tuple(held), tuple(owned)
        self._all_held = _gather(self._held, group, device=self._device)
        self._all_owned = _gather(self._owned, group, device=self._device)
        self._owners = _dealt([products_cost(*shape) for shape in self._shapes], group.size)
        self._rounds = self._in_rounds(max_elements)

    def _in_rounds(self, max_elements: int) -> tuple[frozenset[int], ...]:
        """The matrices of each round."""
        loads = [0] * self._group.size
        rounds: dict[int, set[int]] = {}
        for number, ((rows, columns), owner) in enumerate(zip(self._shapes, self._owners, strict=True)):
            rounds.setdefault(loads[owner] // max_elements, set()).add(number)
            loads[owner] += rows * columns
        return tuple(frozenset(rounds[number]) for number in sorted(rounds))

    def run(self, compute: Compute, *, scales: Callable[[int, int], float]) -> None:
        """Replace every matrix by `compute` of it, times the scale of its shape."""
        gathering: list[Pending] = [self._start_gather(self._rounds[0])]
        dealing: list[Pending] = []
        for number, chosen in enumerate(self._rounds):
            arrived = gathering[number].wait()
            if number + 1 < len(self._rounds):
                gathering.append(self._start_gather(self._rounds[number + 1]))
            made = self._computed(self._assembled(arrived, chosen), compute)
            dealing.append(self._start_deal(made, chosen))
            if number:
                self._place(dealing[number - 1].wait(), self._rounds[number - 1], scales)
        self._place(dealing[-1].wait(), self._rounds[-1], scales)

    def _start_gather(self, chosen: frozenset[int]) -> Pending:
        """Begin to send what this rank owns to the owners of the matrices."""
        mine = [mine for mine in self._owned if mine.part.matrix in chosen]
        mine.sort(key=lambda mine: self._owners[mine.part.matrix])
        send = self._sizes([mine.part for mine in mine])
        receive = [sum(p.size for p in self._for_me(parts, chosen)) for parts in self._all_owned]
        rows = self._packed([mine.memory for mine in mine])
        return start_exchange(rows, self._group, send=send, receive=receive)

    def _start_deal(self, made: dict[int, Tensor], chosen: frozenset[int]) -> Pending:
        """Begin to send every rank the parts that it holds of this rank's matrices."""
        wanted = [tuple(self._for_me(parts, chosen)) for parts in self._all_held]
        views = [
            made[part.matrix][slice(*part.rows), slice(*part.columns)] for parts in wanted for part in parts
        ]
        receive = self._sizes([mine.part for mine in self._held if mine.part.matrix in chosen])
        send = [sum(part.size for part in parts) for parts in wanted]
        return start_exchange(self._packed(views), self._group, send=send, receive=receive)

    def _for_me(self, parts: Sequence[_Part], chosen: frozenset[int]) -> Iterator[_Part]:
        """Those of the parts that belong to matrices of this rank."""
        return (p for p in parts if p.matrix in chosen and self._owners[p.matrix] == self._group.rank)

    def _sizes(self, parts: Sequence[_Part]) -> list[int]:
        """Elements of the parts by owner."""
        sizes = [0] * self._group.size
        for part in parts:
            sizes[self._owners[part.matrix]] += part.size
        return sizes

    def _packed(self, views: Sequence[Tensor]) -> Tensor:
        """All elements in a row, in the dtype that travels."""
        if not views:
            return torch.empty(0, dtype=self._dtype, device=self._device)
        return torch.cat([view.reshape(-1).to(self._dtype) for view in views])

    def _assembled(self, arrived: Tensor, chosen: frozenset[int]) -> dict[int, Tensor]:
        """This rank's matrices of a round, by number."""
        parts = [part for of_rank in self._all_owned for part in self._for_me(of_rank, chosen)]
        whole = {
            number: arrived.new_empty(self._shapes[number])
            for number in sorted(chosen)
            if self._owners[number] == self._group.rank
        }
        for part, values in zip(parts, _split(arrived, parts), strict=True):
            whole[part.matrix][slice(*part.rows), slice(*part.columns)] = values.view(part.shape)
        return whole

    def _computed(self, matrices: dict[int, Tensor], compute: Compute) -> dict[int, Tensor]:
        """What is computed of each; matrices of one shape at once."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number in matrices:
            by_shape.setdefault(self._shapes[number], []).append(number)
        made: dict[int, Tensor] = {}
        for numbers in by_shape.values():
            made.update(zip(numbers, compute(torch.stack([matrices[n] for n in numbers])), strict=True))
        return made

    def _place(self, arrived: Tensor, chosen: frozenset[int], scales: Callable[[int, int], float]) -> None:
        """Write what came back over this rank's parts."""
        mine = [mine for mine in self._held if mine.part.matrix in chosen]
        mine.sort(key=lambda mine: self._owners[mine.part.matrix])
        wide = arrived.to(mine[0].memory.dtype) if mine else arrived
        for target, values in zip(mine, _split(wide, [target.part for target in mine]), strict=True):
            scale = scales(*self._shapes[target.part.matrix])
            torch.mul(values.view(target.part.shape), scale, out=target.memory)


def _split(flat: Tensor, parts: Sequence[_Part]) -> tuple[Tensor, ...]:
    """The elements of each part, one after the other in `flat`."""
    split: tuple[Tensor, ...] = flat.split([part.size for part in parts])  # type: ignore[no-untyped-call]
    return split


def _boxes_by_name(shares: Sequence[Share]) -> dict[str, tuple[Box, ...]]:
    """The matrices of every parameter, by its stored name, in an order that all ranks of the stage have."""
    parameters = [place.parameter for share in shares for place in share.bucket.places]
    specs = {stored_name(parameter): parameter.spec for parameter in parameters}
    return {name: matrices_of(specs[name]) for name in sorted(specs)}


def _first_numbers(boxes: dict[str, tuple[Box, ...]]) -> dict[str, int]:
    """The number of each parameter's first matrix."""
    starts = itertools.accumulate((len(found) for found in boxes.values()), initial=0)
    return dict(zip(boxes, starts, strict=False))


def _parts(piece: Piece, boxes: dict[str, tuple[Box, ...]], numbers: dict[str, int]) -> Iterator[_Mine]:
    """The parts of matrices that a piece is."""
    name = piece.name.removeprefix("/")
    for index, box in enumerate(boxes[name]):
        common = box.intersect(piece.box)
        if common is None:
            continue
        inside = common.shift(tuple(-start for start in piece.box.start))
        memory = piece.tensor[inside.slices].view(common.shape[-2:])
        at = common.shift(tuple(-start for start in box.start))
        rows, columns = (tuple(bounds) for bounds in zip(at.start[-2:], at.stop[-2:], strict=True))
        yield _Mine(_Part(numbers[name] + index, rows, columns), memory)  # type: ignore[arg-type]


def _gather(mine: Sequence[_Mine], group: Group, *, device: torch.device) -> tuple[tuple[_Part, ...], ...]:
    """The parts of every rank of the group."""
    rows = [[m.part.matrix, *m.part.rows, *m.part.columns] for m in mine]
    longest = int(all_reduce_(torch.tensor([len(rows)], device=device), group, op="max"))
    rows += [[-1] * 5] * (longest - len(rows))
    table = start_gather_sequence(torch.tensor(rows, device=device).view(-1, 5), group).wait().tolist()
    return tuple(
        tuple(_Part(m, (a, b), (c, d)) for m, a, b, c, d in table[start : start + longest] if m >= 0)
        for start in range(0, len(table), max(longest, 1))
    )


def _dealt(costs: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """An owner for each matrix: the dearest first, each to the rank with the least so far."""
    loads = [0] * num_ranks
    owners = [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        owner = loads.index(min(loads))
        owners[number] = owner
        loads[owner] += costs[number]
    return tuple(owners)
