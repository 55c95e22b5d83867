"""Documents beside one another in a row give the gradients of the same documents one by one, in float64.

The documents one by one are made here from the token ids alone: a row each, no neighbour, no document mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.data.corpus import Corpus
from megads.data.indexed import IndexedWriter
from megads.data.loader import Loader
from megads.data.pack import Pack, write_pack
from megads.data.segment import CorpusShare, Segment
from megads.data.sequence import Batch, Packing
from megads.parallel.mesh import build_mesh
from tests.parity.harness import BETA1, VOCAB, Case, Model, make_config

LENGTH = 16
EOD = 2
Part = tuple[list[int], list[int], list[bool]]
"""Inputs, labels, and which labels count."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of 2 to 40 tokens that end with EOD, packed for rows of 16, 12 pages and a token long."""
    prefix = tmp_path_factory.mktemp("corpus") / "c"
    rng = np.random.default_rng(5)
    lengths = [40, 2, 17, 9, 3, 16, 25, 5, 11, 2, 33, 8, 7, 15]
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for length in lengths:
            writer.add(np.append(rng.integers(3, VOCAB, length - 1), EOD), np.array([length]))
        writer.seal()
        writer.publish()
    write_pack(prefix, LENGTH)
    return Corpus(prefix)


def documents(corpus: Corpus) -> list[list[int]]:
    ranges = [corpus.tokens.document_range(number) for number in range(corpus.num_documents)]
    return [corpus.tokens.read(start, stop - start).tolist() for start, stop in ranges]


def parts_of_rows(corpus: Corpus) -> list[Part]:
    """Every document alone; one of more than 16 inputs is cut there."""
    found = []
    for ids in documents(corpus):
        for start in range(0, len(ids) - 1, LENGTH):
            labels = ids[start + 1 : start + LENGTH + 1]
            found.append((ids[start : start + len(labels)], labels, [True] * len(labels)))
    return found


def parts_of_pages(corpus: Corpus) -> list[Part]:
    """Every document alone in every page; what follows an EOD is not predicted."""
    ids = corpus.tokens.read(0, corpus.num_tokens).tolist()
    found = []
    for start in range(0, corpus.num_pages(LENGTH) * LENGTH, LENGTH):
        first = start
        for at in range(start, start + LENGTH):
            if ids[at] == EOD or at == start + LENGTH - 1:
                inputs = ids[first : at + 1]
                found.append((inputs, ids[first + 1 : at + 2], [token != EOD for token in inputs]))
                first = at + 1
    return found


def alone(parts: Sequence[Part]) -> Batch:
    """Each part in a row of its own."""
    tokens, labels = (torch.zeros(len(parts), LENGTH, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(len(parts), LENGTH, dtype=torch.bool)
    for row, (inputs, targets, counts) in enumerate(parts):
        tokens[row, : len(inputs)] = torch.tensor(inputs)
        labels[row, : len(inputs)] = torch.tensor(targets)
        mask[row, : len(inputs)] = torch.tensor(counts)
    positions = torch.arange(LENGTH).expand(len(parts), LENGTH)
    return Batch(tokens, labels, mask, positions, None, torch.arange(len(parts)), 1)


def gradients(batch: Batch, model: Model) -> dict[str, torch.Tensor]:
    """Of one optimizer step on the whole batch, after clipping, in one process."""
    config = make_config(model, Case(), precision="fp64")
    config = replace(
        config,
        batch=replace(config.batch, global_size=batch.tokens.shape[0]),
        data=replace(config.data, sequence_length=LENGTH),
    )
    mesh = build_mesh(layout_of(config, 1), 0)
    trainee = build_model(config, mesh, vocab=VOCAB)
    engine = build_engine(config, trainee, mesh=mesh)
    train_step(
        batch, executor=build_executors(config, trainee, mesh=mesh).train, engine=engine, mesh=mesh, lr=1e-3
    )
    moments = "optim/exp_avg/"
    return {
        piece.name.removeprefix(moments): piece.tensor / (1.0 - BETA1)
        for piece in engine.state()
        if piece.name.startswith(moments)
    }


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    total = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    return max(
        float((found[name] - g).norm()) / max(float(g.norm()), 1e-4 * total) for name, g in expected.items()
    )


CASES: dict[str, Callable[[Corpus], list[Part]]] = {"best_fit": parts_of_rows, "cut": parts_of_pages}


@pytest.mark.parametrize("family", ["llama", "gpt"])
@pytest.mark.parametrize("packing", CASES)
def test_gradients_are_those_of_the_documents_one_by_one(packing: str, family: str, corpus: Corpus) -> None:
    """A step reads a whole epoch; with attention across documents the difference is seen."""
    share = CorpusShare(corpus.path, corpus.fingerprint, 1.0)
    rows = Packing(VOCAB, eod=EOD, document_mask=True, eod_mask_loss=packing == "cut")
    num_rows = Pack(corpus, LENGTH).num_rows if packing == "best_fit" else corpus.num_pages(LENGTH)
    history = [Segment(1, num_rows, LENGTH, LENGTH, (share,), packing=packing)]
    batch = Loader([corpus], history, seed=0, packing=rows, dp_rank=0, dp_size=1).batch(1)
    parts = CASES[packing](corpus)
    assert num_rows < len(parts)
    assert int(batch.mask.sum()) == sum(sum(counts) for _, _, counts in parts)
    model = Model(family)
    expected = gradients(alone(parts), model)
    assert worst(gradients(batch, model), expected) < 1e-12
    crossing = replace(batch, document_ids=None)
    assert worst(gradients(crossing, model), expected) > 1e-3
