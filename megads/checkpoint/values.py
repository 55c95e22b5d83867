"""Values of a step as numpy arrays of bits: what needs no torch stands on this (`describe.py`, `logical.py`).

Numpy has no bfloat16 and no float8, so values travel as unsigned integers of the same width.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megads.checkpoint.manifest import ITEM_SIZES, Chunk
from megads.checkpoint.reader import StepReader
from megads.parallel.shard import Box

Array = np.ndarray[Any, Any]


def chunk_bits(reader: StepReader, name: str, *, chunk: Chunk) -> Array:
    """A chunk's bit patterns as unsigned integers, of the box's shape.

    Raises:
        DamageError: they are not what was saved.
    """
    kind = np.dtype(f"<u{ITEM_SIZES[reader.manifest.tensors[name].dtype]}")
    return np.frombuffer(reader.read_chunk(chunk, name=name), kind).reshape(chunk.box.shape)


def box_bits(reader: StepReader, name: str, *, box: Box) -> Array:
    """The bit patterns of a box of tensor `name`, from whatever chunks hold it; only these are read.

    Raises:
        DamageError: they are not what was saved.
    """
    entry = reader.manifest.tensors[name]
    values = np.empty(box.shape, f"<u{ITEM_SIZES[entry.dtype]}")
    for chunk in entry.chunks:
        common = chunk.box.intersect(box)
        if common is not None:
            part = chunk_bits(reader, name, chunk=chunk)
            inside = common.shift(tuple(-a for a in chunk.box.start)).slices
            values[common.shift(tuple(-a for a in box.start)).slices] = part[inside]
    return values


def to_numbers(bits: Array, dtype: str) -> Array | None:
    """Bit patterns as float64; None for dtypes that numpy has no values for."""
    if dtype.startswith("float8"):
        return None
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(np.dtype(dtype)).astype(np.float64)
