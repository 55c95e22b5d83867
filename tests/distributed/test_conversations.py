"""Fine-tuning on conversations from file to score: what counts in the loss is the answers and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megads.assemble import source
from megads.config.load import load as load_config
from megads.data import preprocess
from megads.data.corpus import Corpus
from megads.data.ledger import Ledger
from megads.data.loader import Loader
from megads.log import read_metrics
from tests.distributed.job import Home, Layout, command, train

LENGTH = 64
OPTIONS = (
    "data.train=data/chat",
    "data.valid=data/chat_valid",
    "data.eod_mask_loss=false",
    "data.document_mask=true",
    f"data.sequence_length={LENGTH}",
    f"data.page={LENGTH}",
    "run.stop_after=3",
)
NAMES = {"cut": "chat-cut", "best_fit": "chat-rows"}


def conversations() -> list[list[dict[str, str]]]:
    """60 of one to three turns, some with a system message; no two answers are alike."""
    draw = random.Random(0)
    made = []
    for number in range(60):
        turns = [{"role": "system", "content": "be brief"}] if number % 5 == 0 else []
        for _ in range(draw.randint(1, 3)):
            a, b = draw.randint(1, 99), draw.randint(1, 99)
            turns.append({"role": "user", "content": f"what is {a} + {b} in case {number} ?"})
            turns.append({"role": "assistant", "content": f"the sum of case {number} is {a + b} ."})
        made.append(turns)
    return made


@pytest.fixture(scope="module")
def chat(home: Home) -> Path:
    """data/chat and data/chat_valid, whole conversations packed too."""
    path = home.path / "data" / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in conversations()))
    arguments = [
        "--tokenizer",
        str(home.path / "data" / "tokenizer.model"),
        "--append-eod",
        "--input",
        str(path),
    ]
    arguments += ["--output-prefix", str(home.path / "data" / "chat"), "--chat-template", "plain"]
    arguments += ["--valid-fraction", "0.25", "--shuffle-seed", "1", "--pack", str(LENGTH)]
    assert preprocess.main(arguments) == 0
    return path


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_what_counts_is_the_answers(
    packing: str, home: Home, chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch of an epoch: the labels that count are, conversation by conversation, its answers and its end."""
    monkeypatch.chdir(home.path)
    config = load_config(
        "config.yaml", [*OPTIONS, f"data.packing={packing}", "batch.global=2", "run.steps=99"]
    )
    data = source.open_source(config)
    history = source.wanted_history(config, data.train, saved=(), first_step=1)
    loader = Loader(data.train, history, seed=7, packing=data.packing, dp_rank=0, dp_size=1)
    ledger = Ledger(data.train, history, seed=7)
    (corpus,) = data.train
    counted: dict[int, dict[int, int]] = {}  # document -> place -> label
    for step in range(1, 60):
        batch = loader.batch(step)
        for entry in ledger.step(step):
            for at in range(entry.start, min(entry.stop, entry.num_tokens - 1)):
                column = entry.column + at - entry.start
                if batch.mask[entry.sample, column]:
                    label = int(batch.labels[entry.sample, column])
                    counted.setdefault(entry.document, {})[at + 1] = label
    records = conversations()
    whole = 0
    for document, labels in counted.items():
        origin = corpus.source(document)
        assert origin is not None
        answers = [turn["content"] for turn in records[origin.record - 1] if turn["role"] == "assistant"]
        tokens = [token for _, token in sorted(labels.items())]
        text = data.tokenizer.decode([token for token in tokens if token != data.tokenizer.eod])
        is_whole = "".join(text.split()) == "".join("".join(answers).split())
        assert is_whole or packing == "cut"
        assert tokens[-1] == data.tokenizer.eod or packing == "cut"
        whole += is_whole
    assert whole >= 0.8 * corpus.num_documents  # of pages cut anywhere the last one is not read


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_a_run_trains_and_scores_on_answers(packing: str, home: Home, chat: Path) -> None:
    name = NAMES[packing]
    train(home, name, Layout(data=2), *OPTIONS, f"data.packing={packing}")
    records = read_metrics(home.path / name / "metrics.jsonl")
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["valid/chat_valid/loss"] < records[0]["loss"]
    told = command(home.path, "evaluate", name, "--data", "data/chat_valid", "--json")
    assert told.code == 0, told.errors
    score = json.loads(told.said)
    assert score["bits_per_byte"] is None
    corpus = Corpus(home.path / "data" / "chat_valid")
    assert score["tokens"] == int(corpus.read_mask(1, corpus.num_tokens - 1).sum())


def test_a_run_of_rows_is_refused_before_it_starts_where_nothing_is_packed(home: Home, chat: Path) -> None:
    ended = command(
        home.path, "train", "config.yaml", "data.packing=best_fit", "data.document_mask=true", "run.dir=no"
    )
    assert ended.code == 2
    assert "data/train: not packed for rows of 16 tokens" in ended.errors
    assert not (home.path / "no" / "metrics.jsonl").exists()
