"""The ledger: documents of a step and steps of a document are inverse of one another, under any history."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data.corpus import SOURCE_DTYPE, SOURCE_HEADER, Corpus
from megads.data.indexed import IndexedWriter
from megads.data.ledger import Ledger, documents_named
from megads.data.loader import Loader
from megads.data.origin import warning_of_order
from megads.data.pack import write_pack
from megads.data.sampler import Sampler
from megads.data.segment import CorpusShare, Segment, extend_history
from megads.data.sequence import Packing
from megads.data.stream import TokenRange
from megads.errors import DataError

PAGE = 24
LAST = 14


@dataclass(frozen=True)
class Shelf:
    """Two corpora of documents of 1 to 60 tokens, packed too; token k of a corpus is 1000 * corpus + k."""

    corpora: tuple[Corpus, ...]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    folder = tmp_path_factory.mktemp("shelf")
    for number, name in enumerate("ab"):
        rng = np.random.default_rng(number)
        with IndexedWriter(str(folder / name), np.dtype(np.uint16)) as writer:
            for length in rng.integers(1, 60, 20):
                first = 1000 * number + writer.num_tokens
                writer.add(np.arange(first, first + length), np.array([length]))
            writer.seal()
            writer.publish()
        write_pack(folder / name, PAGE)
    return Shelf(tuple(Corpus(folder / name) for name in "ab"))


changes = st.lists(
    st.tuples(
        st.integers(1, 5),  # steps
        st.integers(1, 6),  # batch
        st.sampled_from([5, 8, 12, 24, 48, 72]),
        st.sampled_from([(1.0, 0.0), (0.3, 1.0), (0.5, 0.5)]),
    ),
    min_size=1,
    max_size=4,
)


Changes = Sequence[tuple[int, int, int, tuple[float, float]]]


def history_of(plan: Changes, shelf: Shelf, packing: str) -> tuple[Segment, ...]:
    history: tuple[Segment, ...] = ()
    step = 1
    for num_steps, batch, length, weights in plan:
        shares = [
            CorpusShare(corpus.path, corpus.fingerprint, weight)
            for corpus, weight in zip(shelf.corpora, weights, strict=True)
            if weight
        ]
        length = PAGE if packing == "best_fit" else length
        skipped = ((3, 5),) if batch == 5 else ()
        wanted = Segment(step, batch, length, PAGE, tuple(shares), skipped, packing=packing)
        history = extend_history(history, wanted)
        step += num_steps
    return history


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@settings(max_examples=40, deadline=None)
@given(plan=changes, data=st.data())
def test_steps_and_documents_are_inverse(
    packing: str, shelf: Shelf, plan: Changes, data: st.DataObject
) -> None:
    history = history_of(plan, shelf, packing)
    ledger = Ledger(shelf.corpora, history, seed=3)
    entries = [entry for step in range(1, LAST + 1) for entry in ledger.step(step)]
    corpus = data.draw(st.sampled_from(shelf.corpora))
    document = data.draw(st.integers(0, corpus.num_documents - 1))
    expected = {
        (entry.step, entry.sample, entry.column + i, entry.start + i)
        for entry in entries
        if (entry.corpus, entry.document) == (corpus.path, document)
        for i in range(entry.stop - entry.start)
    }
    found = ledger.document(corpus, document, last_step=LAST)
    tokens = [
        (entry.step, entry.sample, entry.column + i, entry.start + i)
        for entry in found
        for i in range(entry.stop - entry.start)
    ]
    assert len(tokens) == len(set(tokens))
    assert set(tokens) == expected
    assert [entry.step for entry in found] == sorted(entry.step for entry in found)


def test_what_rested_is_found_in_the_steps_that_read_it(shelf: Shelf) -> None:
    """Samples of 5, of whole pages, then of 5 again: of every document every reading, the rests' too."""
    both = (0.5, 0.5)
    history = history_of([(3, 1, 5, both), (2, 3, 24, both), (2, 2, 5, both), (2, 2, 24, both)], shelf, "cut")
    assert any(share.rests for share in history[1].corpora)
    ledger = Ledger(shelf.corpora, history, seed=3)
    entries = [entry for step in range(1, LAST + 1) for entry in ledger.step(step)]
    for corpus in shelf.corpora:
        found = [
            entry
            for document in range(corpus.num_documents)
            for entry in ledger.document(corpus, document, last_step=LAST)
        ]
        assert sum(entry.stop - entry.start for entry in found) == sum(
            entry.stop - entry.start for entry in entries if entry.corpus == corpus.path
        )


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
@settings(max_examples=25, deadline=None)
@given(plan=changes, step=st.integers(1, LAST))
def test_the_ledger_says_what_the_loader_reads(packing: str, shelf: Shelf, plan: Changes, step: int) -> None:
    history = history_of(plan, shelf, packing)
    rows = Packing(vocab_size=10_000, document_mask=packing == "best_fit")
    batch = Loader(shelf.corpora, history, seed=3, packing=rows, dp_rank=0, dp_size=1).batch(step)
    rest = batch.mask.clone()
    for entry in Ledger(shelf.corpora, history, seed=3).step(step):
        number = [corpus.path for corpus in shelf.corpora].index(entry.corpus)
        first, stop = shelf.corpora[number].tokens.document_range(entry.document)
        assert entry.num_tokens == stop - first
        columns = slice(entry.column, entry.column + entry.stop - entry.start)
        expected = range(1000 * number + first + entry.start, 1000 * number + first + entry.stop)
        assert batch.tokens[entry.sample, columns].tolist() == list(expected)
        assert rest[entry.sample, columns].all()
        rest[entry.sample, columns] = False
    assert not rest.any()


def test_rows_of_documents_read_an_epoch_once(shelf: Shelf) -> None:
    """Every prediction inside a document once an epoch, none from one document into another; padding counts nowhere."""
    corpus = shelf.corpora[0]
    history = history_of([(1, 1, PAGE, (1.0, 0.0))], shelf, "best_fit")
    loader = Loader(
        [corpus], history, seed=3, packing=Packing(10_000, document_mask=True), dp_rank=0, dp_size=1
    )
    epoch = Sampler([corpus], history, seed=3).streams[corpus.fingerprint].epoch // PAGE
    seen: list[int] = []
    for step in range(1, 2 * epoch + 1):
        batch = loader.batch(step)
        assert bool((batch.labels[batch.mask] == batch.tokens[batch.mask] + 1).all())
        assert batch.document_ids is not None
        for token, position in zip(batch.tokens[batch.mask], batch.positions[batch.mask], strict=True):
            first, _ = corpus.tokens.document_range(corpus.tokens.document_at(int(token)))
            assert (int(token) - first) % PAGE == position
        seen += batch.labels[batch.mask].tolist()
    starts = {corpus.tokens.document_range(document)[0] for document in range(corpus.num_documents)}
    labels = [token for token in range(corpus.num_tokens) if token not in starts]
    half = len(labels)
    assert sorted(seen[:half]) == sorted(seen[half:]) == labels
    assert seen[:half] != seen[half:]


def test_corpora_that_are_not_read_have_no_readings(shelf: Shelf) -> None:
    history = history_of([(9, 2, PAGE, (1.0, 0.0))], shelf, "cut")
    sampler = Sampler(shelf.corpora, history, seed=3)
    assert sampler.readings_of(TokenRange(shelf.corpora[1].fingerprint, 0, 50), last_step=9) == []
    with pytest.raises(DataError, match="not given"):
        Sampler(shelf.corpora[1:], history, seed=3)


def test_documents_are_named_by_number_or_by_file_and_record(
    full_corpus: Callable[..., str], shelf: Shelf
) -> None:
    corpus = Corpus(full_corpus("f", [[1, 2, 3]] * 30))
    short = Corpus(full_corpus("short", [[4, 5, 6]] * 8))
    bare = shelf.corpora[0]  # without a .src
    corpora = [bare, short, corpus]
    assert documents_named([corpus], "17") == [(corpus, 17)]
    assert documents_named([short, corpus], "17") == [(corpus, 17)]
    assert documents_named(corpora, "even.jsonl:5") == [(short, 4), (corpus, 4)]
    assert documents_named(corpora, "odd é.jsonl:18") == [(corpus, 17)]
    for name in ("x", "x:", ":3", "a:b"):
        with pytest.raises(DataError, match="not a document"):
            documents_named(corpora, name)
    for name in ("even.jsonl:8", "ven.jsonl:5"):
        with pytest.raises(DataError, match=rf"no document {name} in .*\n.*f\.src: .*even\.jsonl"):
            documents_named(corpora, name)
    with pytest.raises(DataError, match=r"no document 30 in .*\n.*short: 0\.\.7; .*f: 0\.\.29"):
        documents_named([short, corpus], "30")
    with pytest.raises(DataError, match=r"numbers: no corpus has a \.src"):
        documents_named([bare], "x:3")
    with pytest.raises(DataError, match=r"no such document\n.*30\n.*0\.\.29"):
        Ledger(
            [corpus], (Segment(1, 1, 8, 8, (CorpusShare(corpus.path, corpus.fingerprint, 1.0),)),), seed=0
        ).document(corpus, 30, last_step=1)


def test_corpora_that_stand_file_by_file_are_told(full_corpus: Callable[..., str]) -> None:
    mixed = Corpus(full_corpus("mixed", [[1, 2, 3]] * 30))
    assert warning_of_order(mixed) is None  # even and odd documents of two files
    path = Path(f"{mixed.path}.src")
    content = bytearray(path.read_bytes())
    entries = np.frombuffer(content, dtype=SOURCE_DTYPE, count=30, offset=SOURCE_HEADER.size)
    entries["file"] = np.arange(30) // 15
    path.write_bytes(content)
    assert "mixed: documents were not shuffled" in str(warning_of_order(mixed))
    shuffled = Corpus(full_corpus("shuffled", [[1, 2, 3]] * 30, shuffle_seed=1))
    Path(f"{shuffled.path}.src").write_bytes(content)
    assert warning_of_order(shuffled) is None
    entries["file"] = 1
    path.write_bytes(content)
    assert warning_of_order(mixed) is None  # one file
    path.unlink()
    assert warning_of_order(mixed) is None
