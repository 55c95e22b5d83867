"""Best-fit rows: every prediction inside a document exactly once, no row too long, as full as one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megads.data import pack as module
from megads.data.corpus import Corpus
from megads.data.pack import Pack, best_fit, write_pack
from megads.errors import DataError


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: the rows' rooms, ascending."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_rows_are_those_of_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, sizes = case
    row_of = best_fit(np.array(sizes, dtype=np.int64), capacity)
    filled = np.bincount(row_of, weights=sizes) if sizes else np.array([])
    assert sorted((capacity - filled).tolist()) == one_by_one(sizes, capacity)
    assert all(filled > 0)


def labels_of(corpus: Corpus, pack: Pack) -> list[int]:
    """The place of every label that rows have."""
    found = []
    for row in range(pack.num_rows):
        pieces = pack.pieces(row)
        assert 0 < sum(count for _, count in pieces) <= pack.length
        for start, count in pieces:
            assert corpus.tokens.document_at(start) == corpus.tokens.document_at(start + count)
            found += range(start + 1, start + count + 1)
    return found


@pytest.mark.parametrize("window", [5, 1 << 20])
def test_every_token_but_the_first_of_a_document_is_a_label_once(
    window: int, bare_corpus: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WINDOW", window)
    monkeypatch.setattr(module, "BLOCK", 7)
    lengths = [1, 2, 33, 8, 9, 16, 17, 3, 5, 1, 64, 12, 4, 4, 4, 30]
    corpus = Corpus(bare_corpus("c", [[7] * length for length in lengths]))
    manifest = write_pack(corpus.path, 16)
    pack = Pack(corpus, 16)
    edges = np.cumsum([0, *lengths])
    firsts = set(edges[:-1].tolist())
    assert sorted(labels_of(corpus, pack)) == [at for at in range(sum(lengths)) if at not in firsts]
    assert (manifest.documents, manifest.num_skipped, manifest.num_cut) == (16, 2, 3)
    assert manifest.tokens == sum(lengths) - 16
    assert manifest.rows == pack.num_rows
    assert json.loads(Path(f"{corpus.path}.pack-16.json").read_text())["fill"] == manifest.fill


def test_packing_twice_gives_the_same_bytes(bare_corpus: Callable[..., str]) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 500).tolist()
    corpus = Corpus(bare_corpus("c", [[1] * length for length in lengths]))
    first, second = write_pack(corpus.path, 128), write_pack(corpus.path, 128)
    assert first == second
    assert first.fill > 0.98


def test_a_place_of_the_corpus_is_found_in_its_row(bare_corpus: Callable[..., str]) -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 50).tolist()
    corpus = Corpus(bare_corpus("c", [[1] * length for length in lengths]))
    write_pack(corpus.path, 32)
    pack = Pack(corpus, 32)
    inputs = {}
    for row in range(pack.num_rows):
        column = 0
        for start, count in pack.pieces(row):
            inputs |= {start + i: (row, column + i) for i in range(count)}
            column += count
    start, stop = corpus.tokens.document_range(7)[0] + 1, corpus.tokens.document_range(20)[1]
    found = {
        piece.start + i: (piece.row, piece.column + i)
        for piece in pack.find(start, stop)
        for i in range(piece.count)
    }
    assert found == {at: place for at, place in inputs.items() if start <= at < stop}


def test_what_does_not_fit_the_corpus_is_refused(bare_corpus: Callable[..., str]) -> None:
    corpus = Corpus(bare_corpus("c", [[1] * 20] * 9))
    with pytest.raises(DataError, match=r"c: not packed for rows of 16.*\n(.*\n)*.*--pack 16"):
        Pack(corpus, 16)
    write_pack(corpus.path, 16)
    other = Corpus(bare_corpus("other", [[1] * 21] * 9))
    for suffix in ("pack-16", "pack-16.json"):
        Path(f"{other.path}.{suffix}").write_bytes(Path(f"{corpus.path}.{suffix}").read_bytes())
    with pytest.raises(DataError, match=r"other\.pack-16\.json: not of this corpus\n.*fingerprint"):
        Pack(other, 16)
    path = Path(f"{corpus.path}.pack-16")
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(DataError, match="damaged"):
        Pack(corpus, 16)
    path.unlink()
    with pytest.raises(DataError, match=r"c\.pack-16: cannot be opened"):
        Pack(corpus, 16)
    with pytest.raises(DataError, match="nothing to pack"):
        write_pack(bare_corpus("single", [[1]] * 9), 16)
    assert not Path(f"{corpus.path}.pack-16.tmp").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}'])
def test_damaged_manifests_are_refused(content: str, bare_corpus: Callable[..., str]) -> None:
    corpus = Corpus(bare_corpus("c", [[1] * 20] * 9))
    write_pack(corpus.path, 16)
    Path(f"{corpus.path}.pack-16.json").write_text(content)
    with pytest.raises(DataError, match=r"pack-16\.json: not readable"):
        Pack(corpus, 16)


def test_many_pieces_fill_rows_nearly_whole() -> None:
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(6, 1.2, 300_000).astype(np.int64) + 1, 4096)
    filled = np.bincount(best_fit(sizes, 4096), weights=sizes)
    assert filled.max() <= 4096
    assert sizes.sum() / (filled.size * 4096) > 0.995


def test_shared_corpus_is_nearly_full(shared_data: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "golden"
    for suffix in ("bin", "idx"):
        source = shared_data / "golden" / f"valid_sp_text_document.{suffix}"
        Path(f"{prefix}.{suffix}").write_bytes(source.read_bytes())
    manifest = write_pack(prefix, 2048)
    assert manifest.fill > 0.97
    assert sorted(labels_of(Corpus(prefix), Pack(Corpus(prefix), 2048)))[:5] == [1, 2, 3, 4, 5]
