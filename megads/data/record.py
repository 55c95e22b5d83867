"""What readers hand to the tool: parts of inputs, documents, bad records, and what is wanted of a record.

Values alone live here. Finding files, cutting them into units and choosing a reader lives in source, reading in
json_line, parquet and source, templates in chat.

    Inputs.files --plan_units--> Unit ... Unit --read_unit--> Documents, Documents, ...     (of each unit, in order)

    texts       | prefix | content | suffix+between+prefix | content | suffix+end |  texts of a chat document
    is_template |   1    |    0    |           1           |    0    |     1      |  special tokens are parsed
    is_counted  |   0    |    0    |           0           |    1    |     1      |  its tokens count in the loss
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from megads.errors import DataError

if TYPE_CHECKING:
    import pyarrow

Format = Literal["jsonl", "parquet", "text"]
FORMATS: tuple[Format, ...] = ("jsonl", "parquet", "text")
Compression = Literal["gzip", "zstd"]

STDIN = Path("-")
"""The name of standard input among the input files; its size is unknown and given as 0."""
MAX_DOCUMENT_BYTES = 8 << 20
"""Tokenizers need about 120 bytes of memory for each byte of a document that they see at once."""
MAX_MAX_DOCUMENT_BYTES = 1 << 30
BLOCK_BYTES = 4 << 20
HEAD_BYTES = 80
"""Bytes of a bad record that are kept for its message."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How a file is read."""

    format: Format
    compression: Compression | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Input files in reading order."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Bytes of each file as it lies on disk."""
    kinds: tuple[Kind, ...]
    left_out: Mapping[str, int]
    """Files inside folders that are of no known kind: suffix -> how many."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of the inputs that is read on its own."""

    file: int
    """Index into `Inputs.files`."""
    start: int
    stop: int
    """Lines: the records whose first byte is in [start, stop). Parquet: row groups. All else: 0 and 1, the whole."""
    size: int
    """Bytes of the inputs, for progress and for dealing units out; 0 for standard input."""
    num_files: int = 1
    """Above 1 for small text files: record i of the unit is the whole of file `file + i`."""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that holds no usable document."""

    file: int
    """Index into `Inputs.files`."""
    record: int
    """Line or row within the unit, from 0."""
    offset: int | None
    """Its first byte in the file, in an archive of the uncompressed content; None for rows of Parquet."""
    why: str
    head: bytes
    """Its first 80 bytes."""
    is_fatal: bool = False
    """Nothing after it in this unit can be read: a damaged archive or row group."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Consecutive good documents of a unit, in order, and the bad records met since the batch before."""

    texts: pyarrow.LargeStringArray
    """[num_texts] valid UTF-8 without nulls. A plain document is one text, a chat document several."""
    num_texts: NDArray[np.int64] | None
    """[num_documents] texts of each document; None: one each."""
    is_counted: NDArray[np.bool_] | None
    """[num_texts] do its tokens count in the loss; None: all do. An end-of-document token counts as the last text
    of its document does."""
    is_template: NDArray[np.bool_] | None
    """[num_texts] was it written by the template, whose special tokens are parsed; None: no text was."""
    records: NDArray[np.int64]
    """[num_documents] line or row of each document within the unit, from 0."""
    bad: tuple[BadRecord, ...]
    num_filtered: int
    """Documents left out for their length."""
    read_bytes: int
    """Bytes of this unit consumed so far, of `Unit.size`."""
    num_records: int
    """Records of this unit consumed so far: good, bad, filtered and blank ones."""


@dataclass(frozen=True, slots=True)
class Role:
    """How the messages of one role are written: prefix, content, suffix."""

    name: str
    prefix: str
    suffix: str
    is_counted: bool
    """Whether content and suffix count in the loss; the prefix never does."""
    aliases: tuple[str, ...] = ()
    """Other names of the role in data, such as `human` or `gpt`."""


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation becomes text: begin, messages with `between` between them, end."""

    name: str
    """A built-in name or the path of a file."""
    roles: tuple[Role, ...]
    begin: str = ""
    between: str = ""
    end: str = ""
    fingerprint: str = ""
    """BLAKE3 of all of the above but the name, 64 hex digits."""


@dataclass(frozen=True, slots=True)
class RecordOptions:
    """What is wanted of a record."""

    key: str = "text"
    """JSON key or Parquet column of the text. A dot steps into an object, `\\.` is a dot."""
    columns: tuple[str, ...] = ()
    """Several keys whose texts, joined by `separator`, are the document; then `key` is not read."""
    separator: str = "\n\n"
    template: Template | None = None
    """Chat data: the conversation under `messages_key` becomes a document by this template."""
    messages_key: str = "messages"
    role_key: str = "role"
    content_key: str = "content"
    min_bytes: int = 0
    """Documents with fewer bytes of text are filtered: left out and counted."""
    max_bytes: int | None = None
    """Documents with more bytes of text are filtered."""
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """A line or document above this is a bad record: the bound of memory."""
    block_bytes: int = BLOCK_BYTES
    """About as many bytes of input make one `Documents`."""

    def __post_init__(self) -> None:
        names = self.columns or (self.key,)
        if "" in names or len(set(names)) < len(names):
            raise DataError(
                "--key, --columns: names must be different and not empty", found=", ".join(map(repr, names))
            )
        paths = self.paths
        if any(a != b and b[: len(a)] == a for a in paths for b in paths):
            raise DataError("--columns: one column lies inside another", found=", ".join(names))
        if self.columns and self.template:
            raise DataError(
                "--columns and a chat template exclude each other",
                found=", ".join(self.columns),
                do="leave one of them out",
            )
        if not 1 <= self.max_document_bytes <= MAX_MAX_DOCUMENT_BYTES:
            raise DataError(
                "--max-document-bytes: out of range",
                found=self.max_document_bytes,
                allowed=f"1..{MAX_MAX_DOCUMENT_BYTES}",
            )
        if self.min_bytes < 0 or (self.max_bytes is not None and self.max_bytes < self.min_bytes):
            raise DataError(
                "--min-bytes, --max-bytes: no document can pass",
                found=f"{self.min_bytes}..{self.max_bytes}",
                allowed="0 <= min <= max",
            )

    @property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The names to go down for each text of a document; of chat data, for the conversation."""
        names = (self.messages_key,) if self.template else self.columns or (self.key,)
        return tuple(
            tuple(part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", name)) for name in names
        )
