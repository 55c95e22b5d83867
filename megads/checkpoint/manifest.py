"""The manifest: what a committed step consists of, as frozen values, and its one encoding.

A step on disk. A tensor is logical: whichever ranks wrote it, its chunks are boxes of the global tensor and
cover it exactly once; the chunks of a file follow each other without a gap.

    step-00000100/
      chunks-00000.bin    | w rows 0..3 | v rows 0..1 |            little-endian values, row-major in each box
      chunks-00001.bin    | w rows 4..7 | v rows 2..3 |
      manifest.json       {"files":..,"format":..,"objects":..,"step":100,"tensors":..,"version":1,
                          "blake3": "<hash of every byte before this line>"}

Everything in a manifest is checked before anything is allocated or opened. No torch, no file is touched here:
`reader.py` reads, `commit.py` writes.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

from blake3 import blake3

from megads.errors import CheckpointError
from megads.parallel.shard import Box, Shape

FORMAT = "megads-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 28
MAX_CHUNK_BYTES = 1 << 26
MAX_DIMS = 8
ITEM_SIZES: Mapping[str, int] = MappingProxyType(
    {
        "float64": 8,
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3fn": 1,
        "float8_e5m2": 1,
        "int64": 8,
        "int32": 4,
        "int16": 2,
        "int8": 1,
        "uint8": 1,
        "bool": 1,
    }
)

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.:/#-]{1,512}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LAST_LINE = re.compile(rb'"blake3": "([0-9a-f]{64})"}\n')
_LAST_LINE_SIZE = 78
_MAX_INTEGER = 1 << 62


class DamageError(CheckpointError):
    """A step whose bytes are not those that were saved."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and where its bytes lie.

    Attributes:
        box: global indices.
        file: plain name inside the step's directory.
        offset, size: bytes.
        blake3: hash of these bytes, 64 hex digits.
    """

    box: Box
    file: str
    offset: int
    size: int
    blake3: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One logical tensor: global shape, dtype (torch's name without `torch.`), the chunks that cover it."""

    shape: Shape
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and hash of a whole file."""

    size: int
    blake3: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of one step.

    Attributes:
        step: optimizer steps done.
        tensors: logical name -> entry.
        files: plain file name -> entry.
        objects: small JSON values, e.g. history, optimizer scalars, the config.
    """

    step: int
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]
    objects: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all files, the manifest itself left out."""
        return sum(file.size for file in self.files.values())


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """The hash used throughout a checkpoint: BLAKE3, 64 hex digits."""
    return blake3(data).hexdigest()


def encode(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`.

    Raises:
        CheckpointError: not well formed (see `problem`), or an object is not a finite JSON value.
    """
    wrong = problem(manifest)
    if wrong is not None:
        raise CheckpointError(f"step {manifest.step} cannot be described: {wrong}")
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "tensors": {name: _tensor_tree(entry) for name, entry in manifest.tensors.items()},
        "files": {name: {"size": f.size, "blake3": f.blake3} for name, f in manifest.files.items()},
        "objects": dict(manifest.objects),
    }
    try:
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"step {manifest.step} cannot be described: an object is not JSON", found=error
        ) from error
    body = text[:-1].encode() + b",\n"
    return body + b'"blake3": "' + hash_bytes(body).encode() + b'"}\n'


def decode(data: bytes | bytearray, *, where: str) -> Manifest:
    """The manifest in `data`, checked; `where` names it in errors.

    Raises:
        DamageError: hash, syntax or any bound is wrong.
        CheckpointError: written by a newer version.
    """
    body, last_line = data[:-_LAST_LINE_SIZE], data[-_LAST_LINE_SIZE:]
    match = _LAST_LINE.fullmatch(last_line)
    if match is None:
        raise DamageError(f"{where}: damaged", found="no hash at its end", allowed="a complete manifest")
    if match[1].decode() != hash_bytes(body):
        raise DamageError(f"{where}: damaged", found="its bytes do not match its own hash")
    try:
        tree = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        if isinstance(tree, dict) and type(tree.get("version")) is int and tree["version"] > VERSION:
            raise CheckpointError(
                f"{where}: written by a newer megads",
                found=f"format version {tree['version']}",
                allowed=f"up to {VERSION}",
                do="update megads",
            )
        manifest = _manifest(tree)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{where}: not a manifest", found=error) from error
    wrong = problem(manifest)
    if wrong is not None:
        raise DamageError(f"{where}: not a manifest", found=wrong)
    return manifest


def problem(manifest: Manifest) -> str | None:
    """The first thing that is not well formed, or None.

    Checked: step; names; dtypes; shapes; every chunk's size and bounds; the chunks of a tensor cover it
    exactly once; the chunks of a file follow each other exactly.
    """
    if not 0 <= manifest.step <= _MAX_INTEGER:
        return f"step {manifest.step}"
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
            return f"file name {name!r} (a plain name inside the directory is allowed)"
    by_file: dict[str, list[tuple[int, int]]] = {name: [] for name in manifest.files}
    for name, entry in manifest.tensors.items():
        wrong = _entry_problem(name, entry, manifest.files)
        if wrong is not None:
            return f"tensor {name[:100]!r}: {wrong}"
        for chunk in entry.chunks:
            by_file[chunk.file].append((chunk.offset, chunk.size))
    for name, spans in by_file.items():
        end = 0
        for offset, size in sorted(spans):
            if offset != end:
                return f"file {name}: a chunk starts at byte {offset}, the one before ends at {end}"
            end += size
        if end != manifest.files[name].size:
            return f"file {name}: its chunks have {end} bytes, the file {manifest.files[name].size}"
    return None


def cover_problem(shape: Shape, boxes: Iterable[Box]) -> str | None:
    """Why `boxes` do not cover a tensor of `shape` exactly once, or None if they do; linear in their number.

    A function on a grid is given by its mixed differences, and a box's are +-1 at its corners. So the boxes
    cover exactly once if and only if the signed corners of all add up to those of the whole. In one dim:

        whole    +1 . . . . -1
        boxes    +1 . -1            the inner corners cancel; what is left is the edge of a gap or an overlap
                      +1 . . -1
    """
    corners: Counter[Shape] = Counter()
    for box, weight in itertools.chain([(Box.whole(shape), -1)], ((box, 1) for box in boxes)):
        for choice in itertools.product((0, 1), repeat=len(shape)):
            corner = tuple(
                stop if last else start for start, stop, last in zip(box.start, box.stop, choice, strict=True)
            )
            corners[corner] += weight * (-1) ** sum(choice)
    rest = min(((corner, count) for corner, count in corners.items() if count), default=None)
    if rest is None:
        return None
    return f"{'missing' if rest[1] < 0 else 'there more than once'} from index {list(rest[0])} on"


def _entry_problem(name: str, entry: TensorEntry, files: Mapping[str, FileEntry]) -> str | None:
    """What is wrong with one tensor, or None."""
    if not _TENSOR_NAME.fullmatch(name):
        return "not a name of letters, digits and _ . : / # -"
    if entry.dtype not in ITEM_SIZES:
        return f"dtype {entry.dtype!r} (allowed: {', '.join(ITEM_SIZES)})"
    if len(entry.shape) > MAX_DIMS or min(entry.shape, default=0) < 0 or entry.size > _MAX_INTEGER:
        return f"shape {entry.shape}"
    for chunk in entry.chunks:
        wrong = _chunk_problem(chunk, entry, files)
        if wrong is not None:
            return wrong
    return cover_problem(entry.shape, (chunk.box for chunk in entry.chunks))


def _chunk_problem(chunk: Chunk, entry: TensorEntry, files: Mapping[str, FileEntry]) -> str | None:
    """What is wrong with one chunk, or None."""
    box = chunk.box
    if not len(box.start) == len(box.stop) == len(entry.shape):
        return f"a box of {len(box.start)} dims in a tensor of {len(entry.shape)}"
    if not all(0 <= a < b <= n for a, b, n in zip(box.start, box.stop, entry.shape, strict=True)):
        return f"box {box.start}..{box.stop} is not inside shape {entry.shape}"
    if chunk.size != box.size * ITEM_SIZES[entry.dtype] or chunk.size > MAX_CHUNK_BYTES:
        return f"a chunk of {chunk.size} bytes for {box.size} x {entry.dtype} (at most {MAX_CHUNK_BYTES})"
    if chunk.file not in files:
        return f"file {chunk.file[:100]!r} is not in the list of files"
    if chunk.offset < 0 or chunk.offset + chunk.size > files[chunk.file].size:
        return f"bytes {chunk.offset}..{chunk.offset + chunk.size} of {chunk.file} are past its end"
    return None


def _tensor_tree(entry: TensorEntry) -> dict[str, Any]:
    return {"shape": entry.shape, "dtype": entry.dtype, "chunks": [chunk_tree(c) for c in entry.chunks]}


def chunk_tree(chunk: Chunk) -> dict[str, Any]:
    """A chunk as JSON values."""
    return {
        "start": chunk.box.start,
        "stop": chunk.box.stop,
        "file": chunk.file,
        "offset": chunk.offset,
        "size": chunk.size,
        "blake3": chunk.blake3,
    }


def chunk_from_tree(tree: object) -> Chunk:
    """The inverse of `chunk_tree`.

    Raises:
        ValueError: not such a tree.
    """
    values = _table(tree, "chunk", ("start", "stop", "file", "offset", "size", "blake3"))
    return Chunk(
        Box(_integers(values["start"], "start"), _integers(values["stop"], "stop")),
        _text(values["file"], "file"),
        _integer(values["offset"], "offset"),
        _integer(values["size"], "size"),
        _hash(values["blake3"]),
    )


def _manifest(tree: object) -> Manifest:
    values = _table(tree, "manifest", ("format", "version", "step", "tensors", "files", "objects", "blake3"))
    if values["format"] != FORMAT or values["version"] != VERSION:
        raise ValueError(f"format {values['format']!r}, version {values['version']!r}")
    tensors = {}
    for name, entry in _dict(values["tensors"], "tensors").items():
        fields = _table(entry, "tensor", ("shape", "dtype", "chunks"))
        if not isinstance(fields["chunks"], list):
            raise ValueError("chunks are not a list")
        tensors[name] = TensorEntry(
            _integers(fields["shape"], "shape"),
            _text(fields["dtype"], "dtype"),
            tuple(chunk_from_tree(chunk) for chunk in fields["chunks"]),
        )
    files = {}
    for name, entry in _dict(values["files"], "files").items():
        fields = _table(entry, "file", ("size", "blake3"))
        files[name] = FileEntry(_integer(fields["size"], "size"), _hash(fields["blake3"]))
    return Manifest(_integer(values["step"], "step"), tensors, files, _dict(values["objects"], "objects"))


def _dict(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: not an object")
    return value


def _table(value: object, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    table = _dict(value, what)
    if set(table) != set(keys):
        raise ValueError(f"{what}: keys {sorted(table)[:20]}, not {sorted(keys)}")
    return table


def _is_integer(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_INTEGER


def _integer(value: object, what: str) -> int:
    if not _is_integer(value):
        raise ValueError(f"{what}: not an integer from 0 to {_MAX_INTEGER}")
    return value


def _integers(value: object, what: str) -> Shape:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise ValueError(f"{what}: not a list of at most {MAX_DIMS} integers")
    return tuple(_integer(item, what) for item in value)


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: not a text")
    return value


def _hash(value: object) -> str:
    text = _text(value, "blake3")
    if not _HASH.fullmatch(text):
        raise ValueError("blake3: not 64 hex digits")
    return text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return table


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
