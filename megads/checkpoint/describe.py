"""What is in a step, as text: summary, table of tensors, differences from another step.

Behind `tools/inspect_checkpoint.py`. No torch: values are numpy arrays here, bfloat16 widened to float32,
float8 compared by its bits.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megads.checkpoint.manifest import FORMAT, ITEM_SIZES, VERSION, Chunk
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.retention import steps_at
from megads.checkpoint.store import Store
from megads.checkpoint.verify import verify
from megads.errors import CheckpointError
from megads.parallel.shard import Box

Array = np.ndarray[Any, Any]

_OBJECT_WIDTH = 80


def main(argv: Sequence[str]) -> int:
    """Describe, verify or compare; returns the exit code.

    0: done (equal, undamaged); 1: `--diff` found differences; 2: damaged.

    Raises:
        CheckpointError: no step there, or its manifest is damaged.
    """
    parser = argparse.ArgumentParser(
        prog="inspect_checkpoint.py",
        description="Show what is in a checkpoint, verify every byte, or compare with another one.",
    )
    parser.add_argument("directory", type=Path, help="a step, or a run, whose newest step is taken")
    parser.add_argument(
        "--diff", metavar="OTHER", type=Path, help="list what differs from another step or run"
    )
    parser.add_argument("--verify", action="store_true", help="read every byte and name what is damaged")
    options = parser.parse_args(argv)
    reader = _open(options.directory)
    if options.diff is not None:
        differences = list(diff(reader, _open(options.diff)))
        print("\n".join(differences) or "no difference")
        return 1 if differences else 0
    print(summary(reader))
    if options.verify:
        problems = verify(reader.path)
        print(
            "\n"
            + ("\n".join(f"DAMAGED  {p}" for p in problems) or f"verified: {reader.manifest.size:,} bytes")
        )
        return 2 if problems else 0
    print("\n" + tensor_table(reader))
    return 0


def summary(reader: StepReader) -> str:
    """Step, size, elements by group of tensors, objects."""
    manifest = reader.manifest
    lines = [
        f"checkpoint  {reader.path}",
        f"step        {manifest.step}",
        f"format      {FORMAT} {VERSION}",
        f"files       {len(manifest.files)}, in all {manifest.size:,} bytes",
        "",
    ]
    groups: dict[str, list[int]] = {}
    for name, entry in manifest.tensors.items():
        total = groups.setdefault(name.rpartition("/")[0] or "-", [0, 0, 0])
        for index, value in enumerate((1, math.prod(entry.shape), entry.size)):
            total[index] += value
    rows = [[group, *(f"{n:,}" for n in total)] for group, total in sorted(groups.items())]
    lines += _table([["group", "tensors", "elements", "bytes"], *rows], left=1)
    if manifest.objects:
        lines.append("")
        rows = [[key, _short(value)] for key, value in sorted(manifest.objects.items())]
        lines += _table([["object", "value"], *rows], left=2)
    return "\n".join(lines)


def tensor_table(reader: StepReader) -> str:
    """One row a tensor: name, shape, dtype, elements, bytes, chunks."""
    rows = [
        [name, _shape(e.shape), e.dtype, f"{math.prod(e.shape):,}", f"{e.size:,}", str(len(e.chunks))]
        for name, e in sorted(reader.manifest.tensors.items(), key=lambda item: _natural(item[0]))
    ]
    return "\n".join(_table([["tensor", "shape", "dtype", "elements", "bytes", "chunks"], *rows], left=3))


def diff(first: StepReader, second: StepReader) -> Iterator[str]:
    """A line for each thing that differs; memory: two chunks.

    Raises:
        DamageError: a chunk of either is not as it was saved.
    """
    if first.step != second.step:
        yield f"step: {first.step} and {second.step}"
    for key in sorted({*first.objects, *second.objects}):
        left, right = first.objects.get(key), second.objects.get(key)
        if left != right:
            yield f"object {key}: {_short(left)} and {_short(right)}"
    left_table, right_table = first.manifest.tensors, second.manifest.tensors
    for name in sorted({*left_table, *right_table}, key=_natural):
        if name not in left_table or name not in right_table:
            yield f"{name}: only in {(first if name in left_table else second).path}"
            continue
        a, b = left_table[name], right_table[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name}: {a.dtype} {_shape(a.shape)} and {b.dtype} {_shape(b.shape)}"
            continue
        yield from _value_difference(first, second, name)


def _value_difference(first: StepReader, second: StepReader, name: str) -> Iterator[str]:
    """How many elements of a tensor differ in their bits, and by how much."""
    entry = first.manifest.tensors[name]
    other = {chunk.box: chunk for chunk in second.manifest.tensors[name].chunks}
    count, largest = 0, 0.0
    for chunk in entry.chunks:
        same = other.get(chunk.box)
        if same is not None and same.blake3 == chunk.blake3:
            continue
        left, right = _raw_chunk(first, name, chunk), _raw_box(second, name, chunk.box)
        different = left != right
        count += int(different.sum())
        a, b = _numbers(left[different], entry.dtype), _numbers(right[different], entry.dtype)
        if a is not None and b is not None and a.size:
            with np.errstate(invalid="ignore", over="ignore"):
                largest = max(largest, float(np.nanmax(np.abs(a - b), initial=0.0)))
    if count:
        yield f"{name}: {count:,} of {math.prod(entry.shape):,} elements differ, by at most {largest:.6g}"


def _raw_chunk(reader: StepReader, name: str, chunk: Chunk) -> Array:
    """A chunk's bit patterns as unsigned integers, of the box's shape."""
    kind = np.dtype(f"<u{ITEM_SIZES[reader.manifest.tensors[name].dtype]}")
    return np.frombuffer(reader.read_chunk(chunk, name=name), kind).reshape(chunk.box.shape)


def _raw_box(reader: StepReader, name: str, box: Box) -> Array:
    """The bit patterns of a box, from whatever chunks hold it."""
    entry = reader.manifest.tensors[name]
    values = np.empty(box.shape, f"<u{ITEM_SIZES[entry.dtype]}")
    for chunk in entry.chunks:
        common = chunk.box.intersect(box)
        if common is not None:
            part = _raw_chunk(reader, name, chunk)[common.shift(tuple(-a for a in chunk.box.start)).slices]
            values[common.shift(tuple(-a for a in box.start)).slices] = part
    return values


def _numbers(raw: Array, dtype: str) -> Array | None:
    """Bit patterns as float64; None for dtypes that numpy has no values for."""
    if dtype.startswith("float8"):
        return None
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.view(np.dtype(dtype)).astype(np.float64)


def _open(path: Path) -> StepReader:
    steps = steps_at(path, store=Store())
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint",
            found="no step in it" if path.exists() else "nothing there",
            allowed="the directory of a step, of a run, or of its checkpoints",
        )
    return open_step(steps[0])


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: layers.2 before layers.10."""
    parts = name.replace("/", ".").split(".")
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _OBJECT_WIDTH else f"{text[: _OBJECT_WIDTH - 3]}..."


def _table(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Rows as aligned lines; the first `left` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
