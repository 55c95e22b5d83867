"""`python -m megads data CONFIG --step N | --document ID`: what a step read, and which steps read a document.

The answer is computed from the config, the corpora and `run.dir/history.json`; a run that has not begun has the history
that its config plans. Arithmetic is in `data/ledger.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megads.assemble import source
from megads.config.load import load
from megads.config.root import Config
from megads.data.corpus import Corpus, open_corpora
from megads.data.ledger import Entry, Ledger, documents_named
from megads.data.segment import Segment, segment_at
from megads.errors import ConfigError
from megads.train import history as run_history


def main(argv: Sequence[str]) -> int:
    """Print the documents of a step, or the steps of a document.

    Raises:
        MegadsError: the config, a corpus or the history cannot be used, or there is no such step or document.
    """
    parser = argparse.ArgumentParser(
        prog="megads data", description="Which documents a step read, and which steps read a document."
    )
    parser.add_argument("config", help="YAML file of the run, e.g. run.dir/config.yaml")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--step", type=int, metavar="N", help="the documents of step N")
    asked.add_argument(
        "--document", metavar="ID", help="the steps of a document: FILE:RECORD (line or row), or its number"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the file")
    options = parser.parse_intermixed_args(argv)
    config = load(options.config, options.overrides)
    history = _history(config)
    if options.step is not None:
        lines = _of_step(config, history, options.step)
    else:
        lines = _of_document(config, history, options.document)
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _history(config: Config) -> tuple[Segment, ...]:
    """That of the run's directory, or the planned one."""
    saved = run_history.read(Path(config.run.dir) / "history.json")
    if saved is None:
        return source.wanted_history(config, _corpora(config), saved=(), first_step=1)
    return saved


def _of_step(config: Config, history: Sequence[Segment], step: int) -> Iterator[str]:
    if not 1 <= step <= config.run.steps:
        raise ConfigError("--step is outside the run", found=step, allowed=f"1..{config.run.steps}")
    yield from lines_of_step(_corpora(config), history, step=step, seed=config.run.seed)


def lines_of_step(
    corpora: Sequence[Corpus], history: Sequence[Segment], *, step: int, seed: int
) -> Iterator[str]:
    """The batch of a step in words: a line that names it, and one a piece of a document."""
    segment = segment_at(history, step)
    ledger = Ledger(corpora, history, seed=seed)
    yield f"step {step}: {segment.batch_size} samples of {segment.sequence_length} tokens"
    for entry in ledger.step(step):
        yield f"sample {entry.sample:5} {_words(entry)}"


def _of_document(config: Config, history: Sequence[Segment], name: str) -> Iterator[str]:
    corpora = _corpora(config)
    ledger = Ledger(corpora, history, seed=config.run.seed)
    for corpus, document in documents_named(corpora, name):
        entries = ledger.document(corpus, document, last_step=config.run.steps)
        yield f"{corpus.path} document {document}: {_times(entries)} by step {config.run.steps}"
        for entry in entries:
            yield f"step {entry.step:6} sample {entry.sample:5} {_words(entry)}"


def _corpora(config: Config) -> tuple[Corpus, ...]:
    return open_corpora([share.path for share in source.corpus_shares(config.data)])


def _words(entry: Entry) -> str:
    count = entry.stop - entry.start
    where = "" if entry.source is None else f"  {entry.source.file}:{entry.source.record}"
    return (
        f"columns {entry.column:5}..{entry.column + count - 1:<5} {entry.corpus} document {entry.document}"
        f" tokens {entry.start}..{entry.stop - 1} of {entry.num_tokens}{where}"
    )


def _times(entries: Sequence[Entry]) -> str:
    steps = len({entry.step for entry in entries})
    return f"read in {steps} step{'s' * (steps != 1)}" if steps else "not read"
