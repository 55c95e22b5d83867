"""The .bin/.idx format: bytes as Megatron writes them, and every damaged pair refused with the field."""

from __future__ import annotations

import itertools
import os
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megads.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megads.errors import DataError

IDS = list(range(10, 20))


@dataclass(frozen=True)
class Pair:
    """The parts of a good pair: documents of 3, 5 and 2 tokens, uint16. Damaged by `replace`."""

    magic: bytes = b"MMIDIDX\x00\x00"
    version: int = 1
    code: int = 8
    num_sequences: int = 3
    num_offsets: int = 4
    lengths: tuple[int, ...] = (3, 5, 2)
    pointers: tuple[int, ...] = (0, 6, 16)
    offsets: tuple[int, ...] = (0, 1, 2, 3)
    tail: bytes = b""
    cut: int | None = None
    bin: bytes = np.array(IDS, dtype="<u2").tobytes()

    def write(self, folder: Path) -> str:
        index = self.magic + struct.pack(
            "<QBQQ", self.version, self.code, self.num_sequences, self.num_offsets
        )
        index += np.array(self.lengths, "<i4").tobytes() + np.array(self.pointers, "<i8").tobytes()
        index += np.array(self.offsets, "<i8").tobytes() + self.tail
        (folder / "c.idx").write_bytes(index[: self.cut])
        (folder / "c.bin").write_bytes(self.bin)
        return str(folder / "c")


GOOD = Pair()
BAD = {
    "empty idx": (replace(GOOD, cut=0), "size of the file"),
    "header cut": (replace(GOOD, cut=33), "size of the file"),
    "magic": (replace(GOOD, magic=b"MMIDIDX\x00\x01"), "magic"),
    "another format's magic": (replace(GOOD, magic=b"TNTIDX\x00\x00\x00"), "magic"),
    "version 0": (replace(GOOD, version=0), "version"),
    "version 2": (replace(GOOD, version=2), "version"),
    "version big endian": (replace(GOOD, version=1 << 56), "version"),
    "dtype 0": (replace(GOOD, code=0), "dtype code"),
    "dtype 9": (replace(GOOD, code=9), "dtype code"),
    "dtype 255": (replace(GOOD, code=255), "dtype code"),
    "dtype float64": (replace(GOOD, code=6), "dtype code"),
    "dtype float32": (replace(GOOD, code=7), "dtype code"),
    "dtype of another width": (replace(GOOD, code=4), "pointer of sequence 1"),
    "no sequences": (replace(GOOD, num_sequences=0), "number of sequences"),
    "sequences overflow": (replace(GOOD, num_sequences=2**64 - 1), "number of sequences"),
    "sequences times 12 wraps": (replace(GOOD, num_sequences=2**62), "number of sequences"),
    "sequences past the end": (replace(GOOD, num_sequences=10), "number of sequences"),
    "one sequence too few": (replace(GOOD, num_sequences=2, num_offsets=3), "size of the file"),
    "no documents": (replace(GOOD, num_offsets=0), "number of document offsets"),
    "one document offset": (replace(GOOD, num_offsets=1), "number of document offsets"),
    "documents overflow": (replace(GOOD, num_offsets=2**64 - 1), "number of document offsets"),
    "more documents than sequences": (replace(GOOD, num_offsets=5), "number of document offsets"),
    "idx cut": (replace(GOOD, cut=-1), "size of the file"),
    "idx cut in half": (replace(GOOD, cut=51), "size of the file|number of sequences"),
    "bytes behind the idx": (replace(GOOD, tail=b"\0" * 3), "size of the file"),
    "negative length": (replace(GOOD, lengths=(3, -5, 2)), "length of sequence 1"),
    "length too large": (replace(GOOD, lengths=(3, 2**31 - 1, 2)), "pointer of sequence 2"),
    "last length too large": (replace(GOOD, lengths=(3, 5, 2**31 - 1)), "sum of the sequence lengths"),
    "first pointer": (replace(GOOD, pointers=(2, 8, 18)), "pointer of sequence 0"),
    "negative pointer": (replace(GOOD, pointers=(0, -6, 16)), "pointer of sequence 1"),
    "pointer past the end": (replace(GOOD, pointers=(0, 6, 2**40)), "pointer of sequence 2"),
    "pointer at 2 ** 63 - 1": (replace(GOOD, pointers=(0, 6, 2**63 - 1)), "pointer of sequence 2"),
    "pointer inside a token": (replace(GOOD, pointers=(0, 7, 16)), "pointer of sequence 1"),
    "pointers exchanged": (replace(GOOD, pointers=(0, 16, 6)), "pointer of sequence 1"),
    "first document offset": (replace(GOOD, offsets=(1, 1, 2, 3)), "document offset 0"),
    "falling document offset": (replace(GOOD, offsets=(0, 2, 1, 3)), "document offset 2"),
    "document offset past the end": (replace(GOOD, offsets=(0, 1, 9, 3)), "document offset 3"),
    "negative document offset": (replace(GOOD, offsets=(0, -1, 2, 3)), "document offset 1"),
    "last document offset": (replace(GOOD, offsets=(0, 1, 2, 2)), "document offset 3"),
    "bin one byte short": (replace(GOOD, bin=GOOD.bin[:-1]), "sum of the sequence lengths"),
    "bin one token short": (replace(GOOD, bin=GOOD.bin[:-2]), "sum of the sequence lengths"),
    "bin one token long": (replace(GOOD, bin=GOOD.bin + b"\0\0"), "sum of the sequence lengths"),
    "bin empty": (replace(GOOD, bin=b""), "sum of the sequence lengths"),
    "end-of-document tokens not counted": (replace(GOOD, bin=GOOD.bin + b"\0" * 6), "Megatron-DeepSpeed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_are_refused_at_open_with_the_field(name: str, tmp_path: Path) -> None:
    pair, field = BAD[name]
    with pytest.raises(DataError, match=f"c.idx: .*(?:.*\n)*.*(?:{field})") as refusal:
        IndexedReader(pair.write(tmp_path))
    message = str(refusal.value)
    assert "found:" in message
    assert "allowed:" in message


def test_a_refusal_takes_no_memory(tmp_path: Path) -> None:
    prefix = replace(GOOD, num_sequences=2**40, num_offsets=2**40).write(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            IndexedReader(prefix)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


GOOD_PAIRS = {
    "plain": GOOD,
    "an empty sequence": replace(GOOD, lengths=(3, 0, 7), pointers=(0, 6, 6)),
    "two sequences in a document": replace(GOOD, num_offsets=3, offsets=(0, 2, 3)),
    "an empty document": replace(GOOD, num_offsets=4, offsets=(0, 2, 2, 3)),
}


@pytest.mark.parametrize("name", GOOD_PAIRS)
def test_good_pairs_are_read(name: str, tmp_path: Path) -> None:
    reader = IndexedReader(GOOD_PAIRS[name].write(tmp_path))
    assert reader.read(0, 10).tolist() == IDS
    assert reader.num_tokens == 10


def test_documents_are_found_by_token(tmp_path: Path) -> None:
    reader = IndexedReader(GOOD.write(tmp_path))
    assert [reader.document_at(token) for token in range(10)] == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    assert [reader.document_range(document) for document in range(3)] == [(0, 3), (3, 8), (8, 10)]
    assert reader.document_starts(0, 10).tolist() == [0, 3, 8]
    assert reader.document_starts(3, 8).tolist() == [3]
    assert reader.document_starts(4, 8).tolist() == []


def test_documents_of_several_sequences_begin_with_their_first(tmp_path: Path) -> None:
    reader = IndexedReader(replace(GOOD, num_offsets=3, offsets=(0, 2, 3)).write(tmp_path))
    assert reader.document_starts(0, 10).tolist() == [0, 8]
    assert reader.document_at(5) == 0
    assert reader.document_range(0) == (0, 8)


def test_searching_documents_does_not_copy_the_index(bare_corpus: Callable[..., str]) -> None:
    prefix = bare_corpus("many", [[1]])
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.zeros(400_000, dtype=np.int64), np.full(200_000, 2))
        writer.seal()
        writer.publish()
    reader = IndexedReader(prefix)
    tracemalloc.start()
    try:
        assert reader.document_starts(300_001, 300_007).tolist() == [300_002, 300_004, 300_006]
        assert tracemalloc.get_traced_memory()[1] < 100_000  # the pointers take 1.6 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_ranges_outside_are_refused(start: int, count: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"c\.bin: token range"):
        IndexedReader(GOOD.write(tmp_path)).read(start, count)


def test_a_bin_that_shrinks_or_changes_in_use_is_named(tmp_path: Path) -> None:
    reader = IndexedReader(GOOD.write(tmp_path))
    os.truncate(tmp_path / "c.bin", 10)
    with pytest.raises(DataError, match=r"c\.bin: the file was changed"):
        reader.read(0, 10)
    reader = IndexedReader(GOOD.write(tmp_path))
    os.utime(tmp_path / "c.bin", ns=(0, 0))
    with pytest.raises(DataError, match=r"c\.bin: the file was changed"):
        reader.read(0, 2)


def test_short_reads_are_continued_and_an_early_end_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = IndexedReader(GOOD.write(tmp_path))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: pread(handle, min(size, 3), offset))
    assert reader.read(1, 8).tolist() == IDS[1:9]
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: b"")
    with pytest.raises(DataError, match=r"c\.bin: the file ends early"):
        reader.read(0, 4)


def refuse_to_read(*_: object) -> bytes:
    raise OSError(5, "Input/output error")


def test_read_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = IndexedReader(GOOD.write(tmp_path))
    monkeypatch.setattr(os, "pread", refuse_to_read)
    with pytest.raises(DataError, match=r"c\.bin: cannot be read\n.*Input/output"):
        reader.read(0, 4)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "loop"])
def test_what_is_not_a_file_is_refused_without_waiting(suffix: str, kind: str, tmp_path: Path) -> None:
    prefix = GOOD.write(tmp_path)
    path = tmp_path / f"c.{suffix}"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    with pytest.raises(DataError, match=rf"c\.{suffix}"):
        IndexedReader(prefix)


def test_written_bytes_are_megatrons(bare_corpus: Callable[..., str]) -> None:
    """The layout written out by hand: header, int32 lengths, int64 pointers, document offsets 0..n."""
    prefix = bare_corpus("c", [[1, 2, 3], [4], [5, 6]])
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 4, 5, 6)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
    body = struct.pack("<3i", 3, 1, 2) + struct.pack("<3q", 0, 6, 8) + struct.pack("<4q", 0, 1, 2, 3)
    assert Path(f"{prefix}.idx").read_bytes() == header + body
    assert sorted(path.name for path in Path(prefix).parent.iterdir()) == ["c.bin", "c.idx"]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_every_dtype_is_read_back(dtype: str, bare_corpus: Callable[..., str]) -> None:
    reader = IndexedReader(bare_corpus("c", [[1, 2], [100]], dtype))
    assert reader.dtype == np.dtype(dtype)
    assert reader.read(0, 3).tolist() == [1, 2, 100]


def test_dtype_is_megatrons_choice() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


def test_many_blocks_of_the_index_are_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CHECKED_BLOCK", 16), ("NUM_CHECKED_BLOCKS", 3), ("NUM_SPREAD_BLOCKS", 3)):
        monkeypatch.setattr(f"megads.data.indexed.{name}", value)
    lengths = np.random.default_rng(0).integers(0, 9, 1000)
    prefix = str(tmp_path / "c")
    with IndexedWriter(prefix, np.dtype(np.int32)) as writer:
        for piece in np.array_split(lengths, 7):
            writer.add(np.arange(piece.sum()), piece)
        writer.seal()
        writer.publish()
    reader = IndexedReader(prefix)
    edges = np.concatenate([[0], np.cumsum(lengths)])
    assert [reader.document_range(i) for i in range(1000)] == list(itertools.pairwise(edges))
    content = bytearray(Path(f"{prefix}.idx").read_bytes())
    content[34 + 4 * 1000 + 8 * 3] ^= 1  # pointer 3, in the first block: always checked
    Path(f"{prefix}.idx").write_bytes(content)
    with pytest.raises(DataError, match="pointer of sequence 3"):
        IndexedReader(prefix)


def test_an_exception_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(5), np.array([5]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_looks_complete_before_it_is_published(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(5), np.array([5]))
        writer.seal()
        with pytest.raises(DataError, match="cannot be opened"):
            IndexedReader(tmp_path / "c")
        writer.publish()
    assert IndexedReader(tmp_path / "c").num_tokens == 5
