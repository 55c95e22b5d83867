"""Parts to a corpus, or to the two of a split, in constant memory.

    parts in order of the inputs --> without duplicates --> train | valid --> shuffle --> PREFIX.* PREFIX_valid.*

Lives here: the pass over all parts, and what the manifest says. Does not live here: the files of a corpus
(corpus_writer), what is a duplicate (dedup), random order (shuffle).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.corpus import Manifest
from megads.data.corpus_writer import CorpusWriter, Source
from megads.data.dedup import Duplicates
from megads.data.frame import Frame, read_frames, read_keys
from megads.data.indexed import sync_file
from megads.data.job import Job
from megads.data.part import IO_BYTES, PartFacts, hash_file, read_bad, read_facts
from megads.data.record import STDIN, BadRecord, Inputs, Unit
from megads.data.shuffle import Shuffle
from megads.data.unit import place_of
from megads.errors import DataError

NUM_NAMED_BAD = 20
"""Bad records that are named on the screen and in the manifest; the others stand in PREFIX.bad.jsonl."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What is wanted of the corpus beside the parts."""

    dtype: np.dtype[np.generic]
    has_mask: bool
    dedup: bool
    shuffle_seed: int | None
    valid_fraction: float | None

    @property
    def sides(self) -> tuple[str, ...]:
        """The corpora that are made."""
        return ("all",) if self.valid_fraction is None else ("train", "valid")


@dataclass(frozen=True, slots=True)
class _Part:
    """A finished part and its place among the inputs."""

    path: Path
    unit: Unit
    facts: PartFacts
    num_before: int
    """Records of its file before it."""


@dataclass(slots=True)
class _Side:
    """One corpus on its way."""

    name: str
    writer: CorpusWriter
    shuffle: Shuffle | None
    text_bytes: int = 0
    longest: int = 0

    def add(self, frame: Frame) -> None:
        self.text_bytes += int(frame.sizes.sum(dtype=np.int64))
        self.longest = max(self.longest, int(frame.lengths.max(initial=0)))
        if self.shuffle is None:
            self.write(frame)
        else:
            self.shuffle.add(frame)

    def write(self, frame: Frame) -> None:
        self.writer.add(frame.ids, frame.lengths, sources=frame.sources, mask=frame.mask)


def side_prefix(prefix: str, side: str) -> str:
    """PREFIX of the corpus of a side."""
    return prefix + ("_valid" if side == "valid" else "")


def merge_parts(
    job: Job, merge: Merge, *, facts: Mapping[str, Any], on_progress: Callable[[int], None]
) -> tuple[Manifest, ...]:
    """Make the corpus, or both of a split, of the parts.

    Args:
        facts: the fields of `Manifest` that only the caller knows.
        on_progress: called with the units merged so far.

    Raises:
        DataError: a part is damaged (it is removed, so that the same command makes it again), or no document is
            left for a corpus.
    """
    parts = _parts_in_order(job)
    scratch = job.folder / "merge"
    total_bytes = sum(part.facts.frames_size for part in parts)
    with ExitStack() as stack:
        sides = []
        for name in merge.sides:
            writer = CorpusWriter(side_prefix(job.prefix, name), merge.dtype, has_mask=merge.has_mask)
            stack.enter_context(writer)
            sides.append(_Side(name, writer, _shuffle(scratch / name, merge, total_bytes=total_bytes)))
        num_duplicates = _deal(parts, sides, job=job, merge=merge, on_progress=on_progress)
        for side in sides:
            for frame in side.shuffle.drain() if side.shuffle else ():
                side.write(frame)
            _check_not_empty(side, parts, merge)
        bad = _report_bad(job, parts)
        sources = _sources(job, parts)
        totals = {
            "num_empty": sum(part.facts.num_empty for part in parts),
            "num_filtered": sum(part.facts.num_filtered for part in parts),
            "num_bad": sum(part.facts.num_bad for part in parts),
            "num_duplicates": num_duplicates,
            "bad": bad,
            "engine": ", ".join(sorted({part.facts.engine for part in parts})),
            "shuffle_seed": merge.shuffle_seed,
            "valid_fraction": merge.valid_fraction,
            "job": job.identity,
        }
        return tuple(
            side.writer.finish(
                sources,
                {
                    **facts,
                    **totals,
                    "part": side.name,
                    "text_bytes": side.text_bytes,
                    "longest": side.longest,
                },
            )
            for side in sides
        )


def _parts_in_order(job: Job) -> tuple[_Part, ...]:
    parts: list[_Part] = []
    num_before = 0
    for unit in job.units:
        path = job.part(unit)
        facts = read_facts(path)
        if facts is None:
            raise _damaged(path)
        if unit.start == 0:
            num_before = 0
        parts.append(_Part(path, unit, facts, num_before))
        num_before += facts.num_records
    return tuple(parts)


def _deal(
    parts: Sequence[_Part],
    sides: Sequence[_Side],
    *,
    job: Job,
    merge: Merge,
    on_progress: Callable[[int], None],
) -> int:
    """Give every document to its side; returns how many duplicates were dropped."""
    num_documents = sum(part.facts.documents for part in parts)
    duplicates, num_duplicates = None, 0
    if merge.dedup:
        duplicates = Duplicates(job.folder / "merge" / "dedup", num_documents)
        num_duplicates = duplicates.find(_keys(parts, merge.dtype))
    number = 0
    for done, part in enumerate(parts, 1):
        for frame in _frames(part, merge.dtype):
            kept = np.ones(frame.num_documents, dtype=np.bool_)
            if duplicates is not None:
                kept = duplicates.is_kept(number, frame.num_documents)
            number += frame.num_documents
            which = _which_side(frame, merge.valid_fraction)
            for i, side in enumerate(sides):
                chosen = frame.select(kept & (which == i))
                if chosen.num_documents:
                    side.add(chosen)
        on_progress(done)
    return num_duplicates


def _which_side(frame: Frame, valid_fraction: float | None) -> NDArray[np.intp]:
    """0, or 1 for documents held out: a function of their text alone, so that equal texts stay together."""
    if valid_fraction is None or frame.keys is None:
        return np.zeros(frame.num_documents, dtype=np.intp)
    return (frame.keys[:, 0] < valid_fraction * 2.0**64).astype(np.intp)


class _HashedFile:
    """A file that is read once from start to end and hashed on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.name = file.name
        self.hash = blake3()
        self._file = file

    def read(self, size: int, /) -> bytes:
        content = self._file.read(size)
        self.hash.update(content)
        return content

    def tell(self) -> int:
        return self._file.tell()


def _frames(part: _Part, dtype: np.dtype[np.generic]) -> Iterator[Frame]:
    """The documents of a part with sources as the files count them; damage is told at its end at the latest."""
    with open(part.path, "rb") as file:
        hashed = _HashedFile(file)
        try:
            for frame in read_frames(hashed, dtype, stop=part.facts.frames_size):
                yield replace(frame, sources=_absolute(frame.sources, part))
        except DataError as error:
            raise _damaged(part.path) from error
        remaining = part.facts.bad_size
        while remaining and (content := hashed.read(min(IO_BYTES, remaining))):
            remaining -= len(content)
        if hashed.hash.hexdigest() != part.facts.content_hash:
            raise _damaged(part.path)


def _absolute(sources: NDArray[np.void], part: _Part) -> NDArray[np.void]:
    """Records counted from 1 in their file instead of from 0 in their unit."""
    absolute = sources.copy()
    if part.unit.num_files > 1:  # a record is a file
        absolute["file"] += sources["record"]
        absolute["record"] = 1
    else:
        absolute["record"] += part.num_before + 1
    return absolute


def _keys(parts: Sequence[_Part], dtype: np.dtype[np.generic]) -> Iterator[NDArray[np.uint64]]:
    for part in parts:
        with open(part.path, "rb") as file:
            yield from read_keys(file, dtype, stop=part.facts.frames_size)


def _shuffle(folder: Path, merge: Merge, *, total_bytes: int) -> Shuffle | None:
    if merge.shuffle_seed is None:
        return None
    return Shuffle(folder, merge.shuffle_seed, dtype=merge.dtype, total_bytes=total_bytes)


def _check_not_empty(side: _Side, parts: Sequence[_Part], merge: Merge) -> None:
    if side.writer.num_documents:
        return
    if side.name == "all":
        facts = [part.facts for part in parts]
        raise DataError(
            "no document has any text",
            found=f"{sum(f.num_empty for f in facts)} empty, {sum(f.num_filtered for f in facts)} filtered,"
            f" {sum(f.num_bad for f in facts)} unreadable documents",
            allowed="1 or more with text",
        )
    raise DataError(
        f"the {side.name} part of the split has no documents",
        found=f"--valid-fraction {merge.valid_fraction}",
        allowed="a fraction that leaves documents on both sides",
        do="choose another fraction; documents are dealt by a hash of their text",
    )


def _report_bad(job: Job, parts: Sequence[_Part]) -> tuple[str, ...]:
    """Write PREFIX.bad.jsonl where there is a bad record; returns the first in words."""
    path = Path(f"{job.prefix}.bad.jsonl")
    if not any(part.facts.num_bad for part in parts):
        path.unlink(missing_ok=True)
        return ()
    named: list[str] = []
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for part in parts:
            for bad in read_bad(part.path, part.facts) if part.facts.num_bad else ():
                file.write(json.dumps(_bad_line(job.inputs, bad, part)).encode() + b"\n")
                if len(named) < NUM_NAMED_BAD:
                    named.append(f"{place_of(job.inputs, bad, num_before=part.num_before)}: {bad.why}")
        sync_file(file)
    os.replace(temporary, path)
    return tuple(named)


def _bad_line(inputs: Inputs, bad: BadRecord, part: _Part) -> dict[str, Any]:
    is_text = inputs.kinds[bad.file].format == "text"
    return {
        "file": str(inputs.files[bad.file]),
        "record": 1 if is_text else part.num_before + bad.record + 1,
        "offset": bad.offset,
        "why": bad.why,
        "head": bad.head.decode("utf-8", "backslashreplace"),
    }


def _sources(job: Job, parts: Sequence[_Part]) -> tuple[Source, ...]:
    """All input files with their hashes; a file without a byte has no unit."""
    hashes: dict[int, str] = {}
    for part in parts:
        hashes.update(enumerate(part.facts.source_hashes, part.unit.file))
    return tuple(
        Source(str(file), size, hashes[i] if i in hashes else "" if file == STDIN else hash_file(file))
        for i, (file, size) in enumerate(zip(job.inputs.files, job.inputs.sizes, strict=True))
    )


def _damaged(path: Path) -> DataError:
    """A part that is not whole is removed, so that it is made again."""
    was_there = path.is_file()
    path.unlink(missing_ok=True)
    return DataError(
        f"{path}: {'damaged, and removed' if was_there else 'gone'}",
        allowed="the bytes that were written",
        do="run the same command again: it makes this part again and keeps the others",
    )
