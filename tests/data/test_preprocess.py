"""From command line to corpus: golden bytes, any worker count, one clear message for each wrong input."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megads.data import corpus_writer
from megads.data.corpus import Corpus
from megads.data.encode import Encoder
from megads.data.preprocess import main
from megads.data.tokenizer import open_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "preprocess_data.py"
GOLDEN = {"gpt2": "tokenizers/gpt2/tokenizer.json", "sp": "tokenizers/sp_bpe_32k/tokenizer.model"}
Jsonl = Callable[..., Path]


def run(inputs: Path | list[Path], tokenizer: Path, prefix: Path | str, *options: str) -> int:
    paths = [str(path) for path in (inputs if isinstance(inputs, list) else [inputs])]
    return main(["--input", *paths, "--tokenizer", str(tokenizer), "--output-prefix", str(prefix), *options])


def contents(prefix: Path) -> dict[str, bytes]:
    return {
        suffix: Path(f"{prefix}.{suffix}").read_bytes()
        for suffix in ("bin", "idx", "json", "src", "mask", "bad.jsonl")
        if Path(f"{prefix}.{suffix}").exists()
    }


def documents_of(prefix: Path) -> list[list[int]]:
    corpus = Corpus(prefix)
    ranges = [corpus.tokens.document_range(i) for i in range(corpus.num_documents)]
    return [corpus.tokens.read(start, stop - start).tolist() for start, stop in ranges]


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str, engine: str, shared_data: Path, tmp_path: Path) -> None:
    inputs = sorted((shared_data / "valid").glob("*.jsonl"))
    if engine == "reference":
        engine = {"gpt2": "tokenizers", "sp": "sentencepiece"}[name]
    options = ("--append-eod", "--workers", "2", "--unit-bytes", "50000", "--engine", engine)
    assert run(inputs, shared_data / GOLDEN[name], tmp_path / "c", *options) == 0
    golden = shared_data / "golden" / f"valid_{name}_text_document"
    for suffix in ("bin", "idx"):
        assert Path(f"{tmp_path}/c.{suffix}").read_bytes() == Path(f"{golden}.{suffix}").read_bytes(), suffix


def test_documents_are_the_texts_and_empty_ones_are_counted(
    tokenizer_file: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path
) -> None:
    """An empty document gives no sequence, also with --append-eod: Megatron's rule."""
    texts = [sentences[0], "", *sentences[1:20], ""]
    assert run(jsonl("t.jsonl", texts), tokenizer_file, tmp_path / "c", "--append-eod") == 0
    tokenizer = open_tokenizer(tokenizer_file)
    expected = [[*tokenizer.encode_batch([text])[0].tolist(), tokenizer.eod] for text in texts if text]
    assert documents_of(tmp_path / "c") == expected
    manifest = Corpus(tmp_path / "c").manifest
    assert manifest is not None
    assert manifest.num_empty == 2
    assert manifest.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    source = Corpus(tmp_path / "c").source(1)
    assert source is not None
    assert (source.file, source.record) == (str(tmp_path / "t.jsonl"), 3)


def test_without_append_eod_there_is_none(
    tokenizer_file: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path
) -> None:
    assert run(jsonl("t.jsonl", sentences[:9]), tokenizer_file, tmp_path / "c") == 0
    assert open_tokenizer(tokenizer_file).eod not in np.concatenate(documents_of(tmp_path / "c"))


def test_kinds_of_input_give_the_same_tokens(
    sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(sentences[:12]):
        (folder / f"{number:03}.{'py' if number % 2 else 'txt'}").write_text(text, encoding="utf-8")
    assert run(folder, sp_model, tmp_path / "a", "--append-eod") == 0
    assert run(jsonl("t.jsonl", sentences[:12]), sp_model, tmp_path / "b", "--append-eod") == 0
    assert contents(tmp_path / "a")["bin"] == contents(tmp_path / "b")["bin"]


def test_special_text_policies(
    hf_tokenizer: Path, jsonl: Jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl("t.jsonl", ["plain text", "forged <|endoftext|> end"])
    counts = {}
    for policy in ("text", "parse"):
        assert run(path, hf_tokenizer, tmp_path / policy, "--append-eod", "--special-tokens", policy) == 0
        counts[policy] = np.concatenate(documents_of(tmp_path / policy)).tolist().count(0)
    assert counts == {"text": 2, "parse": 3}
    assert run(path, hf_tokenizer, tmp_path / "error", "--special-tokens", "error") == 2
    assert "t.jsonl:2: the text holds the special token '<|endoftext|>'" in capsys.readouterr().err
    assert run(path, hf_tokenizer, tmp_path / "skip", "--special-tokens", "error", "--on-error", "skip") == 0
    assert len(documents_of(tmp_path / "skip")) == 1


def test_bad_lines_stop_the_tool_or_are_counted(
    sp_model: Path, jsonl: Jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n{"text": "tw\n{"text": "three"}\n{"no": "text"}\n' + b'{"text": "five"}\n'
    )
    assert run(path, sp_model, tmp_path / "c") == 2
    message = capsys.readouterr().err
    assert "t.jsonl:2 (byte 16): not JSON" in message
    assert """b'{"text": "tw'""" in message
    assert "Traceback" not in message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.jsonl"]
    assert run(path, sp_model, tmp_path / "c", "--on-error", "skip") == 0
    manifest = Corpus(tmp_path / "c").manifest
    assert manifest is not None
    assert (manifest.documents, manifest.num_bad) == (3, 2)
    places = [line.removeprefix(f"{tmp_path}/").split(": ")[0] for line in manifest.bad]
    assert places == ["t.jsonl:2 (byte 16)", "t.jsonl:4 (byte 47)"]
    listed = [json.loads(line) for line in Path(f"{tmp_path}/c.bad.jsonl").read_text().splitlines()]
    assert [(line["file"], line["record"], line["offset"]) for line in listed] == [
        (str(path), 2, 16),
        (str(path), 4, 47),
    ]
    assert run(jsonl("good.jsonl", ["good"]), sp_model, tmp_path / "c") == 0
    assert not Path(f"{tmp_path}/c.bad.jsonl").exists()


def test_split_is_stable_complete_and_keeps_equal_texts_together(
    sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path
) -> None:
    assert run(jsonl("t.jsonl", sentences), sp_model, tmp_path / "c", "--valid-fraction", "0.25") == 0
    train, valid = documents_of(tmp_path / "c"), documents_of(tmp_path / "c_valid")
    assert len(train) + len(valid) == 400
    assert 60 < len(valid) < 140
    assert (
        run(jsonl("u.jsonl", sentences[::-1] * 2), sp_model, tmp_path / "d", "--valid-fraction", "0.25") == 0
    )
    assert sorted(documents_of(tmp_path / "d_valid")) == sorted(valid * 2)
    assert [Corpus(tmp_path / name).manifest.part for name in ("c", "c_valid")] == ["train", "valid"]  # type: ignore[union-attr]


def test_a_failed_run_leaves_the_old_corpus_alone(
    sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path
) -> None:
    assert run(jsonl("t.jsonl", sentences), sp_model, tmp_path / "c") == 0
    before = contents(tmp_path / "c")
    (tmp_path / "bad.jsonl").write_text("{")
    assert run([tmp_path / "t.jsonl", tmp_path / "bad.jsonl"], sp_model, tmp_path / "c") == 2
    assert contents(tmp_path / "c") == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("options", [(), ("--shuffle-seed", "1")])
def test_leftovers_of_a_killed_run_do_no_harm(
    options: tuple[str, ...], sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path
) -> None:
    path = jsonl("t.jsonl", sentences)
    assert run(path, sp_model, tmp_path / "clean", *options) == 0
    for suffix in ("bin.tmp", "idx.tmp", "lengths.tmp", "src.tmp", "json.tmp", "mask.tmp"):
        (tmp_path / f"c.{suffix}").write_bytes(b"left over")
    assert run(path, sp_model, tmp_path / "c", *options) == 0
    assert contents(tmp_path / "c") == contents(tmp_path / "clean")
    assert not list(tmp_path.glob("c.*tmp"))


def test_a_full_disk_is_reported_and_finished_parts_stay(
    sp_model: Path,
    jsonl: Jsonl,
    sentences: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    path = jsonl("t.jsonl", sentences)
    with monkeypatch.context() as patch:
        patch.setattr(corpus_writer, "sync_file", full)
        assert run(path, sp_model, tmp_path / "c") == 1
    assert "No space left on device\n  do:      repair that" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.parts", "t.jsonl"]
    assert run(path, sp_model, tmp_path / "c") == 0
    assert "going on: 1 of 1 parts are there" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "c.bin",
        "c.idx",
        "c.json",
        "c.src",
        "t.jsonl",
    ]


def test_an_encoder_that_fails_is_not_swallowed(
    sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Encoder, "__call__", fail)
    with pytest.raises(ZeroDivisionError):
        run(jsonl("t.jsonl", sentences), sp_model, tmp_path / "c", "--workers", "2")
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]


def test_wrong_inputs_end_with_2_and_a_message(
    sp_model: Path, jsonl: Jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = jsonl("good.jsonl", ["some text"])
    empty = jsonl("empty.jsonl", ["", ""])
    own = jsonl("own.json", ["some text"])
    bad = jsonl("own_valid.bad.jsonl", ["some text"])
    (tmp_path / "file").write_text("")
    cases = [
        (tmp_path / "absent.jsonl", sp_model, tmp_path / "c", (), "absent.jsonl: no such file"),
        (good, tmp_path / "absent.model", tmp_path / "c", (), "absent.model: no such tokenizer"),
        (good, good, tmp_path / "c", (), "good.jsonl: not a kind of tokenizer"),
        (good, sp_model, tmp_path / "file" / "c", (), "cannot be written"),
        (good, sp_model, f"{tmp_path}/", (), "has no name"),
        (own, sp_model, tmp_path / "own", (), "own.json, which is of no corpus"),
        (good, sp_model, tmp_path / "own", (), "own.json, which is of no corpus"),
        (bad, sp_model, tmp_path / "own_valid", (), "own_valid.bad.jsonl, which is read"),
        (good, sp_model, tmp_path / "c", ("--special-tokens", "parse"), "parse"),
        (good, sp_model, tmp_path / "c", ("--key", "body"), "good.jsonl:1 (byte 0): no key 'body'"),
        (
            good,
            sp_model,
            tmp_path / "c",
            ("--valid-fraction", "1e-9"),
            "the valid part of the split has no documents",
        ),
        (empty, sp_model, tmp_path / "d", (), "no document has any text"),
    ]
    for inputs, tokenizer, prefix, options, message in cases:
        assert run(inputs, tokenizer, prefix, *options) == 2, message
        assert message in capsys.readouterr().err
    for options in (
        ("--workers", "0"),
        ("--valid-fraction", "1"),
        ("--special-tokens", "x"),
        ("--on-error", "x"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(good, sp_model, tmp_path / "c", *options)
        assert stop.value.code == 2
    assert not Path(f"{tmp_path}/c.idx").exists()


def test_the_summary_says_what_was_made(
    sp_model: Path, jsonl: Jsonl, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(jsonl("t.jsonl", [*sentences, ""]), sp_model, tmp_path / "a c", "--valid-fraction", "0.5") == 0
    out = capsys.readouterr().out
    manifest = json.loads(Path(f"{tmp_path}/a c.json").read_text())
    assert f"documents  {manifest['documents']}" in out
    assert f"tokens     {manifest['tokens']:,}" in out
    assert re.search(r"empty +1 document\n", out)
    said = shlex.split(out[out.index("next: ") :])
    assert said[-3:-1] == [f"data.train={tmp_path}/a c", f"data.valid={tmp_path}/a c_valid"]


def test_the_command_itself(sp_model: Path, tmp_path: Path) -> None:
    """As a user calls it: from another folder, no traceback, the exit code of a wrong input, help."""
    (tmp_path / "bad.jsonl").write_text("{")
    argv = [
        sys.executable,
        str(TOOL),
        "--input",
        "bad.jsonl",
        "--tokenizer",
        str(sp_model),
        "--output-prefix",
        "c",
    ]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "bad.jsonl:1 (byte 0): not JSON" in result.stderr
    assert "Traceback" not in result.stderr
    for tool in ("preprocess_data.py", "train_tokenizer.py"):
        shown = subprocess.run(
            [sys.executable, str(ROOT / "tools" / tool), "--help"], capture_output=True, text=True, check=True
        )
        assert "--input" in shown.stdout
