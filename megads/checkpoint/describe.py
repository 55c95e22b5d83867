"""What is in a step, as text: summary, table of tensors, statistics of values, differences from another step.

Behind `tools/inspect_checkpoint.py`. No torch: values are numpy arrays here, bfloat16 widened to float64,
float8 compared by its bits.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megads.checkpoint.logical import newest_reader
from megads.checkpoint.manifest import FORMAT, VERSION
from megads.checkpoint.reader import StepReader
from megads.checkpoint.statistic import histogram, statistics_table
from megads.checkpoint.table import module_of, natural, shape_text, table
from megads.checkpoint.values import box_bits, chunk_bits, to_numbers
from megads.checkpoint.verify import verify
from megads.errors import CheckpointError

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
    parser.add_argument(
        "--stats", action="store_true", help="norm, extremes and more of every tensor's values"
    )
    parser.add_argument("--histogram", metavar="TENSOR", help="draw the distribution of one tensor's values")
    options = parser.parse_args(argv)
    reader = newest_reader(options.directory)
    if options.diff is not None:
        differences = list(diff(reader, newest_reader(options.diff)))
        print("\n".join(differences) or "no difference")
        return 1 if differences else 0
    if options.histogram is not None:
        print(histogram(reader, _known(reader, options.histogram)))
        return 0
    print(summary(reader))
    if options.stats:
        print("\n" + statistics_table(reader, list(reader.manifest.tensors)))
    if options.verify:
        problems = verify(reader.path)
        print(
            "\n"
            + ("\n".join(f"DAMAGED  {p}" for p in problems) or f"verified: {reader.manifest.size:,} bytes")
        )
        return 2 if problems else 0
    if not options.stats:
        print("\n" + tensor_table(reader))
    return 0


def _known(reader: StepReader, name: str) -> str:
    """The name, if the step has such a tensor."""
    names = reader.manifest.tensors
    if name not in names:
        raise CheckpointError(
            f"{reader.path}: no tensor {name}",
            found=name,
            allowed=", ".join(difflib.get_close_matches(name, names, 3, 0.0)) or "none: the step is empty",
        )
    return name


def summary(reader: StepReader) -> str:
    """Step, size, elements by kind of tensor, parameters by module, objects."""
    manifest = reader.manifest
    lines = [
        f"checkpoint  {reader.path}",
        f"step        {manifest.step}",
        f"format      {FORMAT} {VERSION}",
        f"files       {len(manifest.files)}, in all {manifest.size:,} bytes",
        "",
    ]
    kinds: dict[str, list[int]] = {}
    modules: dict[str, list[int]] = {}
    for name, entry in manifest.tensors.items():
        kind = name.rpartition("/")[0] or "-"
        sizes = (1, math.prod(entry.shape), entry.size)
        places = [kinds.setdefault(kind, [0, 0, 0])]
        if kind == "model":
            places.append(modules.setdefault(module_of(name), [0, 0, 0]))
        for total in places:
            total[:] = (n + size for n, size in zip(total, sizes, strict=True))
    lines += _size_table("group", sorted(kinds.items()))
    if modules:
        lines += ["", *_size_table("module", modules.items())]
    if manifest.objects:
        lines.append("")
        rows = [[key, _short(value)] for key, value in sorted(manifest.objects.items())]
        lines += table([["object", "value"], *rows], left=2)
    return "\n".join(lines)


def _size_table(title: str, totals: Iterable[tuple[str, Sequence[int]]]) -> list[str]:
    rows = [[name, *(f"{n:,}" for n in total)] for name, total in totals]
    return table([[title, "tensors", "elements", "bytes"], *rows], left=1)


def tensor_table(reader: StepReader) -> str:
    """One row a tensor: name, shape, dtype, elements, bytes, chunks."""
    rows = [
        [name, shape_text(e.shape), e.dtype, f"{math.prod(e.shape):,}", f"{e.size:,}", str(len(e.chunks))]
        for name, e in sorted(reader.manifest.tensors.items(), key=lambda item: natural(item[0]))
    ]
    return "\n".join(table([["tensor", "shape", "dtype", "elements", "bytes", "chunks"], *rows], left=3))


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
            yield from _object_difference(key, left, right)
    left_table, right_table = first.manifest.tensors, second.manifest.tensors
    for name in sorted({*left_table, *right_table}, key=natural):
        if name not in left_table or name not in right_table:
            yield f"{name}: only in {(first if name in left_table else second).path}"
            continue
        a, b = left_table[name], right_table[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name}: {a.dtype} {shape_text(a.shape)} and {b.dtype} {shape_text(b.shape)}"
            continue
        yield from _value_difference(first, second, name)


def _object_difference(key: str, left: object, right: object) -> Iterator[str]:
    """Two values of an object: texts (the config) by their lines, other values whole."""
    if not (isinstance(left, str) and isinstance(right, str) and "\n" in left + right):
        yield f"object {key}: {_short(left)} and {_short(right)}"
        return
    section = ""
    for line in difflib.ndiff(left.splitlines(), right.splitlines()):
        if line[2:3].strip():
            section = line[2:].rstrip(":")
        if line[0] in "-+":
            yield f"object {key}: {line[0]} {section + '.' if line[2] == ' ' else ''}{line[2:].strip()}"


def _value_difference(first: StepReader, second: StepReader, name: str) -> Iterator[str]:
    """How many elements of a tensor differ in their bits, and by how much."""
    entry = first.manifest.tensors[name]
    other = {chunk.box: chunk for chunk in second.manifest.tensors[name].chunks}
    count, largest = 0, 0.0
    for chunk in entry.chunks:
        same = other.get(chunk.box)
        if same is not None and same.blake3 == chunk.blake3:
            continue
        left, right = chunk_bits(first, name, chunk=chunk), box_bits(second, name, box=chunk.box)
        different = left != right
        count += int(different.sum())
        a, b = to_numbers(left[different], entry.dtype), to_numbers(right[different], entry.dtype)
        if a is not None and b is not None and a.size:
            with np.errstate(invalid="ignore", over="ignore"):
                largest = max(largest, float(np.nanmax(np.abs(a - b), initial=0.0)))
    if count:
        yield f"{name}: {count:,} of {math.prod(entry.shape):,} elements differ, by at most {largest:.6g}"


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= _OBJECT_WIDTH else f"{text[: _OBJECT_WIDTH - 3]}..."
