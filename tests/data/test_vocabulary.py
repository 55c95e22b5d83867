"""Learning a vocabulary: the same file each time, every text survives it, wrong inputs are told once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megads.data.tokenizer import open_tokenizer
from megads.data.vocabulary import main

Jsonl = Callable[..., Path]


def train(path: Path, output: Path, vocab_size: int, *options: str) -> int:
    return main(
        ["--input", str(path), "--vocab-size", str(vocab_size), "--output-prefix", str(output), *options]
    )


def test_the_result_is_deterministic_and_falls_back_to_bytes(
    jsonl: Jsonl, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl("t.jsonl", sentences)
    assert train(path, tmp_path / "a", 350) == 0
    assert "--tokenizer" in capsys.readouterr().out
    assert train(path, tmp_path / "b", 350) == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    tokenizer = open_tokenizer(tmp_path / "a.model")
    assert (tokenizer.vocab_size, tokenizer.eod) == (350, 2)
    text = "unseen: żółć \U0001f680\n\tindented   wide  \x7f"
    ids = tokenizer.encode_batch([text])[0].tolist()
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.model", "b.model", "t.jsonl"]


def test_words_are_learned_from_long_lines_too(tmp_path: Path, jsonl: Jsonl) -> None:
    """SentencePiece alone would leave out a line of more than 4 kB without a word."""
    path = jsonl("t.jsonl", ["wizards jovially quaff " * 1000, "x"])
    assert train(path, tmp_path / "a", 310) == 0
    assert open_tokenizer(tmp_path / "a.model").encode_batch([" wizards"])[1][0] <= 4


def test_max_bytes_takes_a_share_of_whole_documents(
    jsonl: Jsonl, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl("t.jsonl", sentences)
    total = path.stat().st_size
    assert train(path, tmp_path / "a", 320, "--max-bytes", str(total // 2)) == 0
    used = int(capsys.readouterr().out.split(" ids from ")[1].split()[0])
    assert 0.3 * total < used < 0.7 * total


def test_wrong_inputs_end_with_2_and_a_message(
    jsonl: Jsonl, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = jsonl("t.jsonl", sentences[:20])
    assert train(path, tmp_path / "a", 20_000) == 2
    assert "allowed: at most" in capsys.readouterr().err
    assert train(path, tmp_path / "a", 262) == 2
    assert "allowed: at least" in capsys.readouterr().err
    assert train(tmp_path / "absent", tmp_path / "a", 300) == 2
    assert "absent: no such file" in capsys.readouterr().err
    assert train(jsonl("empty.jsonl", [""]), tmp_path / "a", 300) == 2
    assert "no text" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text("{")
    assert train(tmp_path / "bad.jsonl", tmp_path / "a", 300) == 2
    assert "bad.jsonl:1 (byte 0): not JSON" in capsys.readouterr().err
    for argv in (
        ["--vocab-size", "100", "--output-prefix", "x"],
        ["--vocab-size", "300", "--output", "x.json"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["--input", str(path), *argv])
        assert stop.value.code == 2
    assert not list(tmp_path.glob("*.model*"))


def test_conversations_are_learned_from_through_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.jsonl"
    talk = [{"role": "user", "content": f"What is {n} and {n + 1}?"} for n in range(50)]
    answers = [{"role": "assistant", "content": f"The answer is {2 * n + 1}."} for n in range(50)]
    lines = [json.dumps({"messages": pair}) for pair in zip(talk, answers, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--input", str(path), "--vocab-size", "300", "--output", str(tmp_path / "chat.model")]
    assert main(arguments) == 2
    assert "chat.jsonl:1" in capsys.readouterr().err
    assert main([*arguments, "--chat-template", "plain"]) == 0
    assert "--chat-template plain" in capsys.readouterr().out
    assert main([*arguments, "--chat-template", "plane"]) == 2
    assert "plane" in capsys.readouterr().err
