"""Parquet: columns of any text type, row by row what is bad, damage told where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megads.data import parquet
from megads.data.chat import open_template
from megads.data.parquet import DamagedRowGroupError, check_columns, read_row_groups, row_groups
from megads.data.record import RecordOptions
from megads.errors import DataError

TEXTS = ["a", "é你😀", "", None, "\0", "x" * 1000, "a"]


def write(path: Path, columns: dict[str, pyarrow.Array], **how: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **how)
    return path


def read(path: Path, options: RecordOptions) -> tuple[list[str], list[int], list[tuple[int, str, bytes]]]:
    """(texts, their rows, (row, why, head) of bad ones) of the whole file."""
    texts: list[str] = []
    rows: list[int] = []
    bad: list[tuple[int, str, bytes]] = []
    share = 0.0
    for found in read_row_groups(path, range(len(row_groups(path))), file=0, options=options):
        texts += found.found.texts.texts.to_pylist()
        rows += found.found.texts.records.tolist()
        bad += [(record.record, record.why, record.head) for record in found.found.bad]
        assert share < found.share <= 1
        share = found.share
    return texts, rows, bad


KINDS = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.string_view(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.binary_view(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.binary()),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_string_or_binary_column_is_text(kind: pyarrow.DataType, tmp_path: Path) -> None:
    if pyarrow.types.is_dictionary(kind):
        array = pyarrow.array(TEXTS, pyarrow.string()).cast(kind.value_type).dictionary_encode()
    else:
        array = pyarrow.array(TEXTS, pyarrow.string()).cast(kind)
    path = write(tmp_path / "f.parquet", {"id": pyarrow.array(range(7)), "text": array}, row_group_size=4)
    for block_bytes in (1, 1 << 20):
        texts, rows, bad = read(path, RecordOptions(block_bytes=block_bytes))
        assert texts == [text for text in TEXTS if text is not None]
        assert rows == [0, 1, 2, 4, 5, 6]
        assert bad == [(3, "column 'text' is null, not text", b"null")]


def test_rows_that_are_no_utf8_are_told(tmp_path: Path) -> None:
    values = [b"good", b"\xff\xfe" * 50, "é".encode(), b"\xed\xa0\x80", None]
    path = write(tmp_path / "f.parquet", {"text": pyarrow.array(values, pyarrow.binary())})
    texts, rows, bad = read(path, RecordOptions())
    assert (texts, rows) == (["good", "é"], [0, 2])
    assert bad == [
        (1, "column 'text' is not UTF-8", (b"\xff\xfe" * 50)[:80]),
        (3, "column 'text' is not UTF-8", b"\xed\xa0\x80"),
        (4, "column 'text' is null, not text", b"null"),
    ]


def test_columns_are_joined_and_limits_hold(tmp_path: Path) -> None:
    struct = pyarrow.array([{"b": "x"}, None, {"b": None}, {"b": "y" * 50}])
    titles = pyarrow.array(["t", "u", "v", "w"])
    path = write(tmp_path / "f.parquet", {"a": struct, "title": titles, "a.b": titles})
    options = RecordOptions(columns=("title", "a.b"), separator="-", max_document_bytes=20)
    texts, rows, bad = read(path, options)
    assert (texts, rows) == (["t-x"], [0])
    assert [why for _, why, _ in bad] == [
        "column 'a.b' is null, not text",
        "column 'a.b' is null, not text",
        "a document of 52 bytes, above the limit of 20 (cut it, or raise --max-document-bytes)",
    ]
    assert bad[2][2] == b"w-" + b"y" * 50
    assert read(path, RecordOptions(key="a\\.b"))[0] == ["t", "u", "v", "w"]


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("body", r"no column 'body'\n.*found:   id, nested, items, a\.b"),
        ("id", r"column 'id' holds no text\n.*found:   int64"),
        ("nested", r"column 'nested' holds no text\n.*found:   struct<b: string>"),
        ("items", r"column 'items' holds no text\n.*list<"),
        ("nested.c", r"no column 'c' in 'nested'\n.*found:   b"),
        ("a.b", r"no column 'a'\n.*\n.*\n.*a dot in a name is written \\\."),
    ],
)
def test_columns_of_no_text_are_refused(key: str, says: str, tmp_path: Path) -> None:
    columns = {
        "id": pyarrow.array([1]),
        "nested": pyarrow.array([{"b": "x"}]),
        "items": pyarrow.array([["x"]]),
        "a.b": pyarrow.array(["x"]),
    }
    path = write(tmp_path / "f.parquet", columns)
    with pytest.raises(DataError, match=says):
        check_columns(path, RecordOptions(key=key))
    with pytest.raises(DataError, match=says):
        read(path, RecordOptions(key=key))


def test_conversations_come_from_lists_of_structs(tmp_path: Path) -> None:
    rows: Sequence[object] = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        None,
        [{"role": "user", "content": None}],
    ]
    path = write(tmp_path / "f.parquet", {"messages": pyarrow.array(rows)})
    texts, numbers, bad = read(path, RecordOptions(template=open_template("plain")))
    assert (texts, numbers) == (["q", "\n", "a"], [0])
    assert [(row, why) for row, why, _ in bad] == [
        (1, "the value of 'messages' is null, not an array of messages"),
        (2, "message 1: 'content' is null, not text"),
    ]


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet", {"text": pyarrow.array(["a"])})
    content = path.read_bytes()
    for size in (0, 3, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"f\.parquet: not a complete Parquet file\n.*{size} bytes"):
            row_groups(path)


def test_rows_before_a_damaged_page_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"row {i} " + "x" * 100 for i in range(2000)]
    path = write(
        tmp_path / "f.parquet",
        {"text": pyarrow.array(texts)},
        row_group_size=500,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"row 1100 ") + 2] ^= 1
    path.write_bytes(content)
    found = read_row_groups(path, range(4), file=0, options=RecordOptions())
    read_texts: list[str] = []
    with pytest.raises(DamagedRowGroupError, match=r"CRC|checksum"):
        for part in found:
            read_texts += part.found.texts.texts.to_pylist()
    assert read_texts == texts[:1000] or read_texts == texts[: len(read_texts) // 256 * 256]
    assert len(read_texts) >= 768
    rest = read_row_groups(path, range(3, 4), file=0, options=RecordOptions())
    assert [text for part in rest for text in part.found.texts.texts.to_pylist()] == texts[1500:]


def test_large_rows_are_decoded_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        tmp_path / "f.parquet",
        {"text": pyarrow.array([f"{i:0100000d}" for i in range(100)]), "id": pyarrow.array(range(100))},
        use_dictionary=False,
    )
    sizes: list[int] = []
    original = parquet._text_block

    def watched(parts: Sequence[Sequence[pyarrow.Array]], options: RecordOptions) -> object:
        sizes.append(sum(len(column) for (column,) in parts))
        return original(parts, options)

    monkeypatch.setattr(parquet, "_text_block", watched)
    assert len(read(path, RecordOptions(block_bytes=500_000))[0]) == 100
    assert max(sizes) <= 10
