"""Fixtures of the data tests: the shared text, two small real tokenizers, corpora made of given ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megads.data.corpus import SOURCE_DTYPE, Corpus
from megads.data.corpus_writer import CorpusWriter, Source
from megads.data.indexed import IndexedWriter
from megads.data.order import Permutation

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "seven",
    "wizards",
    "while",
    "jovial",
    "quartz",
    "again",
]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared data set is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """400 different sentences, with digits, quotes and Chinese."""
    rng = np.random.default_rng(0)
    return [
        f"{i}: "
        + " ".join(rng.choice(WORDS, size=int(rng.integers(3, 30))))
        + (' "你好，世界"' if i % 7 == 0 else ".")
        for i in range(400)
    ]


@pytest.fixture(scope="session")
def sp_model(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """A SentencePiece model of 400 ids, made by the tool."""
    from megads.data.vocabulary import main

    folder = tmp_path_factory.mktemp("sp")
    (folder / "text.txt").write_text("\n".join(sentences), encoding="utf-8")
    argv = [
        "--input",
        str(folder / "text.txt"),
        "--vocab-size",
        "400",
        "--output",
        str(folder / "tokenizer.model"),
    ]
    assert main(argv) == 0
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def hf_tokenizer(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """A byte-level BPE tokenizer.json of at most 400 ids with `<|endoftext|>` = 0."""
    import tokenizers

    engine = tokenizers.ByteLevelBPETokenizer()
    engine.train_from_iterator(
        sentences, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False
    )
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    engine.save(str(path))
    return path


@pytest.fixture(params=["sentencepiece", "huggingface"])
def tokenizer_file(request: pytest.FixtureRequest, sp_model: Path, hf_tokenizer: Path) -> Path:
    """Each of the two small tokenizers in turn."""
    return sp_model if request.param == "sentencepiece" else hf_tokenizer


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write texts as JSON lines: jsonl(name, texts) -> path."""

    def write(name: str, texts: Sequence[str]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def bare_corpus(tmp_path: Path) -> Callable[..., str]:
    """Write a .bin/.idx pair and nothing else: bare_corpus(name, documents, dtype) -> prefix."""

    def write(name: str, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, np.dtype(dtype)) as writer:
            for document in documents:
                writer.add(np.array(document, dtype=np.int64), np.array([len(document)]))
            writer.seal()
            writer.publish()
        return prefix

    return write


@pytest.fixture
def counting_corpus(bare_corpus: Callable[..., str]) -> Callable[..., Corpus]:
    """A corpus whose token k is first + k: counting_corpus(name, num_tokens, first, document)."""

    def make(name: str, num_tokens: int, first: int = 0, document: int = 100) -> Corpus:
        ids = list(range(first, first + num_tokens))
        return Corpus(
            bare_corpus(name, [ids[i : i + document] for i in range(0, num_tokens, document)], "int32")
        )

    return make


@pytest.fixture
def full_corpus(tmp_path: Path) -> Callable[..., str]:
    """A corpus with manifest and sources: full_corpus(name, documents, shuffle_seed) -> prefix.

    `masks` has one mask for each document.
    """

    def write(
        name: str,
        documents: Sequence[Sequence[int]],
        shuffle_seed: int | None = None,
        masks: Sequence[Sequence[int]] | None = None,
    ) -> str:
        prefix = str(tmp_path / name)
        facts = {
            "text_bytes": 1000,
            "append_eod": False,
            "special_tokens": "text",
            "tokenizer_kind": "sentencepiece",
            "tokenizer_fingerprint": "ab" * 32,
            "vocab_size": 50000,
            "part": "all",
            "valid_fraction": None,
            "shuffle_seed": shuffle_seed,
            "num_empty": 0,
            "num_bad": 0,
            "bad": (),
        }
        order = range(len(documents))
        if shuffle_seed is not None:
            order = Permutation(len(documents), shuffle_seed, "documents", 0)(
                np.arange(len(documents))
            ).tolist()
        with CorpusWriter(prefix, np.dtype(np.uint16), has_mask=masks is not None) as writer:
            for number in order:
                document = np.array(documents[number], dtype=np.int64)
                source = np.array([(number % 2, number + 1)], dtype=SOURCE_DTYPE)
                mask = None if masks is None else np.array(masks[number], dtype=np.uint8)
                writer.add(document, np.array([document.size]), sources=source, mask=mask)
            sources = [Source("even.jsonl", 10, "ab" * 32), Source("odd é.jsonl", 20, "cd" * 32)]
            writer.finish(sources, facts)
        return prefix

    return write
