"""The verb `python -m megads schedule`: proves schedules, times them, compares them in a table, draws them.

    schedule NAME | FILE    one schedule: its grid, its figures               --svg FILE
    schedule all            one line a schedule for the same numbers          --svg DIRECTORY, --text: their grids too

Arithmetic is in `simulate.py`, `closed_form.py` and `verify.py`, pictures are in `render.py`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megads.errors import ScheduleError
from megads.pipeline.action import Schedule, check_counts
from megads.pipeline.closed_form import Sizes, Work
from megads.pipeline.render import svg, text_grid
from megads.pipeline.schedules import SCHEDULES, build, recipe_of
from megads.pipeline.simulate import Costs, Held, Timeline, peak_held, simulate, split_costs
from megads.pipeline.text import format_csv, format_schedule, read_schedule
from megads.pipeline.verify import Transport, verify

ALL = "all"


@dataclass(frozen=True, slots=True)
class _Slice:
    """F, I and W of one micro-batch on a slice of the model."""

    forward: float
    input_gradient: float
    weight_gradient: float


@dataclass(frozen=True, slots=True)
class _Case:
    """A proven schedule in time.

    Args:
        slices: the costs as they were given: one for every rank alike, or one a slice of the model.
        peaks: for each rank the most activations held, in micro-batches of a rank.
        is_ideal: whether messages cost nothing and overlapped pairs gain nothing, as closed forms assume.
    """

    name: str
    timeline: Timeline
    slices: tuple[_Slice, ...]
    peaks: tuple[float, ...]
    is_ideal: bool

    @property
    def parameters_held(self) -> float:
        """Stages that a rank holds, over its share of the model: 2 for twin parameters."""
        schedule = self.timeline.schedule
        held = max(len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks))
        return held * schedule.num_ranks / schedule.num_stages


def main(argv: list[str]) -> int:
    """`python -m megads schedule NAME`: prove, time and draw one schedule, or compare all.

    Raises:
        ScheduleError: an unknown name, impossible counts or costs, or a schedule that is refused by `verify`.
    """
    arguments = _parser().parse_args(argv)
    slices = _slices(arguments.costs)
    if arguments.name == ALL:
        sys.stdout.write(_compare(arguments, slices))
        return 0
    case = _case(_find(arguments), arguments, slices)
    if arguments.svg is not None:
        _write("--svg", arguments.svg, svg(case.timeline))
    if arguments.save is not None:
        form = format_csv if arguments.save.suffix == ".csv" else format_schedule
        _write("--save", arguments.save, form(case.timeline.schedule))
    sys.stdout.write(_describe(case, is_named=arguments.name in SCHEDULES))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megads schedule",
        description="Prove that pipeline schedules run, time them, compare and draw them.",
    )
    parser.add_argument("name", help=f"{', '.join(SCHEDULES)}; a file (torch's CSV: NAME.csv); or {ALL}")
    parser.add_argument("--stages", type=int, metavar="P", help="pipeline ranks")
    parser.add_argument("--micro-batches", type=int, metavar="M", help="micro-batches of a step")
    parser.add_argument("--chunks", type=int, metavar="V", help="stages on each rank (interleaved: 2)")
    parser.add_argument(
        "--costs",
        default="1,1,1",
        metavar="F,I,W[/F,I,W...]",
        help="forward, input gradient and weight gradient of a micro-batch on one rank; or of each of P equal slices, "
        "or of each stage, of the model (default 1,1,1)",
    )
    parser.add_argument("--latency", type=float, default=0.0, metavar="T", help="of a message (default 0)")
    parser.add_argument(
        "--transfer", type=float, default=0.0, metavar="T", help="bytes of a message / bandwidth (default 0)"
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=1.0,
        metavar="X",
        help="time of an overlapped forward and backward over the sum of both (default 1)",
    )
    parser.add_argument(
        "--kept",
        type=float,
        default=1.0,
        metavar="X",
        help="share of its activations that a micro-batch keeps from I to W (default 1)",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help=f"draw it there; for {ALL}: a directory")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the schedule, as NAME.csv for torch")
    parser.add_argument("--text", action="store_true", help=f"{ALL}: print the grids too")
    return parser


def _slices(text: str) -> tuple[_Slice, ...]:
    """The triples of --costs."""
    slices = []
    for triple in text.split("/"):
        try:
            numbers = [float(word) for word in triple.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 3 or not all(0 < number < math.inf for number in numbers):
            raise ScheduleError(
                "--costs is not durations of F, I and W",
                found=triple,
                allowed="three numbers > 0 like 1,1,0.8; or one such triple a slice: 1,1,0.8/1,1.2,0.9",
            )
        slices.append(_Slice(*numbers))
    return tuple(slices)


def _costs(schedule: Schedule, arguments: argparse.Namespace, slices: tuple[_Slice, ...]) -> Costs:
    """Costs of each stage from those of ranks, slices or stages."""
    num_ranks, num_stages = schedule.num_ranks, schedule.num_stages
    slices = slices * num_ranks if len(slices) == 1 else slices
    if len(slices) not in (num_ranks, num_stages):
        raise ScheduleError(
            f"--costs does not fit schedule {schedule.name}",
            found=f"{len(slices)} triples",
            allowed=f"1 for every rank, {num_ranks} slices of the model"
            + (f", or {num_stages} stages" if num_stages > num_ranks else ""),
        )
    parts = num_stages // len(slices)  # stages that a slice is cut into
    stages = [slices[stage // parts] for stage in range(parts * len(slices))]
    return split_costs(
        [s.forward / parts for s in stages],
        input_gradient=[s.input_gradient / parts for s in stages],
        weight_gradient=[s.weight_gradient / parts for s in stages],
        latency=arguments.latency,
        transfer=arguments.transfer,
        overlap=arguments.overlap,
    )


def _case(schedule: Schedule, arguments: argparse.Namespace, slices: tuple[_Slice, ...]) -> _Case:
    """Prove and time a schedule."""
    if not 0 <= arguments.kept <= 1:
        raise ScheduleError("--kept is not a share", found=arguments.kept, allowed="0 to 1")
    verify(schedule)
    timeline = simulate(schedule, _costs(schedule, arguments, slices))
    share = schedule.num_ranks / schedule.num_stages  # of a rank's activations, in one stage
    num_stages = schedule.num_stages
    held = Held((share,) * num_stages, (share * arguments.kept,) * num_stages)
    is_ideal = (arguments.latency, arguments.transfer, arguments.overlap) == (0.0, 0.0, 1.0)
    return _Case(schedule.name, timeline, slices, peak_held(schedule, held), is_ideal)


def _find(arguments: argparse.Namespace) -> Schedule:
    """The schedule that the command line names: from the table, else from a file."""
    name, path = arguments.name, Path(arguments.name)
    wanted = {
        "--stages": arguments.stages,
        "--micro-batches": arguments.micro_batches,
        "--chunks": arguments.chunks,
    }
    if name not in SCHEDULES and path.is_file():
        schedule = read_schedule(path)
        found = (schedule.num_ranks, schedule.num_micro_batches, schedule.num_chunks)
        for option, value in zip(wanted, found, strict=True):
            if wanted[option] not in (None, value):
                raise ScheduleError(
                    f"{option} is not what the file says",
                    found=wanted[option],
                    allowed=value,
                    do="leave it out",
                )
        return schedule
    if name not in SCHEDULES and path.suffix:
        raise ScheduleError(
            f"schedule file {path} does not exist",
            found=name,
            allowed=f"an existing file, or {', '.join(SCHEDULES)}",
        )
    num_chunks = arguments.chunks
    if num_chunks is None:
        num_chunks = recipe_of(name).num_chunks or 2
    _check_counts_given(arguments)
    return build(
        name,
        num_stages=arguments.stages * num_chunks,
        num_micro_batches=arguments.micro_batches,
        num_chunks=num_chunks,
    )


def _check_counts_given(arguments: argparse.Namespace) -> None:
    for option, count in (("--stages", arguments.stages), ("--micro-batches", arguments.micro_batches)):
        if count is None:
            raise ScheduleError(f"schedule {arguments.name} needs {option}", allowed="a number >= 1")


def _write(option: str, path: Path, text: str, *, makes_directory: bool = False) -> None:
    try:
        if makes_directory:
            path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScheduleError(f"{option} {path} cannot be written", found=error) from error


def _describe(case: _Case, *, is_named: bool) -> str:
    """What the verb prints of one schedule."""
    timeline, schedule = case.timeline, case.timeline.schedule
    lines = [
        f"{schedule.name}: {_sizes_text(schedule)}, {_costs_text(case.slices)}",
        "",
        text_grid(timeline),
        "",
        f"bubble       {timeline.bubble_fraction:.1%}, {_range_text(timeline.idle)} of {timeline.makespan:g} on each "
        "rank, where the optimizer waits for all",
        f"no barrier   {timeline.bubble_fraction_without_barrier:.1%}, {timeline.longest_span:g} a step",
    ]
    if is_named and len(case.slices) == 1:
        lines.append(_closed_form_text(case) if case.is_ideal else _NO_CLOSED_FORM)
    lines += [
        f"live peak    {' '.join(f'{peak:g}' for peak in case.peaks)} micro-batches of a rank, rank by rank",
        f"parameters   {case.parameters_held:g} x a rank's share of the model",
        f"proven       work, order, messages, reductions, no deadlock on {len(Transport)} transports",
    ]
    return "\n".join(lines) + "\n"


def _sizes_text(schedule: Schedule) -> str:
    return f"{schedule.num_stages} stages on {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches"


def _costs_text(slices: tuple[_Slice, ...]) -> str:
    if len(slices) > 1:
        return f"costs of {len(slices)} slices"
    (one,) = slices
    return f"F = {one.forward:g}, I = {one.input_gradient:g}, W = {one.weight_gradient:g}"


def _range_text(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if high - low < 1e-9 else f"{low:g} to {high:g}"


def _closed_form_text(case: _Case) -> str:
    """The published bubble beside the simulated one."""
    schedule, (one,) = case.timeline.schedule, case.slices
    recipe = SCHEDULES[case.name]
    sizes = Sizes(schedule.num_ranks, schedule.num_micro_batches, schedule.num_chunks)
    work = Work(one.forward, one.input_gradient, one.weight_gradient)
    bubble = recipe.bubble(sizes, work)
    if bubble is None:
        return f"closed form  none for these numbers; else {recipe.bubble_formula}"
    fraction = bubble / (bubble + schedule.num_micro_batches * work.total)
    return f"closed form  {fraction:.1%} without barrier, {recipe.bubble_formula} = {bubble:g}"


_NO_CLOSED_FORM = "closed form  none: --latency, --transfer and --overlap are not in it"

_COLUMNS = ("schedule", "chunks", "step", "bubble", "no barrier", "bubble", "peak", "parameters", "notes")


def _compare(arguments: argparse.Namespace, slices: tuple[_Slice, ...]) -> str:
    """The table of all schedules for the user's numbers."""
    _check_counts_given(arguments)
    check_counts(arguments.stages, arguments.micro_batches)
    if arguments.save is not None:
        raise ScheduleError("--save writes one schedule", found=f"schedule {ALL}", allowed="a name")
    rows: list[tuple[str, ...]] = [_COLUMNS]
    grids: list[str] = []
    for name, recipe in SCHEDULES.items():
        num_chunks = recipe.num_chunks or (2 if arguments.chunks is None else arguments.chunks)
        try:
            schedule = build(
                name,
                num_stages=arguments.stages * num_chunks,
                num_micro_batches=arguments.micro_batches,
                num_chunks=num_chunks,
            )
        except ScheduleError as error:
            rows.append((name, str(num_chunks), *("-",) * 6, " ".join(str(error).split())))
            continue
        case = _case(schedule, arguments, slices)
        rows.append(_line(case, recipe.note))
        if arguments.text:
            grids.append(f"\n{name}\n{text_grid(case.timeline)}\n")
        if arguments.svg is not None:
            _write("--svg", arguments.svg / f"{name}.svg", svg(case.timeline), makes_directory=True)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column in (0, len(_COLUMNS) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    head = (
        f"{arguments.stages} ranks, {arguments.micro_batches} micro-batches, {_costs_text(slices)}\n"
        "step and bubble: where the optimizer waits for the gradient norm of all ranks; then where it does not\n"
        "peak: most activations on a rank, in micro-batches of a rank; parameters: over a rank's share\n\n"
    )
    return head + "\n".join(lines) + "\n" + "".join(grids)


def _line(case: _Case, note: str) -> tuple[str, ...]:
    timeline = case.timeline
    return (
        case.name,
        str(timeline.schedule.num_chunks),
        f"{timeline.makespan:g}",
        f"{timeline.bubble_fraction:.1%}",
        f"{timeline.longest_span:g}",
        f"{timeline.bubble_fraction_without_barrier:.1%}",
        f"{max(case.peaks):g}",
        f"{case.parameters_held:g}x",
        note,
    )
