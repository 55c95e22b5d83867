"""Input files: found in a fixed order, each of a known kind.

Lives here: files, folders, globs and standard input to `Inputs`. Does not live here: what is in them (unit).

    .jsonl .json     one JSON object a line; blank lines are ignored
    .parquet         one row a document
    anything else    one document a file, UTF-8. In folders only the suffixes of `TEXT_SUFFIXES`
    .gz .zst         any of these but Parquet, compressed: `.jsonl.gz`, `.py.zst`; alone, JSON lines
    -                standard input, JSON lines where nothing else is declared

Folders are read recursively in sorted order; hidden files and folders, links to folders, `__pycache__` and
files of other kinds are left out (`Inputs.left_out` counts them). Globs (`data/**/*.jsonl`) are sorted too. In both,
files of corpora that stand or are being made there are no inputs, so that a corpus may be made beside its text.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megads.data.record import STDIN, Compression, Format, Inputs, Kind
from megads.errors import DataError

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
CORPUS_FILE = re.compile(r"(.+?)\.(?:bin|idx|src|mask|json|bad\.jsonl|pack-\d+(?:\.json)?)")
ALLOWED = (
    "JSON lines (.jsonl, .json), Parquet, text and source files, .gz and .zst of them, folders, globs, or -"
)


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
        if not is_named and _is_of_corpus(file):
            continue
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
        if not is_named and input_format is None:
            return None
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


def _is_of_corpus(file: Path) -> bool:
    """Whether a file was written by the offline tool, as its name and the files beside it tell."""
    if file.parent.suffix == ".parts" and (file.parent / "job.json").is_file():
        return True
    match = CORPUS_FILE.fullmatch(file.name)
    return match is not None and any(file.with_name(match[1] + end).exists() for end in (".src", ".parts"))


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        yield from (
            Path(where, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(where, name).is_file()
        )
