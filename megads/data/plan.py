"""The rows of history that a config asks for: batch size by tokens read, sequence length by step.

Lives here: `Ramp`, and turning ramp and curriculum into segments up to a last step, from change to change: the time
depends on the number of changes alone. Does not live here: what a change does to the cursors (segment).

    ramp (0, 256) (1000, 512), stairs           256 ______|512 ----
    the same with unit 64, from point to point  256 __320 __384 __448 __|512 ----
                                                tokens read   0 ... 1000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from megads.data.curriculum import Curriculum
from megads.data.segment import Segment, extend_history, tokens_by


@dataclass(frozen=True, slots=True)
class Ramp:
    """Samples of a step as a function of the tokens read before it.

    Args:
        points: (tokens, samples), ascending in both, the first at 0 tokens.
        unit: between two points the batch grows on a line, rounded down to a multiple of this; None: it keeps the
            samples of the point before.
    """

    points: tuple[tuple[int, int], ...]
    unit: int | None = None

    def size(self, tokens: int) -> int:
        """Samples of a step before which `tokens` tokens were read."""
        for (start, low), (end, high) in pairwise(self.points):
            if start <= tokens < end:
                if self.unit is None:
                    return low
                grown = low + (high - low) * (tokens - start) // (end - start)
                return max(low, grown // self.unit * self.unit)
        return self.points[-1][1]

    def next_change(self, tokens: int) -> int | None:
        """The least number of tokens above `tokens` with another size; None: there is none."""
        for (start, low), (end, high) in pairwise(self.points):
            if start <= tokens < end:
                if self.unit is not None:
                    following = (self.size(tokens) // self.unit + 1) * self.unit
                    if following < high:
                        return start - (-(following - low) * (end - start) // (high - low))
                return end
        return None


def plan_history(
    history: Sequence[Segment],
    wanted: Segment,
    *,
    ramp: Ramp,
    curriculum: Curriculum,
    last_step: int,
    skipped_tokens: int = 0,
) -> tuple[Segment, ...]:
    """The history from step `wanted.first_step` to `last_step`, with a row for each change of the config's schedules.

    Args:
        history: what was read before; later rows are planned anew.
        wanted: its batch size and sequence length are replaced by those of the schedules.
        skipped_tokens: of the mix, that no step reads before it goes on; rounded up to whole samples.

    Raises:
        DataError: as `extend_history`.
    """
    step = wanted.first_step
    tokens = tokens_by(history, step - 1) if step > 1 else 0

    def row(step: int, tokens: int) -> Segment:
        return replace(
            wanted,
            first_step=step,
            batch_size=ramp.size(tokens),
            sequence_length=curriculum.length(step),
        )

    first = row(step, tokens)
    if skipped_tokens:
        first = replace(first, skipped=((0, -(-skipped_tokens // first.sequence_length)),))
    rows = list(extend_history(history, first))
    while True:
        segment = rows[-1]
        a_step = segment.batch_size * segment.sequence_length
        following = [curriculum.next_change(step), ramp.next_change(tokens)]
        changes = [] if following[0] is None else [following[0]]
        if following[1] is not None:
            changes.append(step - (tokens - following[1]) // a_step)
        if not changes or min(changes) > last_step:
            return tuple(rows)
        tokens += (min(changes) - step) * a_step
        step = min(changes)
        planned = segment.followed_by(row(step, tokens))
        if not segment.goes_on_as(planned):
            rows.append(planned)
