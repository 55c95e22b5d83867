"""Input files: found in a fixed order, each of a known kind.

Lives here: files, folders, globs and standard input to `Inputs`. Does not live here: what is in them (unit).

    .jsonl .json     one JSON object a line; blank lines are ignored
    .parquet         one row a document
    anything else    one document a file, UTF-8. In folders only the suffixes of `TEXT_SUFFIXES`
    .gz .zst         any of these but Parquet, compressed: `.jsonl.gz`, `.py.zst`; alone, JSON lines
    -                standard input, JSON lines where nothing else is declared

Folders are read recursively in sorted order; hidden files and folders, links to folders, `__pycache__` and
files of other kinds are left out (`Inputs.left_out` counts them). Globs (`data/**/*.jsonl`) are sorted too.
"""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megads.data.record import STDIN, Compression, Format, Inputs, Kind
from megads.errors import DataError

MAX_DOCUMENT_BYTES = 8 << 20
"""Tokenizers need about 120 bytes of memory for each byte of a document that they see at once."""
READ_ROWS = 256
"""Rows of a Parquet file that are decoded at once."""
# fmt: off
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".yaml", ".yml", ".toml",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".ts", ".go", ".rs",
    ".rb", ".php", ".pl", ".sh", ".sql", ".r", ".jl", ".lua", ".scala", ".kt", ".swift", ".hs", ".ml",
))
# fmt: on
JSON_SUFFIXES = frozenset((".jsonl", ".json"))
PARQUET_SUFFIXES = frozenset((".parquet",))
COMPRESSIONS: Mapping[str, Compression] = MappingProxyType({".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"})
ALLOWED = (
    "JSON lines (.jsonl, .json), Parquet, text and source files, .gz and .zst of them, folders, globs, or -"
)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it stood."""

    text: str
    file: int
    """Index into `Inputs.files`."""
    record: int
    read_bytes: int
    """Bytes of the inputs consumed up to and including this document; for progress."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that holds no usable text."""

    file: int
    record: int
    why: str
    head: bytes
    """The first 80 bytes of the record."""


def find_inputs(paths: Sequence[str | Path], *, input_format: Format | None = None) -> Inputs:
    """All input files behind `paths`, those of each path in sorted order.

    Args:
        paths: files, folders, globs, or `-` for standard input (once).
        input_format: what all files hold, whatever their suffix; compression is still told by it.

    Raises:
        DataError: a path does not exist, cannot be read or is of no known kind, or there is no input file at all.
    """
    files: list[Path] = []
    kinds: list[Kind] = []
    left_out: Counter[str] = Counter()
    for file, is_named in _files(paths):
        kind = _kind(file, input_format, is_named=is_named)
        if kind is None:
            left_out[file.suffix.lower() or "(no suffix)"] += 1
        else:
            files.append(file)
            kinds.append(kind)
    if not files:
        raise DataError(
            "--input: no input files found",
            found=", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(5))
            or "empty folders",
            allowed=ALLOWED,
            do="say what they hold with --input-format" if left_out else None,
        )
    if files.count(STDIN) > 1:
        raise DataError("--input -: standard input can be read once", found=f"{files.count(STDIN)} times")
    sizes = tuple(0 if file == STDIN else file.stat().st_size for file in files)
    return Inputs(tuple(files), sizes, tuple(kinds), dict(left_out))


def _files(paths: Sequence[str | Path]) -> Iterator[tuple[Path, bool]]:
    """(file, whether the user named it) for each file behind `paths`."""
    for path in map(Path, paths):
        is_glob = not path.exists() and path != STDIN and glob.has_magic(str(path))
        found = map(Path, sorted(glob.glob(str(path), recursive=True))) if is_glob else (path,)
        num_files = 0
        for file in found:
            if file.is_dir():
                yield from ((inside, False) for inside in _walk(file))
            elif file == STDIN or file.is_file():
                yield file, not is_glob
            elif not is_glob:
                raise DataError(f"--input {path}: no such file or folder", allowed=ALLOWED)
            num_files += 1
        if not num_files:
            raise DataError(f"--input {path}: the pattern matches no file", allowed=ALLOWED)


def _kind(file: Path, input_format: Format | None, *, is_named: bool) -> Kind | None:
    """How a file is read; None leaves it out."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    inner = Path(file.stem).suffix.lower() if compression else file.suffix.lower()
    if input_format is not None:
        found: Format | None = input_format
    elif inner in JSON_SUFFIXES or file == STDIN or (compression and not inner):
        found = "jsonl"
    elif inner in PARQUET_SUFFIXES:
        found = "parquet"
    else:
        found = "text" if inner in TEXT_SUFFIXES or (is_named and not compression) else None
    if found == "parquet" and (compression or file == STDIN):
        raise DataError(
            f"--input {file}: Parquet is read from uncompressed files only",
            allowed="files of Parquet, which compresses its own pages",
            do="unpack it",
        )
    if found is None and is_named:
        raise DataError(
            f"--input {file}: what the compressed file holds cannot be told from its name",
            found=inner,
            allowed=ALLOWED,
            do="say what it holds with --input-format",
        )
    return None if found is None else Kind(found, compression)


def read_documents(inputs: Inputs, key: str) -> Iterator[Document | BadRecord]:
    """Every record of every file, in order.

    Raises:
        DataError: a file cannot be read at all (gone, no permission, not Parquet, no column `key`).
    """
    done = 0
    for number, (file, size) in enumerate(zip(inputs.files, inputs.sizes, strict=True)):
        try:
            if file.suffix.lower() in JSON_SUFFIXES:
                yield from _read_json_lines(file, number, key, done)
            elif file.suffix.lower() in PARQUET_SUFFIXES:
                yield from _read_parquet(file, number, key, done, size)
            else:
                yield _read_text(file, number, done)
        except OSError as error:
            raise DataError(f"{file}: cannot be read", found=error.strerror or error) from error
        done += size


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (
            Path(where, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(where, name).is_file()
        )


def _read_text(path: Path, number: int, done: int) -> Document | BadRecord:
    with open(path, "rb") as file:
        content = file.read(MAX_DOCUMENT_BYTES + 1)
    text = _decoded(content)
    if text is None or "\0" in text:
        return BadRecord(number, 1, "not UTF-8 text", content[:80])
    if len(content) > MAX_DOCUMENT_BYTES:
        return BadRecord(
            number, 1, f"larger than {MAX_DOCUMENT_BYTES} bytes: cut it into documents", content[:80]
        )
    return Document(text, number, 1, done + len(content))


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        # a document cut at the size limit may end inside a character: a matter of size, not of encoding
        cut = len(content) > MAX_DOCUMENT_BYTES and error.start > len(content) - 4
        return content[: error.start].decode("utf-8") if cut else None


def _read_json_lines(path: Path, number: int, key: str, done: int) -> Iterator[Document | BadRecord]:
    with open(path, "rb") as file:
        record = 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            record += 1
            head = line[:80]
            if len(line) > MAX_DOCUMENT_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield BadRecord(number, record, f"a line of more than {MAX_DOCUMENT_BYTES} bytes", head)
                continue
            if record == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.isspace():
                continue
            text, why = _json_text(line, key)
            if text is None:
                yield BadRecord(number, record, why, head)
            else:
                yield Document(text, number, record, done + file.tell())


def _json_text(line: bytes, key: str) -> tuple[str | None, str]:
    """The text of a line, or None and why there is none."""
    try:
        value = json.loads(line.decode("utf-8"))  # bytes would be guessed to be UTF-16 or UTF-32
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return None, f"JSON beyond any limit ({error})"
    if not isinstance(value, dict):
        return None, f"a JSON {type(value).__name__}, not an object"
    if key not in value:
        return None, f"no key {key!r} (keys: {', '.join(map(repr, list(value)[:8]))})"
    return _checked_text(value[key], f"the value of {key!r}")


def _checked_text(value: object, what: str) -> tuple[str | None, str]:
    if not isinstance(value, str):
        return None, f"{what} is {'null' if value is None else type(value).__name__}, not text"
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        return None, f"{what} holds half of a surrogate pair"
    if size > MAX_DOCUMENT_BYTES:
        return None, f"{what} is larger than {MAX_DOCUMENT_BYTES} bytes: cut it into documents"
    return value, ""


def _read_parquet(path: Path, number: int, key: str, done: int, size: int) -> Iterator[Document | BadRecord]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise DataError(f"{path}: no column {key!r}", found=", ".join(names), allowed="--key COLUMN")
            num_rows = max(1, file.metadata.num_rows)
            record = 0
            for batch in file.iter_batches(batch_size=READ_ROWS, columns=[key]):
                for value in batch.column(0).to_pylist():
                    record += 1
                    text, why = _checked_text(value, f"column {key!r}")
                    if text is None:
                        yield BadRecord(number, record, why, str(value)[:80].encode("utf-8", "replace")[:80])
                    else:
                        yield Document(text, number, record, done + size * record // num_rows)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file", found=error) from error
