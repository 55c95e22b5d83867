"""Engines: the same ids as the tokenizer's library, or another engine; memory bounded; samples compared all along."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data import encode, engine_choice, fast_engine
from megads.data.engine import ReferenceEngine, Tokens, first_different
from megads.data.engine_choice import choose_engine
from megads.data.preprocess import main
from megads.data.probe import probes
from megads.data.tokenizer import encode_parsed, open_tokenizer
from megads.errors import DataError

Jsonl = Callable[..., Path]
TOKENIZERS = ("tokenizers/gpt2/tokenizer.json", "tokenizers/sp_bpe_32k/tokenizer.model")


def array(texts: list[str]) -> pyarrow.LargeStringArray:
    return pyarrow.array(texts, type=pyarrow.large_string())


def tokens(*documents: list[int]) -> Tokens:
    flat = [i for document in documents for i in document]
    return Tokens(np.array(flat, dtype=np.int32), np.array([len(document) for document in documents]))


def test_reference_slices_give_the_ids_of_the_tokenizer(tokenizer_file: Path, sentences: list[str]) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    texts = ["", *sentences[:60], "", "x" * 900]
    with mock.patch("megads.data.engine.SLICE_BYTES", 500), mock.patch("megads.data.engine.SLICE_TEXTS", 7):
        found = ReferenceEngine(tokenizer).encode(array(texts)[1:])
    ids, lengths = tokenizer.encode_batch(texts[1:])
    assert found.ids.tolist() == ids.tolist()
    assert found.lengths.tolist() == lengths.tolist()
    assert ReferenceEngine(tokenizer).encode(array([])).ids.size == 0


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=3), max_size=5),
    st.lists(st.lists(st.integers(0, 2), max_size=3)),
)
@settings(max_examples=200, deadline=None)
def test_the_first_different_text_is_found(left: list[list[int]], right: list[list[int]]) -> None:
    size = min(len(left), len(right))
    expected = next((i for i in range(size) if left[i] != right[i]), None)
    assert first_different(tokens(*left[:size]), tokens(*right[:size])) == expected


@pytest.mark.parametrize("policy", ["text", "parse"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_fast_engine_gives_the_ids_of_the_reference(name: str, policy: str, shared_data: Path) -> None:
    pytest.importorskip("gigatoken")
    if name.endswith(".model") and policy == "parse":
        pytest.skip("SentencePiece never reads control tokens out of text")
    tokenizer = open_tokenizer(shared_data / name, special_tokens=policy)  # type: ignore[arg-type]
    samples = [
        json.loads(line)["text"]
        for file in sorted((shared_data / "valid").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()[:40]
    ]
    choice = choose_engine(tokenizer, "gigatoken", special_tokens=policy, samples=samples)  # type: ignore[arg-type]
    assert choice.engine.name.startswith("gigatoken 0.")
    assert not choice.is_reference
    special = tokenizer.decode([tokenizer.eod])
    found = choice.engine.encode(array([f"a{special}b", ""]))
    assert (tokenizer.eod in found.ids.tolist()) == (policy == "parse")
    assert found.lengths[1] == 0


def test_probes_hold_special_text_and_the_vocabulary(tokenizer_file: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    texts = list(probes(tokenizer))
    assert len(texts) > 200
    assert "" in texts
    seen = "".join(texts)
    for control in tokenizer.control_tokens:
        assert f"a{control}b" in texts
    assert all(tokenizer.decode([i]) in seen for i in range(259, tokenizer.vocab_size, 7))


class Liar(fast_engine.GigatokenEngine):
    """A fast engine that gets one word wrong."""

    def encode(self, texts: pyarrow.LargeStringArray) -> Tokens:
        found = super().encode(texts)
        ids = np.array(found.ids)
        ends = np.cumsum(found.lengths)
        for i, text in enumerate(texts.to_pylist()):
            if "zzyzx" in text:
                ids[ends[i] - 1] += 1
        return Tokens(ids, found.lengths)


def test_an_engine_that_differs_is_not_used_and_that_is_said(tokenizer_file: Path) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = open_tokenizer(tokenizer_file)
    with mock.patch.object(engine_choice, "GigatokenEngine", Liar):
        assert not choose_engine(
            tokenizer, "auto", special_tokens="text"
        ).is_reference  # no probe has the word
        choice = choose_engine(tokenizer, "auto", special_tokens="text", samples=["two zzyzx"])
        assert choice.is_reference
        assert f"its ids differ from those of {choice.reference.name} for 'two zzyzx'" in choice.why
        with pytest.raises(DataError, match=r"--engine gigatoken: cannot be used\n.*two zzyzx"):
            choose_engine(tokenizer, "gigatoken", special_tokens="text", samples=["two zzyzx"])


def test_special_text_must_be_treated_as_the_policy_says(hf_tokenizer: Path) -> None:
    """An engine that parses special text where it should stay text is caught by the probes."""
    pytest.importorskip("gigatoken")

    class Parser(fast_engine.GigatokenEngine):
        def __init__(self, file: Path, *, parse_special_tokens: bool) -> None:
            super().__init__(file, parse_special_tokens=True)

    with mock.patch.object(engine_choice, "GigatokenEngine", Parser):
        assert choose_engine(open_tokenizer(hf_tokenizer), "auto", special_tokens="text").is_reference
        parsing = open_tokenizer(hf_tokenizer, special_tokens="parse")
        assert not choose_engine(parsing, "auto", special_tokens="parse").is_reference


def test_samples_are_compared_all_along_and_a_difference_names_the_document(
    tokenizer_file: Path, jsonl: Jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gigatoken")
    path = jsonl("t.jsonl", [f"text {i}" if i != 250 else "seven zzyzx" for i in range(300)])
    argv = ["--input", str(path), "--tokenizer", str(tokenizer_file), "--output-prefix", str(tmp_path / "c")]
    argv += ["--unit-bytes", "2000"]
    with (
        mock.patch.object(engine_choice, "GigatokenEngine", Liar),
        mock.patch.object(encode, "CHECKED_EVERY", 1),
    ):
        assert main(argv) == 2
    message = capsys.readouterr().err
    assert "t.jsonl:251: the engine gives other ids than the reference" in message
    assert f"--engine {open_tokenizer(tokenizer_file).library}" in message
    assert not Path(f"{tmp_path}/c.idx").exists()


@pytest.mark.parametrize("place", ["start", "end"])
def test_of_large_documents_the_beginning_is_compared(
    place: str, sp_model: Path, jsonl: Jsonl, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gigatoken")
    text = "seven zzyzx " + 300 * "word " if place == "start" else 300 * "word " + "zzyzx"
    argv = ["--input", str(jsonl("t.jsonl", ["fine"] * 120 + [text])), "--tokenizer", str(sp_model)]
    argv += ["--output-prefix", str(tmp_path / "c")]
    patches = (mock.patch.object(encode, "CHECKED_EVERY", 1), mock.patch.object(encode, "CHECKED_BYTES", 80))
    with mock.patch.object(engine_choice, "GigatokenEngine", Liar), patches[0], patches[1]:
        assert main(argv) == (2 if place == "start" else 0)
    assert ("t.jsonl:121: the engine gives other ids" in capsys.readouterr().err) == (place == "start")


def test_kinds_that_the_engine_cannot_read_leave_the_reference(tmp_path: Path, sentences: list[str]) -> None:
    """A Unigram model: gigatoken knows BPE only."""
    pytest.importorskip("gigatoken")
    import sentencepiece

    model = tmp_path / "unigram.model"
    with open(model, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=writer,
            model_type="unigram",
            vocab_size=80,
            minloglevel=2,
        )
    tokenizer = open_tokenizer(model)
    choice = choose_engine(tokenizer, "auto", special_tokens="text")
    assert choice.is_reference
    assert choice.why.startswith("gigatoken is not used: ")
    with pytest.raises(DataError, match="--engine tokenizers: not for this kind"):
        choose_engine(tokenizer, "tokenizers", special_tokens="text")


def test_without_gigatoken_the_reference_is_used_and_the_extra_named(sp_model: Path) -> None:
    with mock.patch.object(engine_choice, "find_spec", lambda name: None):
        choice = choose_engine(open_tokenizer(sp_model), "auto", special_tokens="text")
    assert choice.is_reference
    assert "megads[fast]" in choice.why


def test_a_tokenizer_that_fills_memory_is_replaced(tokenizer_file: Path, sentences: list[str]) -> None:
    pytest.importorskip("gigatoken")
    engine = fast_engine.GigatokenEngine(tokenizer_file, parse_special_tokens=False)
    made = []
    new = engine._new_tokenizer

    def counted() -> object:
        made.append(1)
        return new()

    expected = ReferenceEngine(open_tokenizer(tokenizer_file)).encode(array(sentences))
    with mock.patch.object(engine, "_new_tokenizer", counted), mock.patch.object(fast_engine, "MIN_AGE", 100):
        with mock.patch.object(fast_engine, "PROCESS_BYTES", 1 << 50):
            for _ in range(4):
                found = engine.encode(array(sentences))
                assert first_different(found, expected) is None
        assert not made
        with mock.patch.object(fast_engine, "PROCESS_BYTES", 0):
            for _ in range(4):
                assert first_different(engine.encode(array(sentences)), expected) is None
    assert len(made) == 4


def test_declared_text_is_parsed_whatever_the_policy(tokenizer_file: Path) -> None:
    tokenizer = open_tokenizer(tokenizer_file)
    control, number = next(iter(tokenizer.control_tokens.items()))
    ids = encode_parsed(tokenizer, f"user{control}again{control}").tolist()
    parts = [tokenizer.encode_batch([text])[0].tolist() for text in ("user", "again")]
    assert ids == [*parts[0], number, *parts[1], number]
