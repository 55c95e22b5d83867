"""Draws schedules: a text grid of ranks x time, and an SVG of the same.

    0 |F0F1..B0--F2B1--..B2--      `-` is the rest of an action, `.` is idle time
    1 |..F0B0--F1B1--F2B2--..

What is drawn is the timeline that `simulate.py` computes; nothing here knows a schedule by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from xml.sax.saxutils import escape

from megads.pipeline.action import Action, Cell, Kind, Overlap, Schedule
from megads.pipeline.simulate import Span, Timeline

_WIDTH = 100
"""Columns of the text grid before it continues below."""


def text_grid(timeline: Timeline, width: int = _WIDTH) -> str:
    """The timeline as plain ASCII, at most `width` columns; what does not fit continues in a block below."""
    schedule = timeline.schedule
    labels = [[_label(schedule, span.cell) for span in row] for row in timeline.spans]
    scale = _columns_per_unit(timeline, labels)
    total = round(timeline.makespan * scale)
    lines = []
    for row, names in zip(timeline.spans, labels, strict=True):
        line = ["."] * total
        for span, name in zip(row, names, strict=True):
            start, stop = round(span.start * scale), round(span.stop * scale)
            line[start:stop] = name.ljust(stop - start, "-")[: stop - start]
        lines.append("".join(line))
    head = len(str(schedule.num_ranks - 1))
    step = max(width - head - 2, 1)
    shortest = round(scale * min((s.stop - s.start for row in timeline.spans for s in row), default=0.0))
    if 0 < shortest < step:
        step -= step % shortest  # where cells are multiples of the shortest, no label is cut
    blocks = [
        "\n".join(f"{rank:>{head}} |{line[start : start + step]}" for rank, line in enumerate(lines))
        for start in range(0, max(total, 1), step)
    ]
    return "\n\n".join(blocks)


def _label(schedule: Schedule, cell: Cell) -> str:
    """`F3` where every rank holds one stage, `2F3` elsewhere; `(0F4+1B2)` for a pair."""
    is_plain = len(schedule.placement) == 1 and schedule.num_stages == schedule.num_ranks
    if is_plain and isinstance(cell, Action):
        return f"{cell.kind.value}{cell.micro_batch}"
    return str(cell)


def _columns_per_unit(timeline: Timeline, labels: list[list[str]]) -> float:
    """Columns for a unit of time: enough for every label.

    One to spare if durations are no multiples, and after a label that begins with its stage: `0F0-0F1-`.
    """
    needs = [
        (len(name) + name[0].isdigit(), span.stop - span.start)
        for row, names in zip(timeline.spans, labels, strict=True)
        for span, name in zip(row, names, strict=True)
        if span.stop > span.start
    ]
    if not needs:
        return 0.0
    unit = min(duration for _, duration in needs)
    is_multiple = all(abs(duration / unit - round(duration / unit)) < 1e-9 for _, duration in needs)
    return max((size + (0 if is_multiple else 1)) / duration for size, duration in needs)


_COLORS: Mapping[Kind, tuple[str, str]] = MappingProxyType(
    {
        Kind.F: ("#4c8bf5", "forward (F)"),
        Kind.B: ("#3aa76d", "backward (B)"),
        Kind.I: ("#2bb3a3", "input gradient (I)"),
        Kind.W: ("#f2a33a", "weight gradient (W)"),
    }
)
_IDLE = "#eceff3"
_LINE = 34
"""Height of a rank's row in pixels, gap included; a second box of an overlapped pair adds `_PAIR`."""
_PAIR = 20
_GAP = 6


def svg(timeline: Timeline) -> str:
    """The timeline as a self-contained SVG picture: ranks downwards, time to the right, idle time in grey."""
    schedule = timeline.schedule
    spans = [(rank, span) for rank, row in enumerate(timeline.spans) for span in row]
    labels = [
        (len(_label(schedule, action)), span.stop - span.start)
        for _, span in spans
        for action in span.cell.actions
    ]
    scale = max(
        ((10 + 7 * size) / time for size, time in labels if time > 0), default=1.0
    )  # pixels a time unit
    line = _LINE + (_PAIR if _has_pairs(schedule) else 0)
    left, top = 70, 102
    width = max(left + timeline.makespan * scale + 24, 680)
    bottom = top + line * schedule.num_ranks
    title = f"{schedule.name}: {schedule.num_stages} stages on {schedule.num_ranks} ranks, "
    title += f"{schedule.num_micro_batches} micro-batches"
    bubble = f"bubble {timeline.bubble_fraction:.1%} where the optimizer waits for all ranks, "
    bubble += f"{timeline.bubble_fraction_without_barrier:.1%} where it does not"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{bottom + 42}" '
        f'viewBox="0 0 {width:.0f} {bottom + 42}" font-family="Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="26" font-size="17" font-weight="bold" fill="#1f2933">{escape(title)}</text>',
        f'<text x="{left}" y="46" font-size="13" fill="#52606d">{bubble}</text>',
        *_svg_legend(schedule, {action.kind for _, span in spans for action in span.cell.actions}, left),
    ]
    for rank in range(schedule.num_ranks):
        y = top + line * rank
        parts.append(
            f'<text x="{left - 10}" y="{y + line / 2:.0f}" text-anchor="end" fill="#52606d">rank {rank}</text>'
        )
        parts.append(
            f'<rect x="{left:.2f}" y="{y}" width="{timeline.makespan * scale:.2f}" height="{line - _GAP}" '
            f'fill="{_IDLE}"/>'
        )
    for rank, span in spans:
        x = left + span.start * scale
        parts.extend(_svg_span(schedule, span, x, top + line * rank, (span.stop - span.start) * scale))
    parts.extend(_svg_axis(timeline.makespan, scale, left, bottom))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _has_pairs(schedule: Schedule) -> bool:
    return any(isinstance(cell, Overlap) for _, _, cell in schedule.cells())


def _svg_legend(schedule: Schedule, kinds: set[Kind], left: float) -> list[str]:
    """One swatch for each kind that occurs, one for idle time, and below what else the picture says."""
    parts, x = [], left
    entries = [entry for kind, entry in _COLORS.items() if kind in kinds] + [(_IDLE, "idle")]
    for color, name in entries:
        parts.append(f'<rect x="{x}" y="58" width="14" height="14" rx="2" fill="{color}" stroke="#cbd2d9"/>')
        parts.append(f'<text x="{x + 20}" y="69" fill="#1f2933">{name}</text>')
        x += 40 + 7 * len(name)
    notes = []
    if schedule.num_stages > schedule.num_ranks:
        notes.append("darker: a later stage of the rank")
    if len(schedule.placement) == 2:
        notes.append("darker: the other direction")
    if _has_pairs(schedule):
        notes.append("one above the other: overlapped")
    parts.append(f'<text x="{left}" y="90" fill="#52606d">{"; ".join(notes)}</text>')
    return parts


def _svg_span(schedule: Schedule, span: Span, x: float, y: float, width: float) -> list[str]:
    """One cell: a box with its label; an overlapped pair is two boxes, one above the other."""
    actions = span.cell.actions
    height = (_LINE + (_PAIR if _has_pairs(schedule) else 0) - _GAP) / len(actions)
    parts = []
    for index, action in enumerate(actions):
        top = y + index * height
        parts.append(
            f'<rect x="{x + 0.5:.2f}" y="{top:.2f}" width="{max(width - 1, 0.5):.2f}" height="{height:.2f}" '
            f'rx="3" fill="{_color(schedule, action)}">'
            f"<title>{span.cell}: {span.start:g} to {span.stop:g}</title></rect>"
        )
        parts.append(
            f'<text x="{x + width / 2:.2f}" y="{top + height / 2 + 4:.2f}" text-anchor="middle" '
            f'fill="white">{_label(schedule, action)}</text>'
        )
    return parts


def _color(schedule: Schedule, action: Action) -> str:
    """The colour of an action's kind, the darker the later its stage among those of a rank, or its direction."""
    color = _COLORS[action.kind][0]
    if len(schedule.placement) == 2:
        chunk, last_chunk = 2 * action.micro_batch // schedule.num_micro_batches, 1
    else:
        chunk, last_chunk = (
            action.stage // schedule.num_ranks,
            (schedule.num_stages - 1) // schedule.num_ranks,
        )
    light = 1 - 0.4 * chunk / max(last_chunk, 1)
    return "#" + "".join(f"{round(int(color[i : i + 2], 16) * light):02x}" for i in (1, 3, 5))


def _svg_axis(makespan: float, scale: float, left: float, y: float) -> list[str]:
    """A time axis with about ten ticks at round numbers."""
    step = 1.0
    while makespan / step > 14:
        step *= 2.5 if f"{step:e}".startswith("2") else 2
    while makespan and makespan / step < 4:
        step /= 2
    parts = [f'<path d="M{left} {y + 2} H{left + makespan * scale:.2f}" stroke="#7b8794" fill="none"/>']
    for tick in range(int(makespan / step + 1e-9) + 1):
        x = left + tick * step * scale
        parts.append(f'<path d="M{x:.2f} {y + 2} v5" stroke="#7b8794"/>')
        parts.append(
            f'<text x="{x:.2f}" y="{y + 20}" text-anchor="middle" fill="#52606d">{tick * step:g}</text>'
        )
    parts.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end" fill="#52606d">time</text>')
    return parts
