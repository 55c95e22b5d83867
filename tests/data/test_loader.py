"""Batches do not depend on the ranks, and nothing is lost or repeated whatever changes during a run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from megads.data.corpus import Corpus
from megads.data.loader import Loader, ValidLoader, check_epochs
from megads.data.segment import CorpusShare, Segment, extend_history
from megads.data.sequence import Batch, Packing
from megads.errors import DataError, LayoutError

PACKING = Packing(vocab_size=1_000_000)
MakeCorpus = Callable[..., Corpus]


def wanted(
    step: int,
    corpora: Sequence[tuple[Corpus, float]],
    *,
    batch: int,
    length: int,
    page: int,
    skipped: tuple = (),
) -> Segment:
    shares = tuple(CorpusShare(corpus.path, corpus.fingerprint, weight) for corpus, weight in corpora)
    return Segment(step, batch, length, page, shares, skipped)


def loader(
    corpora: Sequence[Corpus], history: Sequence[Segment], *, rank: int = 0, size: int = 1, seed: int = 1
) -> Loader:
    return Loader(corpora, history, seed=seed, packing=PACKING, dp_rank=rank, dp_size=size)


def inputs(batches: Iterator[Batch]) -> list[int]:
    return torch.cat([batch.tokens.ravel() for batch in batches]).tolist()


def read_of(corpus: Corpus, share: CorpusShare) -> list[int]:
    """The tokens that must have been read of a corpus when it stands as `share` says; pages are of 64."""
    alone = loader([corpus], (wanted(1, [(corpus, 1.0)], batch=1, length=64, page=64),))
    head = (
        inputs(alone.batch(number) for number in range(1, -(-share.cursor // 64) + 1)) if share.cursor else []
    )
    resting = {place for start, stop in share.rests for place in range(start, stop)}
    return [token for place, token in enumerate(head[: share.cursor]) if place not in resting]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_ranks_together_hold_the_batch_of_one_rank(size: int, counting_corpus: MakeCorpus) -> None:
    corpora = (counting_corpus("a", 5000), counting_corpus("b", 3000, first=10_000))
    history = (wanted(1, [(corpora[0], 0.7), (corpora[1], 0.3)], batch=12, length=32, page=64),)
    whole = loader(corpora, history).batch(5)
    parts = [loader(corpora, history, rank=rank, size=size).batch(5) for rank in range(size)]
    for name in ("tokens", "labels", "mask", "positions", "samples"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
    assert whole.samples.tolist() == list(range(12))


def test_an_epoch_reads_every_page_once_and_labels_follow(counting_corpus: MakeCorpus) -> None:
    corpus = counting_corpus("a", 64 * 40 + 20)
    train = loader([corpus], (wanted(1, [(corpus, 1.0)], batch=4, length=64, page=64),))
    batches = [train.batch(step) for step in range(1, 21)]
    assert all(torch.equal(batch.labels, batch.tokens + 1) for batch in batches)
    seen = inputs(iter(batches))
    assert sorted(seen[: 64 * 40]) == sorted(seen[64 * 40 :]) == list(range(64 * 40))
    assert seen[: 64 * 40] != seen[64 * 40 :] != sorted(seen[64 * 40 :])


@pytest.mark.parametrize(("tail", "num_pages"), [(0, 9), (1, 10), (63, 10), (64, 10), (65, 11)])
def test_the_last_page_needs_the_token_behind_it(
    tail: int, num_pages: int, counting_corpus: MakeCorpus
) -> None:
    """640 + tail tokens: a page whose last label does not exist is no page."""
    corpus = counting_corpus("a", 640 + tail)
    assert corpus.num_pages(64) == num_pages
    train = loader([corpus], (wanted(1, [(corpus, 1.0)], batch=num_pages, length=64, page=64),))
    assert sorted(inputs(iter([train.batch(1)]))) == list(range(64 * num_pages))
    assert train.batch(1).mask.all()


def test_no_token_is_lost_or_repeated_when_everything_changes(counting_corpus: MakeCorpus) -> None:
    """Batch, sequence length, mix and data-parallel size change, also in the middle of a page."""
    a, b = counting_corpus("a", 64 * 300 + 1), counting_corpus("b", 64 * 100 + 1, first=100_000)
    history = extend_history((), wanted(1, [(a, 0.75), (b, 0.25)], batch=6, length=64, page=64))
    history = extend_history(history, wanted(8, [(a, 0.75), (b, 0.25)], batch=5, length=32, page=64))
    history = extend_history(history, wanted(15, [(a, 0.5), (b, 0.5)], batch=4, length=128, page=64))
    history = extend_history(history, wanted(24, [(a, 0.9), (b, 0.1)], batch=12, length=16, page=64))
    sizes = {
        **dict.fromkeys(range(1, 8), 3),
        **dict.fromkeys(range(8, 15), 5),
        **dict.fromkeys(range(15, 24), 4),
    }
    seen: list[int] = []
    for step in range(1, 30):
        size = sizes.get(step, 6)
        known = [segment for segment in history if segment.first_step <= step]
        trains = [loader([a, b], known, rank=rank, size=size) for rank in range(size)]
        seen += inputs(train.batch(step) for train in trains)
    assert max(Counter(seen).values()) == 1
    assert history[2].corpora[1].num_resting == 32  # a page was left half used
    for corpus, share, first in zip((a, b), history[-1].shares(30), (0, 100_000), strict=True):
        mine = [token for token in seen if first <= token < first + 64 * 300]
        assert sorted(mine) == sorted(read_of(corpus, share))


@pytest.mark.parametrize("seed", range(8))
def test_random_histories_read_each_stream_without_gap_or_repeat(
    seed: int, counting_corpus: MakeCorpus
) -> None:
    """Ten random segments; what was read of a corpus is the head of its page stream, but for what still rests."""
    rng = np.random.default_rng(seed)
    a, b, c = (counting_corpus(name, 64 * 30 + 9, first=i * 10_000) for i, name in enumerate("abc"))
    history: tuple[Segment, ...] = ()
    step, seen = 1, []
    for _ in range(10):
        mix = [
            (corpus, float(weight)) for corpus, weight in zip((a, b, c), rng.uniform(0.1, 1, 3), strict=True)
        ]
        mix = [mix[i] for i in rng.permutation(3)[: int(rng.integers(1, 4))]]
        batch, length = int(rng.integers(1, 9)), int(rng.choice([8, 16, 32, 64, 128, 192]))
        history = extend_history(history, wanted(step, mix, batch=batch, length=length, page=64))
        train = loader([a, b, c], history)
        stop = step + int(rng.integers(1, 6))
        seen += inputs(train.batch(number) for number in range(step, stop))
        step = stop
    for share in history[-1].shares(step):
        (corpus,) = (corpus for corpus in (a, b, c) if corpus.fingerprint == share.fingerprint)
        first = int(corpus.tokens.read(0, 1)[0])
        mine = [token for token in seen if first <= token < first + 10_000]
        assert Counter(mine) == Counter(read_of(corpus, share))


def test_the_check_sees_a_cursor_that_is_off(counting_corpus: MakeCorpus) -> None:
    a = counting_corpus("a", 64 * 300 + 1)
    history = extend_history((), wanted(1, [(a, 1.0)], batch=6, length=64, page=64))
    off = Segment(8, 6, 64, 64, (CorpusShare(a.path, a.fingerprint, 1.0, 7 * 6 * 64 - 64),))
    seen = inputs(loader([a], (*history, off)).batch(step) for step in range(1, 12))
    assert max(Counter(seen).values()) == 2


def test_a_skipped_range_is_read_by_nobody(counting_corpus: MakeCorpus) -> None:
    a = counting_corpus("a", 64 * 100 + 1)
    plain = loader([a], (wanted(1, [(a, 1.0)], batch=4, length=64, page=64),))
    skipping = loader([a], (wanted(1, [(a, 1.0)], batch=4, length=64, page=64, skipped=((8, 16),)),))
    assert torch.equal(skipping.batch(2).tokens, plain.batch(2).tokens)
    assert torch.equal(skipping.batch(3).tokens, plain.batch(5).tokens)


def test_the_order_depends_on_the_seed(counting_corpus: MakeCorpus) -> None:
    a = counting_corpus("a", 64 * 100 + 1)
    history = (wanted(1, [(a, 1.0)], batch=8, length=64, page=64),)
    first, second = (loader([a], history, seed=seed).batch(1).tokens for seed in (1, 2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("num_pages", [3, 20])
def test_documents_are_marked_where_they_begin(num_pages: int, counting_corpus: MakeCorpus) -> None:
    """Of three pages some are neighbours in a row: no document is cut between them."""
    corpus = counting_corpus("a", 64 * num_pages + 1, document=24)
    packing = Packing(vocab_size=10_000, document_mask=True)
    history = (wanted(1, [(corpus, 1.0)], batch=5, length=256, page=64),)
    batch = Loader([corpus], history, seed=0, packing=packing, dp_rank=0, dp_size=1).batch(1)
    assert batch.document_ids is not None
    for tokens, documents, positions in zip(batch.tokens, batch.document_ids, batch.positions, strict=True):
        new = [True] + [
            bool(token != before + 1 or token % 24 == 0) for before, token in itertools.pairwise(tokens)
        ]
        assert documents.tolist() == (np.cumsum(new) - 1).tolist()
        assert [position == 0 for position in positions.tolist()] == new


def test_token_ids_outside_the_vocabulary_are_named(bare_corpus: Callable[..., str]) -> None:
    corpus = Corpus(bare_corpus("c", [[1] * 70 + [777] + [1] * 29]))
    history = (wanted(1, [(corpus, 1.0)], batch=4, length=16, page=16),)
    small = Loader([corpus], history, seed=0, packing=Packing(vocab_size=777), dp_rank=0, dp_size=1)
    with pytest.raises(
        DataError, match=r"^sample \d of step \d: .*c\.bin: token id.*\n.*id 777 at token 70\n.*0\.\.776"
    ):
        for step in (1, 2):
            small.batch(step)
    Loader(
        [corpus], history, seed=0, packing=Packing(vocab_size=777), dp_rank=0, dp_size=1, reads_tokens=False
    ).batch(1)


def test_ranks_without_tokens_know_everything_else(full_corpus: Callable[..., str]) -> None:
    """Mask, positions and documents, for pipeline stages in the middle; with eod_mask_loss they read tokens too."""
    documents = [[1, 2, 3, 4, 9], [5, 6, 9], [7, 8, 1, 2, 3, 4, 9]]
    masks = [[0, 0, 0, 1, 1], [0, 1, 1], [0, 0, 0, 0, 0, 1, 1]]
    corpus = Corpus(full_corpus("c", documents * 9, masks=masks * 9))
    history = (wanted(1, [(corpus, 1.0)], batch=4, length=16, page=16),)
    for eod_mask in (False, True):
        packing = Packing(vocab_size=100, eod=9, document_mask=True, eod_mask_loss=eod_mask)
        whole, part = (
            Loader(
                [corpus], history, seed=0, packing=packing, dp_rank=0, dp_size=1, reads_tokens=reads
            ).batch(2)
            for reads in (True, False)
        )
        for name in ("mask", "positions", "document_ids", "samples"):
            assert torch.equal(getattr(whole, name), getattr(part, name)), name
        assert not whole.mask.all()
        assert torch.equal(whole.tokens, part.tokens) == eod_mask
        assert eod_mask or not part.tokens.any()


def test_labels_count_where_the_mask_says(full_corpus: Callable[..., str]) -> None:
    """The label is the next token, so it is that token's byte of PREFIX.mask that counts; also in held-out data."""
    documents = [[10, 11, 12, 13, 14], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36, 37]]
    masks = [[0, 0, 0, 1, 1], [0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    corpus = Corpus(full_corpus("c", documents * 4, masks=masks * 4))
    counted = {13, 14, 22, 34, 35, 36, 37}
    history = (wanted(1, [(corpus, 1.0)], batch=4, length=12, page=12),)
    train = loader([corpus], history).batch(1)
    held_out = ValidLoader(corpus, packing=PACKING, sequence_length=12, batch_size=2, dp_rank=0, dp_size=1)
    for batch in (train, *held_out):
        assert set(batch.labels[batch.mask].tolist()) <= counted
        assert not counted & set(batch.labels[~batch.mask].tolist())
    assert sum(int(batch.mask.sum()) for batch in held_out) == 4 * len(counted)
    assert corpus.text_bytes is not None
    assert held_out.text_bytes is None


def test_wrong_wiring_is_refused(counting_corpus: MakeCorpus) -> None:
    a, b = counting_corpus("a", 1000), counting_corpus("b", 50, first=5000)
    history = (wanted(1, [(a, 1.0)], batch=8, length=32, page=32),)
    with pytest.raises(LayoutError, match=r"batch\.global"):
        loader([a], history, size=3)
    with pytest.raises(DataError, match="not given"):
        loader([b], history)
    with pytest.raises(DataError, match=r"shorter than one page\n.*50 tokens\n.*65"):
        loader([b], (wanted(1, [(b, 1.0)], batch=1, length=64, page=64),))


def test_max_epochs_is_refused_before_the_run(counting_corpus: MakeCorpus) -> None:
    a, b = counting_corpus("a", 64 * 100 + 1), counting_corpus("b", 64 * 10 + 1, first=50_000)
    history = (wanted(1, [(a, 0.5), (b, 0.5)], batch=4, length=64, page=64),)
    limits = {b.path: 2.0}
    check_epochs(history, [a, b], last_step=10, max_epochs=limits)  # 20 samples = exactly 2 epochs
    with pytest.raises(
        DataError, match=r"/b: .*max_epochs\n.*1408 tokens by step 11 = 2\.20 epochs\D.*\n.*1280 tokens"
    ):
        check_epochs(history, [a, b], last_step=11, max_epochs=limits)
    check_epochs(history, [a, b], last_step=11, max_epochs={})


@pytest.mark.parametrize("num_tokens", [2, 63, 64, 65, 66, 1000, 1025])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_held_out_tokens_are_labels_exactly_once(
    num_tokens: int, size: int, counting_corpus: MakeCorpus
) -> None:
    corpus = counting_corpus("v", num_tokens)
    ranks = [
        ValidLoader(corpus, packing=PACKING, sequence_length=64, batch_size=4, dp_rank=rank, dp_size=size)
        for rank in range(size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    labels: list[int] = []
    for number in range(len(ranks[0])):
        for rank in ranks:
            batch = rank.batch(number)
            assert batch.tokens.shape == (4 // size, 64)
            assert torch.equal(batch.labels[batch.mask], batch.tokens[batch.mask] + 1)
            labels += batch.labels[batch.mask].tolist()
    assert labels == list(range(1, num_tokens))
    assert ranks[0].num_labels == num_tokens - 1
    assert sum(int(batch.mask.sum()) for batch in ranks[0]) <= num_tokens - 1


def test_held_out_refusals_and_bytes(counting_corpus: MakeCorpus, full_corpus: Callable[..., str]) -> None:
    options = {"packing": PACKING, "sequence_length": 8, "dp_rank": 0}
    with pytest.raises(DataError, match="nothing to predict"):
        ValidLoader(counting_corpus("v", 1), batch_size=1, dp_size=1, **options)
    with pytest.raises(LayoutError):
        ValidLoader(counting_corpus("v", 50), batch_size=3, dp_size=2, **options)
    assert ValidLoader(counting_corpus("v", 50), batch_size=2, dp_size=2, **options).text_bytes is None
    assert (
        ValidLoader(Corpus(full_corpus("f", [[1, 2, 3]])), batch_size=2, dp_size=2, **options).text_bytes
        == 1000
    )
