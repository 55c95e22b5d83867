"""Parts: the finished tokens of one unit, in a file that is whole or isn't there.

Lives here: the file, and making it from a unit. Does not live here: which parts there are to be (job), putting them
together (merge).

    frames        documents (frame)
    bad records   one JSON object a line
    facts         JSON: what was counted, `frames_size`, and BLAKE3 of all bytes before
    40 bytes      length of the facts u64, BLAKE3 of the facts

A part is written under a temporary name and gets its own by rename: a killed process leaves none behind that is half.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3

from megads.data.encode import EncodedBatch, Encoder, WrongIdsError
from megads.data.frame import write_frame
from megads.data.record import STDIN, BadRecord, Inputs, RecordOptions, Unit
from megads.data.unit import count_records_before, place_of, read_unit
from megads.errors import DataError

TAIL = struct.Struct("<Q32s")
IO_BYTES = 1 << 20
SPOOL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PartFacts:
    """What is known of a finished part."""

    engine: str
    documents: int
    tokens: int
    text_bytes: int
    longest: int
    """Tokens of the longest document."""
    num_records: int
    num_empty: int
    num_filtered: int
    num_bad: int
    source_hashes: tuple[str, ...]
    """BLAKE3 of the files that this unit is the first of, in order; empty for standard input."""
    frames_size: int
    """Bytes of the frames, which come first."""
    bad_size: int
    """Bytes of the bad records, which follow."""
    content_hash: str
    """BLAKE3 of all that stands before the facts."""


@dataclass(frozen=True, slots=True)
class UnitReader:
    """What making parts needs of the inputs."""

    inputs: Inputs
    options: RecordOptions
    modified: tuple[int, ...]
    """Modification time of each file in ns when the job began; 0 for standard input."""
    skip_bad: bool

    def check_unchanged(self, unit: Unit) -> None:
        """Refuse files that were changed since the job began."""
        for file in range(unit.file, unit.file + unit.num_files):
            path = self.inputs.files[file]
            if path == STDIN:
                continue
            now = path.stat()
            if (now.st_size, now.st_mtime_ns) != (self.inputs.sizes[file], self.modified[file]):
                raise DataError(
                    f"{path}: the file was changed while the corpus was made",
                    found=f"{now.st_size} bytes",
                    allowed=f"{self.inputs.sizes[file]} bytes, unmodified",
                    do="run the same command again when nothing writes to the inputs",
                )


class PartWriter:
    """Write a part; as a context manager, what is not committed is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = own_temporary(path)
        self._hash = blake3()
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 - closed by commit or exit
        self._bad = SpooledTemporaryFile(SPOOL_BYTES, dir=str(path.parent))  # noqa: SIM115 - may be every line of a file
        self._facts = PartFacts("", 0, 0, 0, 0, 0, 0, 0, 0, (), 0, 0, "")

    def write(self, content: bytes | memoryview, /) -> int:
        """Append bytes of a frame."""
        self._hash.update(content)
        return self._file.write(content)

    def add(self, batch: EncodedBatch) -> None:
        """Append a batch."""
        frame, facts = batch.frame, self._facts
        if frame.num_documents:
            write_frame(self, frame)
        self._facts = replace(
            facts,
            documents=facts.documents + frame.num_documents,
            tokens=facts.tokens + frame.ids.size,
            text_bytes=facts.text_bytes + int(frame.sizes.sum(dtype=np.int64)),
            longest=max(facts.longest, int(frame.lengths.max(initial=0))),
            num_records=batch.num_records,
            num_empty=facts.num_empty + batch.num_empty,
            num_filtered=facts.num_filtered + batch.num_filtered,
            num_bad=facts.num_bad + len(batch.bad),
        )
        self._bad.writelines(map(_bad_line, batch.bad))

    def commit(self, *, engine: str, source_hashes: tuple[str, ...]) -> None:
        """Complete the part and give it its name."""
        frames_size = self._file.tell()
        self._bad.seek(0)
        shutil.copyfileobj(self._bad, self, IO_BYTES)
        facts = replace(
            self._facts,
            engine=engine,
            source_hashes=source_hashes,
            frames_size=frames_size,
            bad_size=self._file.tell() - frames_size,
            content_hash=self._hash.hexdigest(),
        )
        content = json.dumps(asdict(facts)).encode()
        self._file.write(content + TAIL.pack(len(content), blake3(content).digest()))
        self._file.close()
        os.replace(self._temporary, self._path)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._bad.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def read_facts(path: Path) -> PartFacts | None:
    """The facts of a part; None: it isn't there, or its end is damaged."""
    try:
        with open(path, "rb") as file:
            file.seek(-TAIL.size, os.SEEK_END)
            size, digest = TAIL.unpack(file.read(TAIL.size))
            file.seek(-TAIL.size - size, os.SEEK_END)
            content = file.read(size)
    except (OSError, struct.error, ValueError):
        return None
    if blake3(content).digest() != digest:
        return None
    fields: dict[str, Any] = json.loads(content)
    return PartFacts(**{**fields, "source_hashes": tuple(fields["source_hashes"])})


def read_bad(path: Path, facts: PartFacts) -> Iterator[BadRecord]:
    """The bad records of a part, in order."""
    with open(path, "rb") as file:
        file.seek(facts.frames_size)
        for _ in range(facts.num_bad):
            fields = json.loads(file.readline())
            yield BadRecord(**{**fields, "head": fields["head"].encode("latin-1")})


def make_part(
    path: Path,
    unit: Unit,
    *,
    reader: UnitReader,
    encoder: Encoder,
    pool: Executor,
    window: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Read and encode a unit and commit its part; at most `window` batches are under way.

    Args:
        on_progress: called with bytes read and tokens made since the call before; may raise to stop.

    Raises:
        DataError: a bad record that is not to be skipped, a file that cannot be read or was changed, or ids that the
            reference engine does not confirm.
    """
    read_bytes = 0
    with PartWriter(path) as writer:
        try:
            for batch in _encoded(unit, reader=reader, encoder=encoder, pool=pool, window=window):
                if batch.bad and not reader.skip_bad:
                    raise refused(batch.bad[0], unit, inputs=reader.inputs)
                writer.add(batch)
                on_progress(batch.read_bytes - read_bytes, int(batch.frame.ids.size))
                read_bytes = batch.read_bytes
        except WrongIdsError as error:
            raise _distrusted(error.record, unit, reader.inputs, encoder) from error
        reader.check_unchanged(unit)
        hashes = _source_hashes(unit, reader.inputs)
        writer.commit(engine=encoder.choice.engine.name, source_hashes=hashes)
        on_progress(unit.size - read_bytes, 0)


def _encoded(
    unit: Unit, *, reader: UnitReader, encoder: Encoder, pool: Executor, window: int
) -> Iterator[EncodedBatch]:
    """Encoded batches in input order."""
    under_way: deque[Future[EncodedBatch]] = deque()
    try:
        for documents in read_unit(reader.inputs, unit, options=reader.options):
            under_way.append(pool.submit(encoder, unit, documents))
            if len(under_way) >= window:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


def _source_hashes(unit: Unit, inputs: Inputs) -> tuple[str, ...]:
    if unit.start:
        return ()
    files = inputs.files[unit.file : unit.file + unit.num_files]
    return tuple("" if file == STDIN else hash_file(file) for file in files)


def own_temporary(path: Path) -> Path:
    """A temporary name for `path` that no other process uses, on this host or another."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def hash_file(path: Path) -> str:
    """BLAKE3 of a file, 64 hex digits."""
    hasher = blake3()
    with open(path, "rb") as file:
        while content := file.read(IO_BYTES):
            hasher.update(content)
    return hasher.hexdigest()


def _bad_line(bad: BadRecord) -> bytes:
    return json.dumps({**asdict(bad), "head": bad.head.decode("latin-1")}).encode() + b"\n"


def refused(bad: BadRecord, unit: Unit, *, inputs: Inputs) -> DataError:
    """The error for a bad record that is not to be skipped, with its line in the file."""
    place = place_of(inputs, bad, num_before=count_records_before(inputs, unit))
    return DataError(
        f"{place}: {bad.why}",
        found=bad.head or None,
        allowed="one document with text",
        do="repair it, or leave out and count all such records with --on-error skip",
    )


def _distrusted(record: int, unit: Unit, inputs: Inputs, encoder: Encoder) -> DataError:
    number = count_records_before(inputs, unit) + record
    bad = BadRecord(unit.file + (record if unit.num_files > 1 else 0), number, None, "", b"")
    choice = encoder.choice
    return DataError(
        f"{place_of(inputs, bad, num_before=0)}: the engine gives other ids than the reference",
        found=choice.engine.name,
        allowed=f"the ids of {choice.reference.name}",
        do=f"run again with --engine {encoder.tokenizer.library}, and tell the makers of the engine",
    )
