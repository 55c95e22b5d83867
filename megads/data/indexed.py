"""Megatron's indexed format: PREFIX.bin holds token ids, PREFIX.idx says where each document is.

Lives here: the bytes, written and read strictly. Does not live here: manifests, fingerprints and sources
(corpus).

    PREFIX.bin   ids of document 0, ids of document 1, ...         dtype of the .idx, little endian
    PREFIX.idx   0   magic         9 bytes   b"MMIDIDX\\0\\0"
                 9   version       u64       1
                 17  dtype code    u8        1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
                 18  num_sequences u64       n
                 26  num_documents u64       d, one more than there are documents
                 34  lengths       n x i32   tokens of each sequence
                     pointers      n x i64   byte offset of each sequence in the .bin
                     documents     d x i64   first sequence of each document; ends with n

The .idx is written last, by rename: a .bin without an .idx is not a corpus.
"""

from __future__ import annotations

import bisect
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from megads.data.fixed_file import FixedFile, open_regular
from megads.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = MappingProxyType({1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"})
FLOAT_CODES = MappingProxyType({6: "float64", 7: "float32"})
UINT16_VOCAB_SIZE = 65500
"""Megatron stores vocabularies below this size as uint16 and all others as int32."""
BLOCK = 1 << 18
"""Entries of the .idx that are written at once."""
CHECKED_BLOCK = 1 << 12
"""Entries of the .idx that are checked at once."""
NUM_CHECKED_BLOCKS = 64
"""Blocks of the .idx up to which all are checked at opening: 262,144 sequences."""
NUM_SPREAD_BLOCKS = 16
"""Blocks that are checked of a larger .idx, so that opening a corpus reads 2 MB of it at most."""


def token_dtype(vocab_size: int) -> np.dtype[np.generic]:
    """The dtype that Megatron's tool chooses for ids below `vocab_size`."""
    return np.dtype(np.uint16) if vocab_size < UINT16_VOCAB_SIZE else np.dtype(np.int32)


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def mask_path(prefix: str | Path) -> Path:
    """PREFIX.mask."""
    return Path(f"{prefix}.mask")


class IndexedWriter:
    """Write a .bin/.idx pair, one document a sequence, in bounded memory.

    Nothing carries its final name before `publish`; `abort` removes what was written. As a context manager it
    aborts when the block leaves by an exception.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[np.generic]) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.num_documents = 0
        self.num_tokens = 0
        self._bin_hash = blake3()
        self._idx_hash = blake3()
        self._code = next(code for code, name in DTYPES.items() if name == self.dtype.name)
        self._bin = open(f"{prefix}.bin.tmp", "wb")  # noqa: SIM115 - closed by seal or abort
        self._lengths = open(f"{prefix}.lengths.tmp", "w+b")  # noqa: SIM115

    def add(self, ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Append documents: ids one after another [sum of lengths] and lengths [num documents]."""
        if int(lengths.sum()) != ids.size:
            raise ValueError(f"lengths sum to {int(lengths.sum())}, there are {ids.size} ids")
        content = np.ascontiguousarray(ids, dtype=self.dtype.newbyteorder("<")).view(np.uint8).data
        self._bin.write(content)
        self._bin_hash.update(content)
        self._lengths.write(np.ascontiguousarray(lengths, dtype="<i4").tobytes())
        self.num_documents += lengths.size
        self.num_tokens += ids.size

    def seal(self) -> tuple[Path, Path]:
        """Complete and fsync both files; returns where the .bin and the .idx wait for their names."""
        with open(f"{self.prefix}.idx.tmp", "wb") as idx:
            for content in self._index_bytes():
                idx.write(content)
                self._idx_hash.update(content)
            sync_file(idx)
        sync_file(self._bin)
        self._bin.close()
        self._lengths.close()
        Path(f"{self.prefix}.lengths.tmp").unlink()
        return Path(f"{self.prefix}.bin.tmp"), Path(f"{self.prefix}.idx.tmp")

    def publish(self) -> None:
        """Give both sealed files their names, the .idx last."""
        idx_path(self.prefix).unlink(missing_ok=True)  # an older .idx never meets the new .bin
        os.replace(f"{self.prefix}.bin.tmp", bin_path(self.prefix))
        os.replace(f"{self.prefix}.idx.tmp", idx_path(self.prefix))
        sync_folder(Path(self.prefix).parent)

    def abort(self) -> None:
        """Close and remove the temporary files."""
        self._bin.close()
        self._lengths.close()
        for name in ("bin", "idx", "lengths"):
            Path(f"{self.prefix}.{name}.tmp").unlink(missing_ok=True)

    @property
    def hashes(self) -> dict[str, str]:
        """BLAKE3 of the sealed .bin and .idx."""
        return {"bin": self._bin_hash.hexdigest(), "idx": self._idx_hash.hexdigest()}

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abort()

    def _index_bytes(self) -> Iterator[bytes]:
        count = self.num_documents
        yield HEADER.pack(MAGIC, VERSION, self._code, count, count + 1)
        yield from (lengths.tobytes() for lengths in self._spooled_lengths())
        offset = 0
        for lengths in self._spooled_lengths():
            ends = offset + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
            yield (ends - lengths.astype("<i8") * self.dtype.itemsize).tobytes()
            offset = int(ends[-1])
        for start in range(0, count + 1, BLOCK):
            yield np.arange(start, min(start + BLOCK, count + 1), dtype="<i8").tobytes()

    def _spooled_lengths(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while content := self._lengths.read(4 * BLOCK):
            yield np.frombuffer(content, dtype="<i4")


class IndexedReader:
    """A .bin/.idx pair, checked when it is opened, read by token range.

    Raises:
        DataError: a file is missing, or a field of the .idx is impossible or does not match the .bin; the
            message names the field, the value and the limit.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._bin = FixedFile(bin_path(prefix))
        with open_regular(idx_path(prefix)) as idx:
            self._idx_size = os.fstat(idx.fileno()).st_size
            self._check_header(idx.read(HEADER.size))
            index = mmap.mmap(idx.fileno(), 0, access=mmap.ACCESS_READ)
        index.madvise(
            mmap.MADV_RANDOM
        )  # lookups touch single pages; reading around them would be most of the work
        sequences, documents = self.num_sequences, self.num_documents + 1
        offset = HEADER.size
        self._lengths = np.frombuffer(index, dtype="<i4", count=sequences, offset=offset)
        self._pointers = np.frombuffer(index, dtype="<i8", count=sequences, offset=offset + 4 * sequences)
        self._documents = np.frombuffer(index, dtype="<i8", count=documents, offset=offset + 12 * sequences)
        self._check_sequences()
        self._check_total()
        self._check_documents()

    def read(self, start: int, count: int) -> NDArray[np.integer]:
        """Tokens [start, start + count) of the corpus, in the dtype of the file.

        Raises:
            DataError: the range is not within the corpus, or the file changed or cannot be read.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise DataError(
                f"{bin_path(self.prefix)}: token range outside the corpus",
                found=f"[{start}, {start + count})",
                allowed=f"[0, {self.num_tokens})",
            )
        itemsize = self.dtype.itemsize
        content = self._bin.read(start * itemsize, count * itemsize)
        return np.frombuffer(content, dtype=self.dtype)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Token offsets in [start, stop) at which a document begins, ascending, int64."""
        itemsize = self.dtype.itemsize
        first = bisect.bisect_left(
            self._pointers, start * itemsize
        )  # not searchsorted: that copies an unaligned array
        last = bisect.bisect_left(self._pointers, stop * itemsize)
        starts = np.unique(np.array(self._pointers[first:last], dtype=np.int64) // itemsize)
        if self.num_sequences == self.num_documents:
            return starts
        return np.array(
            [at for at in starts if self.document_range(self.document_at(int(at)))[0] == at], dtype=np.int64
        )

    def document_at(self, token: int) -> int:
        """Index of the document that holds token `token`."""
        sequence = bisect.bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect.bisect_right(self._documents, sequence) - 1

    def document_range(self, document: int) -> tuple[int, int]:
        """Tokens [start, stop) of a document."""
        return self._sequence_start(self._documents[document]), self._sequence_start(
            self._documents[document + 1]
        )

    def document_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        """The first token of each document first..last, where `last` may be the number of documents: int64."""
        sequences = np.array(self._documents[first : last + 1])
        is_inside = sequences < self.num_sequences
        offsets = np.full(sequences.size, self.num_tokens, dtype=np.int64)
        offsets[is_inside] = self._pointers[sequences[is_inside]] // self.dtype.itemsize
        return offsets

    def _sequence_start(self, sequence: int) -> int:
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self._pointers[sequence]) // self.dtype.itemsize

    def _check_header(self, header: bytes) -> None:
        if len(header) < HEADER.size:
            self._refuse("size of the file", len(header), f"at least {HEADER.size} bytes")
        magic, version, code, num_sequences, num_offsets = HEADER.unpack(header)
        if magic != MAGIC:
            self._refuse("magic", magic, repr(MAGIC))
        if version != VERSION:
            self._refuse("version", version, str(VERSION))
        if code in FLOAT_CODES:
            self._refuse(
                "dtype code", f"{code} ({FLOAT_CODES[code]})", "an integer dtype: token ids are integers"
            )
        if code not in DTYPES:
            self._refuse("dtype code", code, ", ".join(f"{key} ({name})" for key, name in DTYPES.items()))
        limit = (self._idx_size - HEADER.size) // 12
        if not 1 <= num_sequences <= limit:
            self._refuse("number of sequences", num_sequences, f"1..{limit}, what the file has room for")
        if not 2 <= num_offsets <= num_sequences + 1:
            self._refuse(
                "number of document offsets", num_offsets, f"2..{num_sequences + 1}, one more than documents"
            )
        size = HEADER.size + 12 * num_sequences + 8 * num_offsets
        if size != self._idx_size:
            self._refuse("size of the file", self._idx_size, f"{size} bytes, what its header asks for")
        self.num_sequences: int = num_sequences
        self.num_documents: int = num_offsets - 1
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")

    def _check_sequences(self) -> None:
        """Lengths are not negative and each pointer is the end of the sequence before it."""
        itemsize = self.dtype.itemsize
        if self._pointers[0] != 0:
            self._refuse("pointer of sequence 0", self._pointers[0], "0")
        for start, stop in self._checked_ranges(self.num_sequences):
            lengths = np.array(self._lengths[start:stop], dtype=np.int64)
            negative = np.flatnonzero(lengths < 0)
            if negative.size:
                at = int(negative[0])
                self._refuse(f"length of sequence {start + at}", lengths[at], "0 or more")
            pointers = np.array(self._pointers[start : stop + 1])
            wrong = np.flatnonzero(pointers[:-1] + lengths[: pointers.size - 1] * itemsize != pointers[1:])
            if wrong.size:
                at = int(wrong[0])
                end = int(pointers[at]) + int(lengths[at]) * itemsize
                self._refuse(
                    f"pointer of sequence {start + at + 1}",
                    pointers[at + 1],
                    f"{end}, the end of sequence {start + at}",
                )

    def _check_total(self) -> None:
        """The sequences end where the .bin ends: sum(lengths) * itemsize is its size."""
        itemsize = self.dtype.itemsize
        total = int(self._pointers[-1]) + int(self._lengths[-1]) * itemsize
        size = self._bin.size
        if size - total == self.num_documents * itemsize:
            raise DataError(
                f"{idx_path(self.prefix)}: the sequence lengths leave out one token of every document",
                found=f"sum of the sequence lengths {total // itemsize}; {self.num_documents} documents",
                allowed=f"a sum of {size // itemsize}, the tokens in {bin_path(self.prefix).name}",
                do="this is a defect of Megatron-DeepSpeed's preprocess_data.py with --append-eod (the"
                " end-of-document token is not counted); make the corpus again with tools/preprocess_data.py",
            )
        if total != size:
            self._refuse(
                "sum of the sequence lengths",
                f"{total // itemsize} tokens of {itemsize} bytes = {total} bytes",
                f"{size} bytes, the size of {bin_path(self.prefix).name}",
            )
        self.num_tokens = total // itemsize

    def _check_documents(self) -> None:
        """Document offsets begin with 0, never fall, and end with the number of sequences."""
        if self._documents[0] != 0:
            self._refuse("document offset 0", self._documents[0], "0")
        if self._documents[-1] != self.num_sequences:
            self._refuse(
                f"document offset {self.num_documents}", self._documents[-1], f"{self.num_sequences}"
            )
        for start, stop in self._checked_ranges(self.num_documents + 1):
            offsets = np.array(self._documents[start : stop + 1])
            wrong = np.flatnonzero(offsets[1:] < offsets[:-1])
            if wrong.size:
                at = int(wrong[0]) + 1
                self._refuse(f"document offset {start + at}", offsets[at], f"at least {offsets[at - 1]}")

    def _checked_ranges(self, count: int) -> Iterator[tuple[int, int]]:
        """Blocks of 0..count: all, or of more than `NUM_CHECKED_BLOCKS` some, spread evenly from first to last."""
        num_blocks = -(-count // CHECKED_BLOCK)
        blocks: Sequence[int] = range(num_blocks)
        if num_blocks > NUM_CHECKED_BLOCKS:
            steps = NUM_SPREAD_BLOCKS - 1
            blocks = [step * (num_blocks - 1) // steps for step in range(NUM_SPREAD_BLOCKS)]
        return ((block * CHECKED_BLOCK, min((block + 1) * CHECKED_BLOCK, count)) for block in blocks)

    def _refuse(self, field: str, found: object, allowed: str) -> None:
        raise DataError(
            f"{idx_path(self.prefix)}: impossible {field}",
            found=found,
            allowed=allowed,
            do="the file is damaged or not of this corpus; copy both files again or rebuild them",
        )


def sync_file(file: BinaryIO) -> None:
    """Flush and fsync."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
