"""Statistics of the values in a step: norms, extremes, what is not finite, a histogram. Memory: one chunk.

float8 tensors have no values here; their rows say so. Sums run in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megads.checkpoint.reader import StepReader
from megads.checkpoint.table import natural, shape_text, table
from megads.checkpoint.values import Array, chunk_bits, to_numbers

_BAR = 40  # characters of the longest bar of a histogram
_BINS = 24


@dataclass(frozen=True, slots=True)
class Statistic:
    """What the values of one tensor are like. Values that are not finite count in `num_bad` alone.

    Attributes:
        norm: Euclidean.
        deviation: standard deviation of the elements.
    """

    num_elements: int
    num_bad: int
    norm: float
    mean: float
    deviation: float
    smallest: float
    largest: float
    num_zeros: int


def statistic(reader: StepReader, name: str) -> Statistic | None:
    """Statistics of one tensor, read once; None for dtypes without values.

    Raises:
        DamageError: a chunk is not as it was saved.
    """
    count = bad = zeros = 0
    total = squares = 0.0
    smallest, largest = math.inf, -math.inf
    for values in _values(reader, name):
        if values is None:
            return None
        finite = values[np.isfinite(values)]
        bad += values.size - finite.size
        count += finite.size
        if finite.size:
            total += float(finite.sum())
            squares += float(np.square(finite).sum())
            smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
            zeros += int((finite == 0).sum())
    mean = total / count if count else math.nan
    variance = max(0.0, squares / count - mean * mean) if count else math.nan
    return Statistic(
        count + bad, bad, math.sqrt(squares), mean, math.sqrt(variance), smallest, largest, zeros
    )


def statistics_table(reader: StepReader, names: Sequence[str]) -> str:
    """One row a tensor: shape, norm, mean, deviation, extremes, zeros, values that are not finite."""
    rows = [["tensor", "shape", "norm", "mean", "std", "min", "max", "zeros", "not finite"]]
    for name in sorted(names, key=natural):
        entry, found = reader.manifest.tensors[name], statistic(reader, name)
        head = [name, shape_text(entry.shape)]
        if found is None:
            rows.append([*head, *(["-"] * 5), entry.dtype, "-"])
            continue
        numbers = (found.norm, found.mean, found.deviation, found.smallest, found.largest)
        rows.append([*head, *(f"{n:.4g}" for n in numbers), f"{found.num_zeros:,}", f"{found.num_bad:,}"])
    return "\n".join(table(rows, left=2))


def histogram(reader: StepReader, name: str) -> str:
    """The distribution of a tensor's finite values in equal bins from its smallest to its largest, drawn as text."""
    found = statistic(reader, name)
    if found is None or found.num_elements == found.num_bad:
        return f"{name}: no finite values"
    low, high = found.smallest, found.largest
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    counts = np.zeros(_BINS, dtype=np.int64)
    for values in _values(reader, name):
        assert values is not None  # `statistic` has seen them
        counts += np.histogram(values[np.isfinite(values)], edges)[0]
    most = int(counts.max())
    lines = [f"{name}  {found.num_elements:,} elements, {found.num_bad:,} not finite"]
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        lines.append(f"{left:>11.4g} .. {right:<11.4g} {'#' * -(-int(count) * _BAR // most)} {count:,}")
    return "\n".join(line.rstrip() for line in lines)


def _values(reader: StepReader, name: str) -> Iterator[Array | None]:
    """The values of a tensor, chunk by chunk."""
    entry = reader.manifest.tensors[name]
    for chunk in entry.chunks:
        yield to_numbers(chunk_bits(reader, name, chunk=chunk).reshape(-1), entry.dtype)
