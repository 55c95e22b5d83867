"""What verify prints: for each layout the verdict first, then where it begins and what it points to, then a table.

    tensor=2: differs from one process (2 ranks, fp64, 3 steps)
      first:  layers.0.attention.out: output in the forward of step 1 (error 7.1e-01, bound 1.0e-11)
      likely: all-reduce ... of the row-parallel product over tp ...

One row a module. A terminal gets the table in colours (rich); anything else gets plain columns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megads.verify.compare import Comparison, Row
from megads.verify.diagnose import Finding
from megads.verify.round_trip import RoundTrip

HEADER = ("module", "gradient", "bound", "weights", "bound", "")


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of one layout.

    Attributes:
        name: of the layout.
        precision, num_ranks, seconds: how it was tried.
        comparison: beside the reference; None: its ranks failed.
        finding: what differs first; None: nothing does.
        failure: why its ranks failed.
        round_trips: what became of a checkpoint.
    """

    name: str
    precision: str
    num_ranks: int
    seconds: float
    comparison: Comparison | None = None
    finding: Finding | None = None
    failure: str | None = None
    round_trips: tuple[RoundTrip, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether the layout changes nothing."""
        return (
            self.failure is None and self.finding is None and all(t.failure is None for t in self.round_trips)
        )


def show(report: Report) -> None:
    """Print a report on stdout."""
    lines = list(_head(report))
    if report.comparison is not None:
        lines += ["", *_numbers(report.comparison), ""]
    print("\n".join(lines))
    if report.comparison is not None:
        _show_table(list(_table(report.comparison)))
    print(flush=True)


def _head(report: Report) -> Iterable[str]:
    steps = "" if report.comparison is None else f", {len(report.comparison.losses)} steps"
    ranks = "1 rank" if report.num_ranks == 1 else f"{report.num_ranks} ranks"
    verdict = "equals one process" if report.is_equal else "differs from one process"
    if report.failure is not None:
        verdict = "failed"
    yield f"{report.name}: {verdict} ({ranks}, {report.precision}{steps}, {report.seconds:.1f} s)"
    if report.failure is not None:
        yield from (f"  {line}" for line in report.failure.splitlines())
    if report.finding is not None:
        found = report.finding
        yield f"  first:  {found.where} (error {found.error:.1e}, bound {found.bound:.1e})"
        yield f"  likely: {found.likely}"
    if report.comparison is not None:
        yield from (f"  ranks disagree: {said}" for said in report.comparison.outcome.disagreements[:3])
    for trip in report.round_trips:
        yield f"  saved, loaded by {trip.name}: {trip.failure or 'the same bits, and the same next step'}"


def _numbers(comparison: Comparison) -> Iterable[str]:
    bounds = comparison.bounds
    different = len(comparison.wrong_initial)
    equal = "the same bits" if not different else f"{different} of {len(comparison.rows)} parts differ"
    losses = " ".join(f"{error:.1e}" for error in comparison.losses)
    yield f"  initial weights  {equal}"
    yield f"  losses           {losses} (bound {bounds.loss:.0e})"
    yield f"  gradient norm    {comparison.norm:.1e} (bound {bounds.norm:.0e})"
    found = comparison.outcome
    if found.num_choices:
        yield f"  near-ties        {found.num_replayed} of {found.num_choices} choices of experts are the reference's"


def _table(comparison: Comparison) -> Iterable[tuple[str, ...]]:
    """The worst part of every module."""
    bounds = comparison.bounds
    modules: dict[str, list[Row]] = {}
    for row in comparison.rows:
        modules.setdefault(row.module, []).append(row)
    for name, rows in modules.items():
        gradient, weight = max(row.gradient for row in rows), max(row.weight for row in rows)
        is_right = (
            gradient <= bounds.gradient and weight <= bounds.weight and all(r.is_initial_equal for r in rows)
        )
        yield (
            name,
            f"{gradient:.1e}",
            f"{bounds.gradient:.0e}",
            f"{weight:.1e}",
            f"{bounds.weight:.0e}",
            "ok" if is_right else "differs",
        )


def _show_table(rows: Sequence[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        table = Table(*HEADER)
        for row in rows:
            table.add_row(*row, style=None if row[-1] == "ok" else "bold red")
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in (HEADER, *rows)) for column in range(len(HEADER))]
    for row in (HEADER, *rows):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print(("  " + "  ".join(cells)).rstrip())
