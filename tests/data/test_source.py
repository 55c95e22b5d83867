"""Every record of every file is either a document or a named bad record; files come in one fixed order."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megads.data import source
from megads.data.source import BadRecord, Document, find_inputs, read_documents
from megads.errors import DataError


def read(*paths: Path, key: str = "text") -> list[Document | BadRecord]:
    return list(read_documents(find_inputs(paths), key))


def read_lines(folder: Path, *lines: bytes) -> list[Document | BadRecord]:
    (folder / "f.jsonl").write_bytes(b"".join(lines))
    return read(folder / "f.jsonl")


def test_folders_are_read_in_sorted_order_and_odd_files_counted(tmp_path: Path) -> None:
    for name in (
        "b/2.txt",
        "b/10.txt",
        "a.py",
        "c.md",
        ".git/config.txt",
        "__pycache__/x.py",
        "b/.hidden.txt",
        "x.so",
        "y",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    inputs = find_inputs([tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in inputs.files] == [
        "a.py",
        "c.md",
        "b/10.txt",
        "b/2.txt",
    ]
    assert inputs.left_out == {".so": 1, "(no suffix)": 1}
    assert [record.text for record in read(tmp_path) if isinstance(record, Document)] == [
        "a.py",
        "c.md",
        "b/10.txt",
        "b/2.txt",
    ]


def test_paths_keep_the_order_they_are_given_in(tmp_path: Path) -> None:
    for name in ("1.txt", "2.txt"):
        (tmp_path / name).write_text(name)
    assert [record.text for record in read(tmp_path / "2.txt", tmp_path / "1.txt")] == ["2.txt", "1.txt"]  # type: ignore[union-attr]


def test_json_lines_count_every_line(tmp_path: Path) -> None:
    records = read_lines(
        tmp_path, b'\xef\xbb\xbf{"text": "a"}\n', b"\n", b'{"text": "b\\u00e9"}\r\n', b'  \n{"text": ""}'
    )
    assert [(record.text, record.record) for record in records] == [("a", 1), ("bé", 3), ("", 5)]  # type: ignore[union-attr]
    assert records[-1].read_bytes == (tmp_path / "f.jsonl").stat().st_size  # type: ignore[union-attr]


BAD_LINES = {
    b'{"text": "cut': "not JSON",
    b"plain text": "not JSON",
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b'["a"]': "a JSON list",
    b'"a"': "a JSON str",
    b"null": "a JSON NoneType",
    b'{"txt": "a"}': "no key 'text' (keys: 'txt')",
    b'{"text": null}': "is null, not text",
    b'{"text": 3}': "is int, not text",
    b'{"text": ["a"]}': "is list, not text",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": "\xff\xfe"}': "not UTF-8",
    b"[" * 1_000_000: "beyond any limit",
    b'{"text": ' + b"9" * 1_000_000 + b"}": "beyond any limit",
    b"\x00": "not JSON",
    '{"text": "a"}'.encode("utf-16-le"): "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_and_the_rest_is_kept(line: bytes, tmp_path: Path) -> None:
    records = read_lines(tmp_path, b'{"text": "before"}\n', line + b"\n", b'{"text": "after"}\n')
    before, bad, after = records
    assert isinstance(before, Document)
    assert isinstance(after, Document)
    assert (before.text, after.text) == ("before", "after")
    assert isinstance(bad, BadRecord)
    assert bad.record == 2
    assert BAD_LINES[line] in bad.why
    assert bad.head == line[:80] if len(line) >= 80 else bad.head.startswith(line)


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_DOCUMENT_BYTES", 1000)
    long = json.dumps({"text": "x" * 5000}).encode() + b"\n"
    records = read_lines(tmp_path, b'{"text": "a"}\n', long, b'{"text": "b"}\n', long[:-1])
    assert [type(record) for record in records] == [Document, BadRecord, Document, BadRecord]
    assert [record.record for record in records] == [1, 2, 3, 4]
    (tmp_path / "big.txt").write_text("é" * 501)
    (big,) = read(tmp_path / "big.txt")
    assert isinstance(big, BadRecord)
    assert "larger than 1000 bytes" in big.why


@pytest.mark.parametrize("content", [b"\xff\xfea\x00", b"a\x00b", b"\x1f\x8b\x08zip"])
def test_text_files_that_are_no_text_are_bad(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_bytes(content)
    (bad,) = read(tmp_path / "f.txt")
    assert isinstance(bad, BadRecord)
    assert bad.why == "not UTF-8 text"


def test_parquet_rows_equal_json_lines(tmp_path: Path) -> None:
    texts = [f"row {i} é" for i in range(700)]
    table = pyarrow.table({"text": [*texts[:3], None, *texts[3:]], "id": list(range(701))})
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet", row_group_size=300)
    records = read(tmp_path / "f.parquet")
    assert [record.text for record in records if isinstance(record, Document)] == texts
    assert [(record.record, record.why) for record in records if isinstance(record, BadRecord)] == [
        (4, "column 'text' is null, not text")
    ]
    with pytest.raises(DataError, match=r"no column 'body'\n.*text, id"):
        read(tmp_path / "f.parquet", key="body")
    content = (tmp_path / "f.parquet").read_bytes()
    (tmp_path / "f.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"f\.parquet: not a readable Parquet"):
        read(tmp_path / "f.parquet")


def test_shared_parquet_is_read(shared_data: Path) -> None:
    records = read(shared_data / "parquet" / "mixed.snappy.parquet")
    assert len(records) == 334
    assert all(isinstance(record, Document) for record in records)


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_inputs([tmp_path / "absent"])
    (tmp_path / "x.so").write_bytes(b"")
    with pytest.raises(DataError, match=r"no input files found\n.*1 \.so"):
        find_inputs([tmp_path])
    (tmp_path / "gone.txt").write_text("x")
    inputs = find_inputs([tmp_path])
    (tmp_path / "gone.txt").unlink()
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        list(read_documents(inputs, "text"))


def test_pipes_and_loops_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    start = time.monotonic()
    with pytest.raises(DataError):
        find_inputs([tmp_path])
    with pytest.raises(DataError):
        find_inputs([tmp_path / "pipe.txt"])
    assert time.monotonic() - start < 10
