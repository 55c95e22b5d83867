"""Schedules as text: megads' own form, which holds everything, and the CSV of torch.distributed.pipelining.

Own form (blank lines and lines that begin with # are skipped):

    schedule one_f_one_b
    micro_batches 3
    placement 0 1 2              the rank of each stage; `0 1 2 | 2 1 0`: the second half of the
    max_live 3 2 1               micro-batches runs the other way. Then each rank's bound of live activations,
    rank 0: 0F0 0F1 0F2 0B0 0B1 0B2
    rank 1: 1F0 1F1 1B0 1F2 1B1 1B2
    rank 2: 2F0 2B0 2F1 2B1 2F2 2B2

CSV (torch's format `compute_only`): a line a rank, a cell an action, a pair is `(0F3;3B1)OVERLAP_F_B`, empty cells are
waiting. Micro-batches, placement and bounds are read off the rows:

    0F0,0F1,,,0B0,0B1
    ,1F0,1B0,1F1,1B1

What is read is well formed; that it can be run, `verify.py` says.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from megads.errors import ScheduleError
from megads.pipeline.action import Action, Cell, Kind, Overlap, Row, Schedule, make_schedule

_NUMBER = r"(0|[1-9][0-9]*)"
_ACTION = re.compile(_NUMBER + r"(?:(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)" + _NUMBER + r"|(REDUCE))")
_OVERLAP = re.compile(r"\(([^+()]*)\+([^+()]*)\)")


def parse_cell(text: str) -> Cell:
    """Read the text form of an action or of an overlapped pair; `str()` gives it back.

    Raises:
        ScheduleError: the text is neither.
    """
    if pair := _OVERLAP.fullmatch(text):
        return Overlap(_parse_action(pair[1]), _parse_action(pair[2]))
    return _parse_action(text)


def _parse_action(text: str) -> Action:
    match = _ACTION.fullmatch(text)
    if match is None:
        raise ScheduleError(
            "not an action of a schedule",
            found=repr(text),
            allowed="stage, kind, micro-batch: 2F0, 1B3, 1I3, 1W3, 0SEND_F2, 1RECV_F2, 1SEND_B2, "
            "0RECV_B2; 2REDUCE; a pair (0F4+1B2)",
        )
    return Action(Kind(match[2] or match[4]), int(match[1]), int(match[3] or 0))


def format_schedule(schedule: Schedule) -> str:
    """The own text form of a schedule; `parse_schedule` gives it back."""
    lines = [
        f"schedule {schedule.name}",
        f"micro_batches {schedule.num_micro_batches}",
        "placement " + " | ".join(" ".join(map(str, ranks)) for ranks in schedule.placement),
        "max_live " + " ".join(map(str, schedule.max_live)),
    ]
    lines += [f"rank {rank}: " + " ".join(map(str, row)) for rank, row in enumerate(schedule.rows)]
    return "\n".join(lines) + "\n"


def format_csv(schedule: Schedule) -> str:
    """A compute-only schedule as torch's CSV.

    Raises:
        ScheduleError: a lowered schedule, whose SEND and RECV torch names otherwise.
    """
    if schedule.is_lowered:
        raise ScheduleError(f"schedule {schedule.name} is lowered: its CSV would not be compute alone")
    return "".join(",".join(map(_torch_text, row)) + "\n" for row in schedule.rows)


def _torch_text(cell: Cell) -> str:
    return f"({cell.forward};{cell.backward})OVERLAP_F_B" if isinstance(cell, Overlap) else str(cell)


def read_schedule(path: Path) -> Schedule:
    """Read a schedule from a file: torch's CSV if its name ends in .csv, else the own form. It is not verified.

    Raises:
        ScheduleError: the file cannot be read or is not well formed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(f"schedule file {path} cannot be read", found=error) from error
    return (parse_csv if path.suffix == ".csv" else parse_schedule)(text, source=str(path))


def parse_schedule(text: str, source: str = "schedule") -> Schedule:
    """Read the own text form of a schedule.

    Args:
        text: the whole text.
        source: what to call it in errors, such as the file's path.

    Raises:
        ScheduleError: naming source, line and cell, if the text is not well formed.
    """
    heads: dict[str, str] = {}
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip() and not line.strip().startswith("#"):
            try:
                _read_line(line.strip(), heads, rows)
            except ScheduleError as error:
                raise ScheduleError(f"{source}:{number}: {error}") from None
    missing = [head for head in _HEADS if head not in heads]
    if missing or not rows:
        raise ScheduleError(
            f"{source}: not a whole schedule",
            found=f"no line `{missing[0] if missing else 'rank 0: ...'}`",
            allowed=_FORM,
        )
    if len(_parse_numbers(heads["micro_batches"])) != 1:
        raise ScheduleError(f"{source}: micro_batches needs one number", found=repr(heads["micro_batches"]))
    try:
        return Schedule(
            name=heads["schedule"],
            num_micro_batches=_parse_numbers(heads["micro_batches"])[0],
            placement=tuple(_parse_numbers(ranks) for ranks in heads["placement"].split("|")),
            max_live=_parse_numbers(heads["max_live"]),
            rows=tuple(rows),
        )
    except ScheduleError as error:
        raise ScheduleError(f"{source}: {error}") from None


_HEADS = ("schedule", "micro_batches", "placement", "max_live")
_FORM = (
    "schedule NAME; micro_batches 8; placement 0 1 2 3; max_live 4 3 2 1; then rank 0: 0F0 ..., rank 1: ..."
)


def _read_line(line: str, heads: dict[str, str], rows: list[Row]) -> None:
    """Add one line of a schedule's text to what was read before it."""
    word, _, rest = line.partition(" ")
    if word == "rank":
        rank, _, cells = rest.partition(":")
        if rank.strip() != str(len(rows)):
            raise ScheduleError(
                "rows are numbered from 0 without gaps", found=line[:60], allowed=f"rank {len(rows)}: ..."
            )
        rows.append(_parse_cells(cells.split(), only_compute=False))
        return
    if word not in _HEADS or word in heads:
        raise ScheduleError(
            "line said twice" if word in heads else "unknown line", found=line[:60], allowed=_FORM
        )
    if word != "schedule":
        _parse_numbers(rest.replace("|", " "))
    heads[word] = rest


def _parse_cells(texts: Sequence[str], *, only_compute: bool) -> Row:
    """The cells of a row; empty ones are waiting."""
    row: list[Cell] = []
    for number, text in enumerate(texts, start=1):
        try:
            row += [parse_cell(text)] if text else []
        except ScheduleError as error:
            raise ScheduleError(f"cell {number}: {error}") from None
        if text and only_compute and not row[-1].is_compute:
            raise ScheduleError(
                f"cell {number}: not compute",
                found=text,
                allowed="F, B, I, W and pairs; the rest is added here",
            )
    return tuple(row)


def _parse_numbers(text: str) -> tuple[int, ...]:
    words = text.split()
    bad = [word for word in words if not re.fullmatch(r"[0-9]+", word)]
    if bad:
        raise ScheduleError("not a whole number", found=repr(bad[0]), allowed="0, 1, 2, ...")
    return tuple(map(int, words))


_TORCH_PAIR = re.compile(r"\(([^();]*);([^();]*)\)OVERLAP_F_B")
_TORCH_REDUCE = re.compile(r"[0-9]+REDUCE_GRAD[0-9]*")  # `lower.py` says where gradients are reduced


def parse_csv(text: str, source: str = "schedule.csv") -> Schedule:
    """Read torch's CSV of a compute-only schedule.

    Args:
        text: the whole text.
        source: what to call it in errors, such as the file's path; its stem names the schedule.

    Raises:
        ScheduleError: naming source, line and cell, if the text is not well formed.
    """
    rows: list[Row] = []
    for number, record in enumerate(csv.reader(io.StringIO(text)), start=1):
        cells = [_TORCH_REDUCE.sub("", _TORCH_PAIR.sub(r"(\1+\2)", cell.strip())) for cell in record]
        try:
            row = _parse_cells(cells, only_compute=True)
        except ScheduleError as error:
            raise ScheduleError(f"{source}:{number}: {error}") from None
        rows += [row] if row else []
    forwards = {
        (action.stage, action.micro_batch): rank
        for rank, row in enumerate(rows)
        for cell in row
        for action in cell.actions
        if action.kind is Kind.F
    }
    if not forwards:
        raise ScheduleError(
            f"{source}: not a schedule", found="no forward", allowed="a line a rank: 0F0,0F1,0B0"
        )
    name = "_".join(Path(source).stem.split()) or "file"
    num_micro_batches = 1 + max(micro_batch for _, micro_batch in forwards)
    placement = _placement_of(forwards, num_micro_batches, source)
    try:
        return make_schedule(name, num_micro_batches, placement=placement, rows=rows)
    except ScheduleError as error:
        raise ScheduleError(f"{source}: {error}") from None


def _placement_of(
    forwards: dict[tuple[int, int], int], num_micro_batches: int, source: str
) -> tuple[tuple[int, ...], ...]:
    """Where the stages are, read off where their forwards are: one way, or two for the halves of the micro-batches."""
    stages = range(1 + max(stage for stage, _ in forwards))
    ways = []
    for micro_batch in range(num_micro_batches):
        missing = next((stage for stage in stages if (stage, micro_batch) not in forwards), None)
        if missing is not None:
            raise ScheduleError(f"{source}: not a whole schedule", found=f"no {missing}F{micro_batch}")
        ways.append(tuple(forwards[stage, micro_batch] for stage in stages))
    first, half = ways[0], len(ways) // 2
    if set(ways[:half]) == {first} and len(set(ways[half:])) == 1:
        return tuple(dict.fromkeys((first, ways[-1])))
    for micro_batch, way in enumerate(ways):
        if way != first:
            stage = next(s for s in stages if way[s] != first[s])
            raise ScheduleError(
                f"{source}: a stage moves between ranks",
                found=f"{stage}F{micro_batch} on rank {way[stage]}",
                allowed=f"rank {first[stage]}: all micro-batches one way, or each half its own way (DualPipe)",
            )
    return (first,)
