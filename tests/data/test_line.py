"""Whole lines out of byte ranges: every line in exactly one range, none held that is above the limit."""

from __future__ import annotations

import io
import itertools
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.line import BYTE_ORDER_MARK, LineBlock, line_blocks


def blocks_of(
    content: bytes, cuts: list[int], *, limit: int = 100, block_bytes: int = 7
) -> Iterator[list[LineBlock]]:
    """The blocks of each range between two cuts."""
    for start, stop in itertools.pairwise(cuts):
        stream = io.BytesIO(content)
        stream.seek(max(0, start - 1))
        yield list(line_blocks(stream, start=start, stop=stop, limit=limit, block_bytes=block_bytes))


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=8),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(4, 100)),
    st.integers(1, 20),
)
def test_each_line_is_in_the_range_it_starts_in(
    lines: list[bytes], has_mark: bool, is_ended: bool, cuts: list[int], block_bytes: int
) -> None:
    text = b"\n".join(lines) + b"\n" * is_ended
    mark = BYTE_ORDER_MARK * (has_mark and not text.startswith(BYTE_ORDER_MARK))
    content = mark + text
    if text.startswith(BYTE_ORDER_MARK):
        mark, text = BYTE_ORDER_MARK, text[len(BYTE_ORDER_MARK) :]
    bounds = [0, *sorted({cut for cut in cuts if cut < len(content)}), len(content)]
    ranges = list(blocks_of(content, bounds, block_bytes=block_bytes))
    assert b"".join(block.content for blocks in ranges for block in blocks) == text
    for (start, stop), blocks in zip(itertools.pairwise(bounds), ranges, strict=True):
        for block in blocks:
            first = 0 if block.offset == len(mark) else block.offset
            assert start <= first
            assert block.content == content[block.offset : block.offset + len(block.content)]
            last_line = block.content[:-1].rfind(b"\n") + 1 + block.offset
            assert (0 if last_line == len(mark) else last_line) < stop
            assert block.content.endswith(b"\n") or block.offset + len(block.content) == len(content)


@pytest.mark.parametrize("is_ended", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 7, 1000])
def test_a_line_above_the_limit_is_passed_over(is_ended: bool, block_bytes: int) -> None:
    long = b"x" * 250
    content = b"before\n" + long + b"\nafter\n" + long + b"\n" * is_ended
    (blocks,) = blocks_of(content, [0, len(content)], block_bytes=block_bytes)
    kept = b"".join(block.content for block in blocks if not block.long_size)
    skipped = [block for block in blocks if block.long_size]
    if block_bytes == 1000:  # a line that came whole is for the reader to refuse
        assert kept.startswith(b"before\n" + long + b"\nafter\n")
    else:
        assert kept == b"before\nafter\n"
        assert [(block.offset, block.long_size, block.content) for block in skipped] == [
            (7, 250, long[:80]),
            (7 + 251 + 6, 250, long[:80]),
        ]


def test_a_line_without_end_is_not_held() -> None:
    class Endless:
        """256 MiB without a line feed."""

        left = 1 << 28

        def read(self, size: int) -> bytes:
            given = min(size, self.left)
            self.left -= given
            return b"x" * given

    tracemalloc.start()
    (block,) = line_blocks(Endless(), limit=1 << 20, block_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (block.long_size, len(block.content)) == (1 << 28, 80)
    assert peak < 6 << 20
