"""Both kinds of tokenizer behind one face; special text is a decision; damaged files are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megads.data.tokenizer import open_tokenizer
from megads.errors import DataError


def ids_of(file: Path, text: str, policy: str = "text") -> list[int]:
    return open_tokenizer(file, special_tokens=policy).encode_batch([text])[0].tolist()  # type: ignore[arg-type]


def test_text_survives_the_way_there_and_back(tokenizer_file: Path, sentences: list[str]) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    texts = [*sentences[:50], "", "tab\there\n  indented\r\n", "emoji \U0001f680 é ü", "</s><|endoftext|>"]
    ids, lengths = tokenizer.encode_batch(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert lengths.sum() == ids.size
    assert lengths[50] == 0
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocab_size
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    assert [tokenizer.decode(part.tolist()) for part in parts] == texts


def test_a_batch_equals_its_texts_one_by_one(tokenizer_file: Path, sentences: list[str]) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    ids, _ = tokenizer.encode_batch(sentences[:20])
    assert ids.tolist() == [i for text in sentences[:20] for i in ids_of(tokenizer_file, text)]
    assert tokenizer.encode_batch([])[0].size == 0


def test_special_text_stays_text_by_default(hf_tokenizer: Path, sp_model: Path) -> None:
    assert 0 not in ids_of(hf_tokenizer, "a<|endoftext|>b")
    assert ids_of(hf_tokenizer, "a<|endoftext|>b", "parse").count(0) == 1
    assert 2 not in ids_of(sp_model, "a</s>b")
    with pytest.raises(DataError, match=r"tokenizer\.model.*\n.*parse"):
        open_tokenizer(sp_model, special_tokens="parse")


def test_end_of_document_and_control_tokens(hf_tokenizer: Path, sp_model: Path) -> None:
    sp, hf = open_tokenizer(sp_model), open_tokenizer(hf_tokenizer)
    assert (sp.kind, sp.eod, sp.control_tokens) == ("sentencepiece", 2, {"<s>": 1, "</s>": 2})
    assert (hf.kind, hf.eod, hf.control_tokens) == ("huggingface", 0, {"<|endoftext|>": 0})


@pytest.mark.parametrize("named", ["the", {"content": "the"}])
def test_eos_token_of_the_config_beside_wins(named: object, hf_tokenizer: Path, tmp_path: Path) -> None:
    shutil.copy(hf_tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert open_tokenizer(tmp_path).eod == ids_of(hf_tokenizer, "the")[0]


def test_a_tokenizer_without_eod_says_so_when_asked(hf_tokenizer: Path, tmp_path: Path) -> None:
    import tokenizers

    engine = tokenizers.ByteLevelBPETokenizer()
    engine.train_from_iterator(["some text"], vocab_size=260, show_progress=False)
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.encode_batch(["text"])[0].size
    with pytest.raises(DataError, match="names no end-of-document token"):
        _ = tokenizer.eod


def test_fingerprint_is_of_the_bytes(tokenizer_file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(tokenizer_file, tmp_path))
    assert open_tokenizer(copy).fingerprint == open_tokenizer(tokenizer_file).fingerprint
    if copy.suffix == ".json":
        copy.write_text(copy.read_text() + "\n")
        assert open_tokenizer(copy).fingerprint != open_tokenizer(tokenizer_file).fingerprint


def test_damaged_and_foreign_files_are_named(tokenizer_file: Path, tmp_path: Path) -> None:
    content = tokenizer_file.read_bytes()
    for size in (0, 1, len(content) // 3, len(content) - 40):
        path = tmp_path / tokenizer_file.name
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=path.name):
            open_tokenizer(path)


def test_wrong_paths_are_refused(tmp_path: Path, hf_tokenizer: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer file"):
        open_tokenizer(tmp_path / "absent.model")
    (tmp_path / "vocab.bpe").write_text("x")
    with pytest.raises(DataError, match="not a kind of tokenizer"):
        open_tokenizer(tmp_path / "vocab.bpe")
    with pytest.raises(DataError, match="exactly one"):
        open_tokenizer(tmp_path)
    shutil.copy(hf_tokenizer, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(DataError, match=r"eos_token is not in the vocabulary"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json"):
        open_tokenizer(tmp_path)


def test_shared_tokenizers_open(shared_data: Path) -> None:
    gpt2 = open_tokenizer(shared_data / "tokenizers" / "gpt2" / "tokenizer.json")
    assert (gpt2.vocab_size, gpt2.eod) == (50257, 50256)
    sp = open_tokenizer(shared_data / "tokenizers" / "sp_bpe_32k")
    assert (sp.vocab_size, sp.eod) == (32000, 2)
