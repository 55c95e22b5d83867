"""A folder of nasty files gives exactly the documents or exactly the error expected, however it is cut into units."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megads.data.chat import open_template
from megads.data.record import Format, RecordOptions
from megads.data.source import find_inputs
from megads.data.unit import check_inputs, count_records_before, place_of, plan_units, read_unit
from megads.errors import DataError
from tests.data.nasty import LIMIT, LINES, NASTY, TRUNCATED, line


@dataclass(frozen=True, slots=True)
class Read:
    """What inputs gave: (file, record from 1, text) of documents, messages of bad records, documents filtered."""

    documents: list[tuple[str, int, str]]
    bad: list[str]
    num_filtered: int


def read(
    paths: Sequence[str | Path],
    options: RecordOptions | None = None,
    *,
    unit_bytes: int = 1 << 20,
    input_format: Format | None = None,
) -> Read:
    options = options or RecordOptions()
    inputs = find_inputs(paths, input_format=input_format)
    units = plan_units(inputs, unit_bytes=unit_bytes)
    assert sum(unit.size for unit in units) == sum(inputs.sizes)
    documents: list[tuple[str, int, str]] = []
    bad: list[str] = []
    num_filtered = 0
    for unit in units:
        before = count_records_before(inputs, unit)
        read_bytes = num_records = 0
        for part in read_unit(inputs, unit, options=options):
            part.texts.validate(full=True)
            assert not part.texts.null_count
            for number, text in zip(part.records.tolist(), part.texts.to_pylist(), strict=True):
                many = inputs.kinds[unit.file].format == "text"
                name = inputs.files[unit.file + number if many else unit.file].name
                documents.append((name, 1 if many else before + number + 1, text))
            bad += [f"{place_of(inputs, record, num_before=before)}: {record.why}" for record in part.bad]
            num_filtered += part.num_filtered
            assert read_bytes <= part.read_bytes
            assert unit.size == 0 or part.read_bytes <= unit.size
            assert num_records < part.num_records
            read_bytes, num_records = part.read_bytes, part.num_records
    folder = str(Path(paths[0]).parent if not Path(paths[0]).is_dir() else paths[0])
    return Read(documents, [message.replace(folder + os.sep, "") for message in bad], num_filtered)


OPTIONS = RecordOptions(max_document_bytes=LIMIT)


@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_file_gives_exactly_what_is_expected(name: str, tmp_path: Path) -> None:
    content, texts, messages = NASTY[name]
    (tmp_path / name).write_bytes(content)
    for unit_bytes in (4, 17, 1 << 20):
        found = read([tmp_path / name], OPTIONS, unit_bytes=unit_bytes)
        assert [text for _, _, text in found.documents] == texts
        assert found.bad == messages


@pytest.mark.parametrize("unit_bytes", [7, 1000, 1 << 30])
@pytest.mark.parametrize("block_bytes", [16, 1 << 20])
def test_a_folder_of_them_is_read_alike_in_any_units(
    unit_bytes: int, block_bytes: int, tmp_path: Path
) -> None:
    for name, (content, _, _) in NASTY.items():
        (tmp_path / name).write_bytes(content)
    table = pyarrow.table({"text": [f"row {i}" for i in range(40)]})
    pyarrow.parquet.write_table(table, tmp_path / "z_rows.parquet", row_group_size=7)
    (tmp_path / "module.so").write_bytes(b"")
    options = RecordOptions(max_document_bytes=LIMIT, block_bytes=block_bytes)
    found = read([tmp_path], options, unit_bytes=unit_bytes)
    wanted = [text for _, texts, _ in NASTY.values() for text in texts]
    assert [text for _, _, text in found.documents] == wanted + [f"row {i}" for i in range(40)]
    assert found.bad == [message for _, _, messages in NASTY.values() for message in messages]
    assert ("d_blank.json", 6, "b") in found.documents
    assert ("z_rows.parquet", 40, "row 39") in found.documents
    assert ("u_text.txt", 1, "line\r\nline\n") in found.documents


def test_everything_before_a_truncation_is_kept(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl.gz").write_bytes(TRUNCATED)
    for block_bytes in (100, 1 << 20):
        found = read([tmp_path / "f.jsonl.gz"], RecordOptions(block_bytes=block_bytes))
        num_read = len(found.documents)
        assert 2900 < num_read < 3000
        assert [text for _, _, text in found.documents] == [f"number {i}" for i in range(num_read)]
        (message,) = found.bad
        assert message.startswith(f"f.jsonl.gz:{num_read + 1} (byte ")


def test_small_text_files_share_a_unit(tmp_path: Path) -> None:
    for i in range(50):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}")
    (tmp_path / "25.txt").write_bytes(b"\xff")
    inputs = find_inputs([tmp_path])
    units = plan_units(inputs, unit_bytes=100)
    assert max(unit.size for unit in units) <= 100
    assert 1 < len(units) < 10
    assert [unit.file for unit in units[1:]] == [unit.file + unit.num_files for unit in units[:-1]]
    for options in (RecordOptions(), RecordOptions(block_bytes=8)):
        found = read([tmp_path], options, unit_bytes=100)
        assert found.documents == [(f"{i:02}.txt", 1, f"text {i}") for i in range(50) if i != 25]
        assert found.bad == ["25.txt: not UTF-8 text"]


def test_documents_are_filtered_by_their_bytes_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("é") + line("aaa") + line("a"))
    (tmp_path / "b.txt").write_text("aaaa")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "aa", "aaa"]}), tmp_path / "c.parquet")
    found = read([tmp_path], RecordOptions(min_bytes=2, max_bytes=2))
    assert [text for _, _, text in found.documents] == ["é", "aa"]
    assert (found.num_filtered, found.bad) == (5, [])


def test_standard_input_is_json_lines_or_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    given(LINES + b"{}")
    found = read(["-"], RecordOptions(block_bytes=5))
    assert found.documents == [("-", 1, "a"), ("-", 2, "b")]
    assert found.bad == ["standard input:3 (byte 28): no key 'text' (keys: none)"]
    given(b"all of it\n")
    assert read(["-"], input_format="text").documents == [("-", 1, "all of it\n")]
    with pytest.raises(DataError, match="Parquet is read from uncompressed files only"):
        find_inputs(["-"], input_format="parquet")
    with pytest.raises(DataError, match=r"can be read once\n.*2 times"):
        find_inputs(["-", "-"])


def test_conversations_of_files(tmp_path: Path, shared_data: Path) -> None:
    options = RecordOptions(template=open_template("chatml"))
    inputs = find_inputs([shared_data / "sft" / "gsm8k.jsonl"])
    num_counted = num_documents = 0
    for unit in plan_units(inputs, unit_bytes=100_000):
        for part in read_unit(inputs, unit, options=options):
            assert part.num_texts is not None
            assert part.is_counted is not None
            assert part.is_template is not None
            assert not part.bad
            assert part.num_texts.sum() == len(part.texts) == len(part.is_counted) == len(part.is_template)
            num_documents += len(part.records)
            num_counted += int((part.is_counted & ~part.is_template).sum())
    assert num_documents == num_counted == 1500
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt: a text file holds no conversations"):
        read([tmp_path], options)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz", "a.parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / name)
        inputs = find_inputs([tmp_path / name])
        (unit,) = plan_units(inputs, unit_bytes=1 << 20)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=rf"{name}: cannot be read\n.*No such file"):
            list(read_unit(inputs, unit, options=RecordOptions()))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read"):
        check_inputs(inputs, RecordOptions())


def test_parquet_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "b.parquet")
    inputs = find_inputs([tmp_path])
    with pytest.raises(DataError, match=r"b\.parquet: no column 'text'"):
        check_inputs(inputs, RecordOptions())
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"b\.parquet: not a complete Parquet file"):
        plan_units(find_inputs([tmp_path]), unit_bytes=1 << 20)


def test_units_are_larger_than_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(DataError, match=r"--unit-bytes: out of range\n.*3\n.*4 or more"):
        read([tmp_path / "a.jsonl"], unit_bytes=3)


MEMORY = """
import sys
from megads.data.record import RecordOptions
from megads.data.source import find_inputs
from megads.data.unit import plan_units, read_unit

class Stream:
    # a line before, 2 GiB of zeros, a line after
    parts = [b'{"text": "before"}\\n', 2 << 30, b'\\n{"text": "after"}\\n']
    zeros = bytes(1 << 22)

    def read(self, size):
        if self.parts and self.parts[0] == 0:
            self.parts.pop(0)
        if not self.parts:
            return b""
        if isinstance(self.parts[0], bytes):
            part, self.parts[0] = self.parts[0][:size], self.parts[0][size:]
            self.parts[0] = self.parts[0] or 0
            return part
        size = min(size, self.parts[0], len(self.zeros))
        self.parts[0] -= size
        return self.zeros[:size]

class Input:
    buffer = Stream()

sys.stdin = Input()
inputs = find_inputs(["-", *sys.argv[1:]])
for unit in plan_units(inputs, unit_bytes=1 << 40):
    for part in read_unit(inputs, unit, options=RecordOptions()):
        for text in part.texts:
            print(text)
        for bad in part.bad:
            print(bad.record, bad.why)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_a_line_of_two_gigabytes_is_an_error_and_no_kill(tmp_path: Path) -> None:
    """On standard input, and 32 MiB that are packed into kilobytes."""
    packed = gzip.compress(line("before") + bytes(32 << 20) + b"\n" + line("after"), 1)
    (tmp_path / "b.jsonl.gz").write_bytes(packed)
    output = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
    assert output[:-1] == [
        "before",
        f"1 a line of {2 << 30} bytes, above the limit of 8388608 (cut it, or raise --max-document-bytes)",
        "after",
        "before",
        f"1 a line of {32 << 20} bytes, above the limit of 8388608 (cut it, or raise --max-document-bytes)",
        "after",
    ]
    assert int(output[-1]) < 200_000  # KiB, of which 60,000 are imports
