"""A corpus: PREFIX.bin/.idx, its manifest PREFIX.json, and where each document came from, PREFIX.src.

Lives here: opening and fingerprinting a corpus. Does not live here: the format of .bin/.idx (indexed), writing a
corpus (corpus_writer), the order of training (order, blend), reading documents (unit).

    PREFIX.bin .idx   Megatron's format; enough by themselves: a corpus without manifest is legal
    PREFIX.mask       chat data: one uint8 a token, 1 where it counts in the loss as a label
    PREFIX.json       counts, text bytes, tokenizer, engine, options, sources, hashes, fingerprint
    PREFIX.src        0   magic b"MGDSSRC1"
                      8   num_documents u64, num_files u64
                      24  num_documents x (file u64, record u64)    record: line or row from 1
                          num_files x (length u64, UTF-8 name)
                          num_files x (size u64, BLAKE3 32 bytes)   absent in older files

The fingerprint hashes the sizes and `NUM_SAMPLES` evenly spaced blocks of both files: milliseconds at any
size, the same with and without a manifest. `Corpus.verify` reads every byte.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.fixed_file import FixedFile
from megads.data.indexed import IndexedReader, bin_path, idx_path, mask_path, sync_folder
from megads.errors import DataError

FORMAT = "megads-corpus-2"
READABLE_FORMATS = ("megads-corpus-1", FORMAT)
SOURCE_MAGIC = b"MGDSSRC1"
SOURCE_HEADER = struct.Struct("<8sQQ")
SOURCE_DTYPE = np.dtype([("file", "<u8"), ("record", "<u8")])
NUM_SAMPLES = 128
SAMPLE_SIZE = 4096

logger = logging.getLogger("megads.data")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What PREFIX.json says of a corpus."""

    format: str
    documents: int
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the text of all documents in the corpus."""
    dtype: str
    append_eod: bool
    special_tokens: str
    tokenizer_kind: str
    tokenizer_fingerprint: str
    vocab_size: int
    shuffle_seed: int | None
    part: str
    """`all`, or `train` or `valid` of a corpus that was split."""
    valid_fraction: float | None
    num_inputs: int
    num_empty: int
    """Documents without a token, left out."""
    num_bad: int
    """Records that could not be read, left out (all parts of a split together)."""
    bad: tuple[str, ...]
    """The first of them: file:record and why."""
    hashes: Mapping[str, str]
    """BLAKE3 of the .bin, the .idx and for chat data the .mask."""
    fingerprint: str
    num_filtered: int = 0
    """Documents left out for their length (all parts of a split together)."""
    num_duplicates: int = 0
    """Documents left out because an earlier one had the same text."""
    longest: int = 0
    """Tokens of the longest document."""
    engine: str = ""
    """The library that made the ids, and its version."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """How records were read and what else was asked for."""
    sources: tuple[Mapping[str, Any], ...] = ()
    """Name, size and BLAKE3 of the first input files; those of all are in PREFIX.src."""
    sources_fingerprint: str = ""
    """BLAKE3 of name, size and hash of all input files."""
    job: str = ""
    """Identity of inputs and options: the same command finds its work done."""
    version: str = ""
    """Of megads."""

    @property
    def has_mask(self) -> bool:
        """Whether PREFIX.mask says which tokens count in the loss."""
        return "mask" in self.hashes


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """Where a document came from: record (line or row, from 1) of a file."""

    file: str
    record: int


class Corpus:
    """A tokenized corpus, open for reading.

    Raises:
        DataError: the files are absent, damaged, or not those of the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.tokens = IndexedReader(path)
        self.fingerprint = fingerprint(bin_path(path), idx_path(path))
        self.manifest = self._read_manifest()
        if self.manifest is None:
            logger.info("%s: no manifest (%s.json); identified by size and sampled hashes", path, path)
        self._mask = self._open_mask()

    @property
    def num_tokens(self) -> int:
        """Tokens in the corpus."""
        return self.tokens.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents in the corpus."""
        return self.tokens.num_documents

    @property
    def text_bytes(self) -> int | None:
        """UTF-8 bytes of the text, where a manifest tells."""
        return None if self.manifest is None else self.manifest.text_bytes

    @property
    def has_mask(self) -> bool:
        """Whether the corpus says of each token if it counts in the loss as a label (chat data)."""
        return self._mask is not None

    def read_mask(self, start: int, count: int) -> NDArray[np.uint8]:
        """1 for the tokens of [start, start + count) that count in the loss as labels; all 1 without a mask.

        Raises:
            DataError: the range is not within the corpus, or PREFIX.mask cannot be read.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise DataError(
                f"{mask_path(self.path)}: token range outside the corpus",
                found=f"[{start}, {start + count})",
                allowed=f"[0, {self.num_tokens})",
            )
        if self._mask is None:
            return np.ones(count, dtype=np.uint8)
        return np.frombuffer(self._mask.read(start, count), dtype=np.uint8)

    def num_pages(self, page: int) -> int:
        """Pages of `page` tokens that one epoch holds.

        A page is the inputs [k * page, (k + 1) * page) and their labels, one token further: the last token of
        the corpus is only ever a label, and a tail shorter than a page is not trained on.

        Raises:
            DataError: the corpus is shorter than one page.
        """
        num_pages = (self.num_tokens - 1) // page
        if num_pages < 1:
            raise DataError(
                f"{self.path}: the corpus is shorter than one page",
                found=f"{self.num_tokens} tokens",
                allowed=f"at least {page + 1} (data.page + 1)",
                do="use a shorter data.sequence_length and data.page, or a larger corpus",
            )
        return num_pages

    def source(self, document: int) -> DocumentSource | None:
        """Where document `document` came from; None for a corpus without PREFIX.src."""
        path = Path(f"{self.path}.src")
        return read_source(path, document) if path.is_file() else None

    def verify(self) -> None:
        """Compare every byte of both files with the manifest's hashes. Raises DataError at a difference."""
        if self.manifest is None:
            raise DataError(
                f"{self.path}: there is no manifest to verify against", do="make the corpus again"
            )
        for name in self.manifest.hashes:
            path = Path(f"{self.path}.{name}")
            found = blake3(max_threads=1).update_mmap(path).hexdigest()
            if found != self.manifest.hashes.get(name):
                raise DataError(
                    f"{path}: not the bytes that were written",
                    found=found,
                    allowed=self.manifest.hashes.get(name),
                )

    def check_tokenizer(self, tokenizer_fingerprint: str, *, vocab_size: int) -> None:
        """Refuse a tokenizer that did not make this corpus.

        Raises:
            DataError: the manifest names another tokenizer, or, without a manifest, a token at the head
                of the corpus is outside the vocabulary.
        """
        made_with = self.manifest
        if made_with is not None:
            if made_with.tokenizer_fingerprint != tokenizer_fingerprint:
                raise DataError(
                    f"{self.path}: the corpus was made with another tokenizer",
                    found=f"data.tokenizer {tokenizer_fingerprint[:16]}, vocabulary {vocab_size}",
                    allowed=f"{made_with.tokenizer_fingerprint[:16]}, vocabulary {made_with.vocab_size}",
                    do="set data.tokenizer to the file given to preprocess_data.py, or make the corpus again",
                )
            return
        head = self.tokens.read(0, min(self.num_tokens, 1 << 20))
        check_ids(self, head, vocab_size=vocab_size, start=0)

    def _open_mask(self) -> FixedFile | None:
        """PREFIX.mask where the manifest names it."""
        path = mask_path(self.path)
        if self.manifest is not None and self.manifest.has_mask:
            mask = FixedFile(path)
            if mask.size != self.num_tokens:
                raise DataError(
                    f"{path}: not the mask of the .bin beside it",
                    found=f"{mask.size} bytes",
                    allowed=f"{self.num_tokens}, one a token",
                    do="copy all files of the corpus again, or make it again with tools/preprocess_data.py",
                )
            return mask
        if path.exists():
            raise DataError(
                f"{path}: a loss mask that no manifest names",
                found="no manifest" if self.manifest is None else f"{self.path}.json without a mask",
                allowed="PREFIX.json and PREFIX.mask of one corpus, or neither",
                do="copy all files of the corpus again, or remove the mask to train on every token",
            )
        return None

    def _read_manifest(self) -> Manifest | None:
        path = Path(f"{self.path}.json")
        if not path.is_file():
            return None
        manifest = parse_manifest(path)
        for name, found, said in (
            ("documents", self.num_documents, manifest.documents),
            ("tokens", self.num_tokens, manifest.tokens),
            ("fingerprint", self.fingerprint, manifest.fingerprint),
        ):
            if found != said:
                raise DataError(
                    f"{path}: the manifest is not that of the .bin and .idx beside it",
                    found=f"{name} {found}",
                    allowed=f"{name} {said}",
                    do="copy all files of the corpus again, or make it again with tools/preprocess_data.py",
                )
        return manifest


def check_ids(corpus: Corpus, ids: NDArray[np.integer], *, vocab_size: int, start: int) -> None:
    """Refuse token ids outside 0..vocab_size-1; `start` is the place of ids[0] in the corpus."""
    if ids.size and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        at = int(np.flatnonzero((ids >= vocab_size) | (ids < 0))[0])
        raise DataError(
            f"{bin_path(corpus.path)}: token id outside the vocabulary",
            found=f"id {ids[at]} at token {start + at}",
            allowed=f"0..{vocab_size - 1}",
            do="use the tokenizer that made the corpus",
        )


def fingerprint(bin_file: Path, idx_file: Path) -> str:
    """The identity of a .bin and its .idx: BLAKE3 of sizes and sampled blocks, 64 hex digits."""
    hasher = blake3()
    for path in (bin_file, idx_file):
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                hasher.update(size.to_bytes(8, "little"))
                last = max(0, size - SAMPLE_SIZE)
                offsets = sorted({i * last // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)})
                for offset in offsets:
                    hasher.update(os.pread(file.fileno(), SAMPLE_SIZE, offset))
        except OSError as error:
            raise DataError(f"{path}: cannot be read", found=error.strerror) from error
    return hasher.hexdigest()


def parse_manifest(path: Path) -> Manifest:
    """Read PREFIX.json strictly. Raises DataError naming the field."""
    try:
        content: Any = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON", found=error) from error
    if not isinstance(content, dict) or content.get("format") not in READABLE_FORMATS:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: not a corpus manifest of a known format",
            found=found,
            allowed=", ".join(READABLE_FORMATS),
        )
    names = {each.name for each in fields(Manifest)}
    later = {each.name for each in fields(Manifest) if each.default is not MISSING or each.name == "options"}
    if wrong := sorted(names.symmetric_difference(content) - (later - content.keys())):
        raise DataError(
            f"{path}: fields missing or unknown", found=", ".join(wrong), allowed=", ".join(sorted(names))
        )
    for name in ("documents", "tokens", "text_bytes", "vocab_size"):
        if type(content[name]) is not int or content[name] < 0:
            raise DataError(
                f"{path}: impossible {name}", found=repr(content[name]), allowed="an integer, 0 or more"
            )
    kinds = {"hashes": dict, "bad": list, "options": dict, "sources": list}
    for name in ("fingerprint", "tokenizer_fingerprint", *kinds):
        kind = kinds.get(name, str)
        if name in content and not isinstance(content[name], kind):
            raise DataError(f"{path}: impossible {name}", found=repr(content[name]), allowed=kind.__name__)
    return Manifest(**{**content, "bad": tuple(content["bad"]), "sources": tuple(content.get("sources", ()))})


def read_source(path: Path, document: int) -> DocumentSource:
    """Entry `document` of a PREFIX.src file. Raises DataError for a damaged file or no such entry."""
    try:
        with open(path, "rb") as file:
            magic, num_documents, num_files = SOURCE_HEADER.unpack(file.read(SOURCE_HEADER.size))
            if magic != SOURCE_MAGIC or not 0 <= document < num_documents:
                raise DataError(
                    f"{path}: no entry for document {document}", allowed=f"0..{num_documents - 1}"
                )
            file.seek(SOURCE_HEADER.size + document * SOURCE_DTYPE.itemsize)
            entry = np.frombuffer(file.read(SOURCE_DTYPE.itemsize), dtype=SOURCE_DTYPE)[0]
            file.seek(SOURCE_HEADER.size + num_documents * SOURCE_DTYPE.itemsize)
            name = b""
            for _ in range(min(int(entry["file"]) + 1, num_files)):
                name = file.read(int.from_bytes(file.read(8), "little"))
            return DocumentSource(name.decode("utf-8", "surrogateescape"), int(entry["record"]))
    except (OSError, struct.error, ValueError, IndexError, MemoryError, OverflowError) as error:
        raise DataError(f"{path}: damaged", found=error, do="make the corpus again") from error


def write_durably(path: Path, content: bytes) -> None:
    """Write through a temporary file, fsync and rename: `path` holds all of `content` or is untouched."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def open_corpora(paths: Sequence[str]) -> tuple[Corpus, ...]:
    """Open several corpora. Raises DataError for one that cannot be used or is named twice."""
    corpora = tuple(Corpus(path) for path in paths)
    for i, corpus in enumerate(corpora):
        twin = next((other for other in corpora[:i] if other.fingerprint == corpus.fingerprint), None)
        if twin is not None:
            raise DataError(
                f"{corpus.path}: the same corpus as {twin.path}",
                allowed="each corpus once in a list",
                do="give it one entry with the sum of the weights",
            )
    return corpora
