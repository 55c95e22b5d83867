"""A job: one corpus to be made of units, by one process or many, with stops in between.

Lives here: what makes two runs the same job, the folder of finished parts, who makes which, and going on after a stop.
Does not live here: one part (part), parts to a corpus (merge).

    PREFIX.parts/job.json      the options that the parts were made with
                 3f...9a.part  tokens of one unit; its name is a hash of all that decides its bytes
                 merge.lock    held by the process that merges

A part is found again by its name: after a kill, and after an input was repaired, only what is missing is made. Other
options would leave every part unused, so they are an error that names the difference.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from megads.data.encode import Encoder
from megads.data.part import UnitReader, make_part, own_temporary, read_facts
from megads.data.record import STDIN, Inputs, RecordOptions, Unit
from megads.errors import DataError

FORMAT = "megads-parts-1"
WORKERS_PER_UNIT = 4
"""Threads that one reader keeps busy; with more, several units are read at once."""
OUTPUT_SUFFIXES = (".bin", ".idx", ".json", ".src", ".mask", ".bad.jsonl")
NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))


class StoppedError(Exception):
    """Another unit failed or the user stopped the tool."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be made."""

    prefix: str
    inputs: Inputs
    modified: tuple[int, ...]
    """Modification time of each input file, ns; 0 for standard input."""
    units: tuple[Unit, ...]
    options: Mapping[str, Any]
    """All that decides the bytes of a part beside the inputs, as JSON values."""
    merge_options: Mapping[str, Any]
    """What decides the bytes of the corpus beside the parts."""
    options_hash: str
    """BLAKE3 of the options; where an input is standard input of this process too, as nobody can go on with it."""

    @property
    def folder(self) -> Path:
        """Where finished parts are."""
        return Path(f"{self.prefix}.parts")

    @property
    def identity(self) -> str:
        """BLAKE3 of options, names and sizes of the inputs: when nothing was changed since, of the corpus itself."""
        files = [str(file) for file in self.inputs.files]
        kinds = [(kind.format, kind.compression) for kind in self.inputs.kinds]
        return _hash([self.options_hash, dict(self.merge_options), files, kinds, self.inputs.sizes])

    def is_changed_since(self, time_ns: int) -> bool:
        """Whether an input was written to or replaced after a time (ns since 1970), or is standard input."""
        return any(file == STDIN or file.stat().st_ctime_ns >= time_ns for file in self.inputs.files)

    def part(self, unit: Unit) -> Path:
        """The file of a unit's part."""
        files = range(unit.file, unit.file + unit.num_files)
        kind = self.inputs.kinds[unit.file]
        identity = (
            self.options_hash,
            [(str(self.inputs.files[i]), self.inputs.sizes[i], self.modified[i]) for i in files],
            (kind.format, kind.compression, unit.start, unit.stop),
        )
        return self.folder / f"{_hash(identity)[:32]}.part"

    def is_done(self, unit: Unit) -> bool:
        """Whether the part of a unit is there, and whole as far as its end tells."""
        return read_facts(self.part(unit)) is not None

    def missing(self) -> tuple[Unit, ...]:
        """Units whose part is not there."""
        return tuple(unit for unit in self.units if not self.is_done(unit))


def plan_job(
    prefix: str,
    inputs: Inputs,
    *,
    units: Sequence[Unit],
    options: Mapping[str, Any],
    merge_options: Mapping[str, Any],
) -> Job:
    """The job of these inputs, as they are now, and options."""
    nonce = os.urandom(8).hex() if STDIN in inputs.files else ""
    return Job(
        prefix,
        inputs,
        modified=tuple(0 if file == STDIN else file.stat().st_mtime_ns for file in inputs.files),
        units=tuple(units),
        options=options,
        merge_options=merge_options,
        options_hash=_hash([FORMAT, nonce, dict(options)]),
    )


def check_output(prefixes: Sequence[str], read: Iterable[str | Path]) -> None:
    """Refuse a PREFIX without a name, and one whose files would take the place of a file that is read or foreign.

    Args:
        read: inputs and tokenizer.
    """
    for prefix in prefixes:
        if os.path.basename(prefix) in ("", ".", ".."):
            raise DataError(
                f"--output-prefix {prefix}: has no name",
                allowed="a path whose last part begins the names of the corpus' files, e.g. data/train",
            )
        if os.path.exists(f"{prefix}.json") and not os.path.exists(f"{prefix}.src"):
            raise DataError(
                f"--output-prefix {prefix}: the corpus would take the place of {prefix}.json, which is of no corpus",
                allowed="a prefix without files, or that of a corpus with its .src",
                do="choose another prefix, or move that file",
            )
    written = {os.path.abspath(prefix + end) for prefix in prefixes for end in OUTPUT_SUFFIXES}
    for path in read:
        if os.path.abspath(path) in written:
            raise DataError(
                f"--output-prefix {prefixes[0]}: the corpus would take the place of {path}, which is read",
                do="choose another prefix",
            )


def open_folder(job: Job, *, is_shared: bool = False) -> int:
    """Make the folder of parts, or enter the one of an earlier run; returns how many parts it has of this job.

    Args:
        is_shared: by tasks of which any may merge, so that all must want the same corpus.

    Raises:
        DataError: parts are there that were made with other options, or the folder cannot be made.
    """
    described = job.folder / "job.json"
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--output-prefix {job.prefix}: cannot be written",
            found=f"{error.filename}: {error.strerror}",
            allowed="a folder with write permission, and a name in it",
        ) from error
    if described.is_file() and any(job.folder.glob("*.part")):
        _check_options(job, described, is_shared=is_shared)
    temporary = own_temporary(described)
    content = {"format": FORMAT, "options": dict(job.options), "merge_options": dict(job.merge_options)}
    temporary.write_text(json.dumps(content, indent=2))
    os.replace(temporary, described)
    return len(job.units) - len(job.missing())


def remove_folder(job: Job) -> None:
    """Remove all parts."""
    shutil.rmtree(job.folder, ignore_errors=True)


@contextmanager
def merge_lock(job: Job) -> Iterator[bool]:
    """Hold the lock of the one that merges; gives False where another process has it, or has merged already.

    The system lets go of it when the process ends, however that happens.
    """
    try:
        handle = os.open(job.folder / "merge.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _is_locked(handle)
    finally:
        os.close(handle)


def deal_units(units: Sequence[Unit], *, shard: int, num_shards: int) -> tuple[Unit, ...]:
    """The units of shard `shard` of `num_shards`: together they make each once, with about equal bytes."""
    shards = [(0, number) for number in range(num_shards)]
    mine = []
    for i in sorted(range(len(units)), key=lambda i: (-units[i].size, i)):
        size, number = heapq.heappop(shards)
        heapq.heappush(shards, (size + units[i].size, number))
        if number == shard:
            mine.append(i)
    return tuple(units[i] for i in sorted(mine))


def make_parts(
    job: Job,
    units: Sequence[Unit],
    *,
    reader: UnitReader,
    encoder: Encoder,
    workers: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Make the parts of `units`, with `workers` threads that encode.

    Args:
        on_progress: called with bytes read and tokens made since the call before.

    Raises:
        DataError: of the first unit in order that fails; what was committed before stays.
    """
    num_readers = -(-workers // WORKERS_PER_UNIT)
    window = 2 * -(-workers // num_readers)
    stop = threading.Event()
    guard = threading.Lock()

    def progress(read_bytes: int, num_tokens: int) -> None:
        if stop.is_set():
            raise StoppedError
        with guard:
            on_progress(read_bytes, num_tokens)

    def make(unit: Unit) -> None:
        if not stop.is_set():
            make_part(
                job.part(unit),
                unit,
                reader=reader,
                encoder=encoder,
                pool=pool,
                window=window,
                on_progress=progress,
            )

    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(num_readers) as readers:
        futures: list[Future[None]] = [readers.submit(make, unit) for unit in units]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()


def _is_locked(handle: int) -> bool:
    """Take the lock of a file; False where another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print("this file system has no locks: see to it that one process merges", file=sys.stderr)
    return True


def _check_options(job: Job, described: Path, *, is_shared: bool) -> None:
    """Refuse to mix parts of different options, and tasks that want different corpora."""
    kinds = ("options", "merge_options") if is_shared else ("options",)
    try:
        content = json.loads(described.read_bytes())
        earlier = {name: value for kind in kinds for name, value in content[kind].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(
            f"{described}: not readable", found=error, do=f"remove {job.folder} to start from the beginning"
        ) from error
    now = json.loads(json.dumps({**job.options, **(job.merge_options if is_shared else {})}))
    different = [name for name in sorted(now.keys() | earlier.keys()) if now.get(name) != earlier.get(name)]
    if different:
        raise DataError(
            f"{job.folder}: finished parts of a run with other options are there",
            found=", ".join(f"{name} {earlier.get(name)!r}" for name in different),
            allowed=", ".join(f"{name} {now.get(name)!r}" for name in different) + " (this command)",
            do=f"give the options of that run to go on with it, or remove {job.folder} to start from the beginning",
        )


def _hash(value: object) -> str:
    return blake3(json.dumps(value, sort_keys=True).encode()).hexdigest()


def options_of(records: RecordOptions, **others: Any) -> dict[str, Any]:
    """The options that decide the bytes of parts, as JSON values."""
    fields = asdict(records)
    fields.pop("block_bytes")
    template = records.template
    fields["template"] = None if template is None else template.fingerprint
    return {**fields, **others}
