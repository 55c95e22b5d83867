"""Input files come in one fixed order, each of a known kind; what is left out is counted."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megads.data.record import STDIN, Kind
from megads.data.source import find_inputs
from megads.errors import DataError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names_of(folder: Path, *paths: str | Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in find_inputs(paths).files]


def test_folders_are_read_in_sorted_order_and_odd_files_counted(tmp_path: Path) -> None:
    make(
        tmp_path,
        *("b/2.txt", "b/10.txt", "a.py", "c.md", ".git/config.txt", "__pycache__/x.py", "b/.hidden.txt"),
        *("x.so", "y", "d.tar.gz", "e.parquet.gz"),
    )
    inputs = find_inputs([tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in inputs.files] == [
        "a.py",
        "c.md",
        "b/10.txt",
        "b/2.txt",
    ]
    assert inputs.sizes == (4, 4, 8, 7)
    assert inputs.left_out == {".so": 1, "(no suffix)": 1, ".gz": 2}


def test_paths_keep_the_order_they_are_given_in(tmp_path: Path) -> None:
    make(tmp_path, "1.txt", "2.txt")
    assert names_of(tmp_path, tmp_path / "2.txt", tmp_path / "1.txt") == ["2.txt", "1.txt"]


def test_globs_are_sorted_and_may_name_folders(tmp_path: Path) -> None:
    make(tmp_path, "b/2.jsonl", "b/1.jsonl", "a/3.jsonl", "a/x.so", "c.jsonl", "odd[1].jsonl")
    assert names_of(tmp_path, f"{tmp_path}/*/*.jsonl") == ["a/3.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert names_of(tmp_path, f"{tmp_path}/**/*.jsonl") == [
        *("a/3.jsonl", "b/1.jsonl", "b/2.jsonl", "c.jsonl", "odd[1].jsonl"),
    ]
    assert names_of(tmp_path, f"{tmp_path}/[ab]") == ["a/3.jsonl", "b/1.jsonl", "b/2.jsonl"]
    assert names_of(tmp_path, tmp_path / "odd[1].jsonl") == ["odd[1].jsonl"]
    with pytest.raises(DataError, match=r"--input .*/\*\.txt: the pattern matches no file"):
        find_inputs([f"{tmp_path}/*.txt"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", Kind("jsonl")),
        ("a.JSON", Kind("jsonl")),
        ("a.jsonl.gz", Kind("jsonl", "gzip")),
        ("a.json.gz", Kind("jsonl", "gzip")),
        ("part-0001.gz", Kind("jsonl", "gzip")),
        ("a.jsonl.zst", Kind("jsonl", "zstd")),
        ("part.zst", Kind("jsonl", "zstd")),
        ("a.parquet", Kind("parquet")),
        ("a.txt.zst", Kind("text", "zstd")),
        ("a.py.gz", Kind("text", "gzip")),
        ("Makefile", Kind("text")),
    ],
)
def test_the_name_tells_the_kind(name: str, kind: Kind, tmp_path: Path) -> None:
    make(tmp_path, name)
    assert find_inputs([tmp_path / name]).kinds == (kind,)


def test_a_declared_format_goes_for_all_files(tmp_path: Path) -> None:
    make(tmp_path, "part-1", "part-2.2024.gz", "c.txt")
    inputs = find_inputs([tmp_path], input_format="jsonl")
    assert inputs.kinds == (Kind("jsonl"), Kind("jsonl"), Kind("jsonl", "gzip"))
    assert not inputs.left_out
    assert find_inputs(["-"], input_format="text").kinds == (Kind("text"),)
    assert find_inputs(["-"]).files == (STDIN,)


def test_kinds_that_cannot_be_are_refused(tmp_path: Path) -> None:
    make(tmp_path, "a.tar.gz", "a.parquet.gz")
    with pytest.raises(
        DataError, match=r"a\.tar\.gz: what the compressed file holds.*\n.*\.tar\n.*\n.*--input-format"
    ):
        find_inputs([tmp_path / "a.tar.gz"])
    with pytest.raises(DataError, match=r"a\.parquet\.gz: Parquet is read from uncompressed files only"):
        find_inputs([tmp_path / "a.parquet.gz"])


def test_corpora_in_a_folder_are_no_inputs_unless_they_are_named(tmp_path: Path) -> None:
    make(tmp_path, "a.jsonl", "a.bin", "a.idx", "a.src", "a.json", "a.bad.jsonl", "a.pack-8", "a.pack-8.json")
    make(tmp_path, "b.parts/job.json", "b.parts/1.part", "b.json", "c.json", "c.bad.jsonl", "d.parts/1.jsonl")
    expected = ["a.jsonl", "c.bad.jsonl", "c.json", "d.parts/1.jsonl"]
    inputs = find_inputs([tmp_path])
    assert [str(file.relative_to(tmp_path)) for file in inputs.files] == expected
    assert inputs.left_out == {}
    assert names_of(tmp_path, f"{tmp_path}/**/*.json*") == expected
    assert names_of(tmp_path, tmp_path / "a.bad.jsonl") == ["a.bad.jsonl"]


def test_missing_and_empty_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_inputs([tmp_path / "absent"])
    with pytest.raises(DataError, match=r"no input files found\n.*empty folders"):
        find_inputs([tmp_path])
    make(tmp_path, "x.so")
    with pytest.raises(DataError, match=r"no input files found\n.*1 \.so\n.*\n.*--input-format"):
        find_inputs([tmp_path])


def test_pipes_and_loops_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    start = time.monotonic()
    with pytest.raises(DataError):
        find_inputs([tmp_path])
    with pytest.raises(DataError):
        find_inputs([tmp_path / "pipe.txt"])
    assert time.monotonic() - start < 10
