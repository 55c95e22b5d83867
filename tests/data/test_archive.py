"""Archives give all that stands before a damage, then say so; members and frames follow one another."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from megads.data.archive import Archive, DamagedArchiveError
from megads.data.record import Compression

RANDOM = random.Random(0)
CONTENT = b"".join(b"%d %s\n" % (i, RANDOM.randbytes(20).hex().encode()) for i in range(30_000))


def zstd(content: bytes) -> bytes:
    target = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(target, "zstd") as stream:
        stream.write(content)
    return bytes(target.getvalue())


PACKERS: dict[Compression, Callable[[bytes], bytes]] = {
    "gzip": lambda content: gzip.compress(content, 1),
    "zstd": zstd,
}


def read(path: Path, compression: Compression, size: int = 700_001) -> tuple[bytes, str]:
    """What comes out, and what is said at the end."""
    content = bytearray()
    with Archive(path, compression) as archive:
        try:
            while piece := archive.read(size):
                content += piece
                assert len(piece) <= size
                assert archive.tell() == len(content)
        except DamagedArchiveError as error:
            with pytest.raises(DamagedArchiveError):
                archive.read(size)
            return bytes(content), str(error)
        assert archive.read_bytes == path.stat().st_size
    return bytes(content), ""


@pytest.mark.parametrize("compression", PACKERS)
def test_members_and_frames_follow_one_another(compression: Compression, tmp_path: Path) -> None:
    pack = PACKERS[compression]
    path = tmp_path / "a"
    path.write_bytes(pack(CONTENT[:1_000_000]) + pack(b"") + pack(CONTENT[1_000_000:]))
    assert read(path, compression) == (CONTENT, "")


@pytest.mark.parametrize("compression", PACKERS)
def test_all_before_a_truncation_comes_out(compression: Compression, tmp_path: Path) -> None:
    packed = PACKERS[compression](CONTENT)
    path = tmp_path / "a"
    for size in (0, 5, len(packed) // 2, len(packed) - 9, len(packed) - 1):
        path.write_bytes(packed[:size])
        content, said = read(path, compression)
        assert CONTENT.startswith(content)
        assert said == ("the file is empty" if size == 0 else "Truncated compressed stream")
        if compression == "gzip" and size:
            assert content == zlib.decompressobj(wbits=31).decompress(packed[:size])
        assert len(content) > size - 200_000  # zstd's blocks come out whole
        for piece in (1 << 16, 1 << 22):
            assert read(path, compression, piece)[0] == content


@pytest.mark.parametrize("compression", PACKERS)
def test_what_is_no_archive_is_told(compression: Compression, tmp_path: Path) -> None:
    packed = PACKERS[compression](CONTENT)
    path = tmp_path / "a"
    path.write_bytes(CONTENT)
    content, said = read(path, compression)
    assert not content
    assert "header" in said or "frame" in said
    path.write_bytes(packed + b"garbage")
    content, said = read(path, compression)
    assert content == CONTENT
    assert "header" in said or "frame" in said
    broken = bytearray(packed)
    half = len(packed) // 2
    broken[half:] = b"\xff" * (len(packed) - half)  # zstd here has no checksum: one bit would pass
    path.write_bytes(broken)
    content, said = read(path, compression)
    assert said
    assert CONTENT.startswith(content[:200_000])
