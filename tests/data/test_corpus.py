"""Corpora: manifest, fingerprint, sources, shuffle; and a refusal wherever files do not belong together."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megads.data.corpus import SOURCE_DTYPE, Corpus, DocumentSource, open_corpora
from megads.data.corpus_writer import CorpusWriter
from megads.data.indexed import IndexedReader
from megads.errors import DataError

DOCUMENTS = [[100 * i + j for j in range(1 + i % 5)] for i in range(60)]
MakeCorpus = Callable[..., str]


def edit_manifest(prefix: str, **changes: object) -> None:
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def documents_of(corpus: Corpus) -> list[list[int]]:
    ranges = [corpus.tokens.document_range(i) for i in range(corpus.num_documents)]
    return [corpus.tokens.read(start, stop - start).tolist() for start, stop in ranges]


def test_a_written_corpus_opens_and_verifies(full_corpus: MakeCorpus) -> None:
    corpus = Corpus(full_corpus("c", DOCUMENTS))
    corpus.verify()
    assert documents_of(corpus) == DOCUMENTS
    assert corpus.manifest is not None
    assert (corpus.manifest.documents, corpus.manifest.tokens) == (60, 180)
    assert corpus.text_bytes == 1000


def test_sources_tell_file_and_record(full_corpus: MakeCorpus) -> None:
    corpus = Corpus(full_corpus("c", DOCUMENTS))
    assert corpus.source(0) == DocumentSource("even.jsonl", 1)
    assert corpus.source(59) == DocumentSource("odd é.jsonl", 60)
    with pytest.raises(DataError, match=r"document 60"):
        corpus.source(60)
    os.truncate(f"{corpus.path}.src", 30)
    with pytest.raises(DataError, match=r"c\.src: damaged"):
        corpus.source(5)


def test_without_a_manifest_the_same_fingerprint_said_aloud(
    full_corpus: MakeCorpus, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = full_corpus("c", DOCUMENTS)
    with_manifest = Corpus(prefix)
    Path(f"{prefix}.json").unlink()
    Path(f"{prefix}.src").unlink()
    with caplog.at_level(logging.INFO, "megads.data"):
        bare = Corpus(prefix)
    assert "no manifest" in caplog.text
    assert bare.fingerprint == with_manifest.fingerprint
    assert bare.text_bytes is None
    assert bare.source(0) is None
    with pytest.raises(DataError, match="no manifest"):
        bare.verify()


def test_a_flipped_byte_changes_the_fingerprint_and_fails_the_manifest(full_corpus: MakeCorpus) -> None:
    prefix = full_corpus("c", DOCUMENTS)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[77] ^= 4
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"c\.json: the manifest is not that of"):
        Corpus(prefix)


def test_a_flipped_byte_between_the_samples_is_found_by_verify(
    tmp_path: Path, full_corpus: MakeCorpus
) -> None:
    rng = np.random.default_rng(0)
    prefix = full_corpus("c", [rng.integers(0, 50000, 1_000_000).tolist()])
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[6000] ^= 4
    Path(f"{prefix}.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"c\.bin: not the bytes"):
        Corpus(prefix).verify()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"documents": 61}, "documents 60"),
        ({"tokens": 1}, "tokens 180"),
        ({"fingerprint": "00"}, "fingerprint"),
        ({"format": "megads-corpus-9"}, "megads-corpus-9"),
        ({"surprise": 1}, "surprise"),
        ({"tokens": "many"}, "impossible tokens"),
        ({"text_bytes": -1}, "impossible text_bytes"),
        ({"hashes": []}, "impossible hashes"),
    ],
)
def test_manifests_of_other_files_are_refused(changes: dict, named: str, full_corpus: MakeCorpus) -> None:
    prefix = full_corpus("c", DOCUMENTS)
    edit_manifest(prefix, **changes)
    with pytest.raises(DataError, match=rf"c\.json: (?:.*\n)*.*{named}"):
        Corpus(prefix)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_unreadable_manifests_are_refused(content: str, full_corpus: MakeCorpus) -> None:
    prefix = full_corpus("c", DOCUMENTS)
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(DataError, match=r"c\.json"):
        Corpus(prefix)


def test_another_tokenizer_is_refused(full_corpus: MakeCorpus, bare_corpus: MakeCorpus) -> None:
    corpus = Corpus(full_corpus("c", DOCUMENTS))
    corpus.check_tokenizer("ab" * 32, vocab_size=50000)
    with pytest.raises(DataError, match="another tokenizer"):
        corpus.check_tokenizer("cd" * 32, vocab_size=50000)
    bare = Corpus(bare_corpus("b", [[1, 2, 300]]))
    bare.check_tokenizer("cd" * 32, vocab_size=301)
    with pytest.raises(DataError, match=r"b\.bin: token id.*\n.*id 300 at token 2"):
        bare.check_tokenizer("cd" * 32, vocab_size=300)


def test_the_same_corpus_twice_is_refused(full_corpus: MakeCorpus) -> None:
    one, other = full_corpus("a", DOCUMENTS), full_corpus("b", DOCUMENTS[:50])
    assert [corpus.num_documents for corpus in open_corpora([one, other])] == [60, 50]
    with pytest.raises(DataError, match="the same corpus"):
        open_corpora([one, other, full_corpus("c", DOCUMENTS)])


@pytest.mark.parametrize("has_mask", [False, True])
def test_a_failure_leaves_nothing_behind(has_mask: bool, tmp_path: Path) -> None:
    source = np.array([(0, 1)], dtype=SOURCE_DTYPE)
    with (
        pytest.raises(TypeError),
        CorpusWriter(tmp_path / "c", np.dtype(np.uint16), has_mask=has_mask) as writer,
    ):
        mask = np.ones(5, dtype=np.uint8) if has_mask else None
        writer.add(np.arange(5), np.array([5]), sources=source, mask=mask)
        writer.finish([], {})  # facts are missing: fails after the files are sealed
    assert list(tmp_path.iterdir()) == []


def test_a_mask_is_read_by_token(full_corpus: MakeCorpus) -> None:
    masks = [[(number + j) % 2 for j in range(len(document))] for number, document in enumerate(DOCUMENTS)]
    flat = [bit for mask in masks for bit in mask]
    corpus = Corpus(full_corpus("c", DOCUMENTS, None, masks))
    corpus.verify()
    assert corpus.has_mask
    assert corpus.read_mask(0, 180).tolist() == flat
    assert corpus.read_mask(7, 30).tolist() == flat[7:37]
    with pytest.raises(DataError, match="outside the corpus"):
        corpus.read_mask(170, 11)
    plain = Corpus(full_corpus("p", DOCUMENTS))
    assert not plain.has_mask
    assert plain.read_mask(3, 4).tolist() == [1, 1, 1, 1]


def test_a_mask_of_another_corpus_is_refused(full_corpus: MakeCorpus) -> None:
    prefix = full_corpus("c", DOCUMENTS, None, [[1] * len(document) for document in DOCUMENTS])
    mask = Path(f"{prefix}.mask")
    mask.write_bytes(mask.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"c\.mask: not the mask"):
        Corpus(prefix)
    mask.unlink()
    with pytest.raises(DataError, match=r"c\.mask: cannot be opened"):
        Corpus(prefix)
    mask.write_bytes(b"\1" * 180)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(DataError, match=r"c\.mask: a loss mask that no manifest names"):
        Corpus(prefix)


def test_manifests_of_the_first_format_are_read(full_corpus: MakeCorpus) -> None:
    prefix = full_corpus("c", DOCUMENTS)
    path = Path(f"{prefix}.json")
    later = (
        "num_filtered", "num_duplicates", "longest", "engine", "options", "sources", "sources_fingerprint", "job",
        "version",
    )  # fmt: skip
    fields = {name: value for name, value in json.loads(path.read_text()).items() if name not in later}
    path.write_text(json.dumps({**fields, "format": "megads-corpus-1"}))
    manifest = Corpus(prefix).manifest
    assert manifest is not None
    assert (manifest.documents, manifest.engine, manifest.sources) == (60, "", ())


def test_a_new_corpus_replaces_an_old_one_whole(full_corpus: MakeCorpus) -> None:
    old = Corpus(full_corpus("c", DOCUMENTS))
    new = Corpus(full_corpus("c", DOCUMENTS[:10], 1))
    assert old.fingerprint != new.fingerprint
    new.verify()
    assert IndexedReader(new.path).num_documents == 10
