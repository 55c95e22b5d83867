"""A SentencePiece model as tokenizer.json gives the same ids everywhere, or is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from megads.data import tokenizer_json as module
from megads.data.tokenizer import open_tokenizer
from megads.data.tokenizer_json import tokenizer_json
from megads.errors import DataError


def compare(file: Path, texts: list[str]) -> tuple[int, int]:
    """(texts, those with other ids or another decoded text)."""
    translated = tokenizers.Tokenizer.from_str(tokenizer_json(file))
    original = open_tokenizer(file)
    wrong = 0
    for text in texts:
        ids = original.encode_batch([text])[0].tolist()
        found = translated.encode(text, add_special_tokens=False).ids
        wrong += ids != found or translated.decode(found, skip_special_tokens=False) != text
    return len(texts), wrong


def test_a_small_model_on_text_full_of_spaces(sp_model: Path, sentences: list[str]) -> None:
    texts = [text.replace(" ", " " * (i % 5)) for i, text in enumerate(sentences)]
    texts += [" " * n + "x" + " " * (40 - n) for n in range(40)] + ["\n\n  \t", "<s></s>", "\u2581"[:0]]
    assert compare(sp_model, texts) == (len(texts), 0)


def test_a_real_model_on_real_text(shared_data: Path) -> None:
    texts = [
        json.loads(line)["text"][:2000]
        for file in sorted((shared_data / "valid").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()[::6]
    ]
    assert len(texts) > 60
    assert compare(shared_data / "tokenizers" / "sp_bpe_32k" / "tokenizer.model", texts) == (len(texts), 0)


def train(folder: Path, sentences: list[str], **options: object) -> Path:
    model = io.BytesIO()
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "vocab_size": 400, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, **(settings | options)
    )
    path = folder / "other.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<|x|>"]},
    ],
    ids=str,
)
def test_other_kinds_are_refused(options: dict[str, object], tmp_path: Path, sentences: list[str]) -> None:
    with pytest.raises(DataError, match="exactly"):
        tokenizer_json(train(tmp_path, sentences, **options))


def test_the_order_of_equal_scores_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences: list[str]
) -> None:
    """With the merges of a run of spaces in the other order the comparison must fail."""
    right = module._merges

    def reversed_spaces(engine: object, vocabulary: dict[str, int]) -> list[str]:
        merges = right(engine, vocabulary)  # type: ignore[arg-type]
        spaces = [merge for merge in merges if not merge.replace(" ", "").strip("\u2581")]
        assert len(spaces) > 1
        return [*reversed(spaces), *(merge for merge in merges if merge not in spaces)]

    indented = [" " * (i % 9) + text for i, text in enumerate(sentences)]
    file = train(tmp_path, indented, allow_whitespace_only_pieces=True)
    tokenizer_json(file)
    monkeypatch.setattr(module, "_merges", reversed_spaces)
    with pytest.raises(DataError, match="exactly"):
        tokenizer_json(file)
