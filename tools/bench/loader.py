"""Does the loader keep up: tokens/s of the loader alone, of a plain gather of the same bytes, and of training.

    python -m tools.bench.loader configs/llama-1b.yaml [key=value ...]      the config's own corpora
    python -m tools.bench.loader configs/llama-1b.yaml --synthetic 20       20 M random tokens in a temporary folder

    loader     Loader.batch on this thread                prefetch   through the thread that training uses
    gather     rows of an mmap of PREFIX.bin at random places, as int64: the least that a loader can do
    training   optimizer steps of the config on one batch that is there already, on one device; --steps 0 leaves it out

The last column is the rate over that of training: how many data-parallel ranks one loader could feed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megads.assemble import source, wiring
from megads.assemble.step import train_step
from megads.config.load import load
from megads.config.root import Config
from megads.data.corpus import Corpus, open_corpora
from megads.data.indexed import IndexedWriter, bin_path, token_dtype
from megads.data.loader import Loader
from megads.data.pack import write_pack
from megads.data.segment import Segment
from megads.data.sequence import Batch, Packing
from megads.parallel.mesh import Mesh, build_mesh
from tools.bench.measure import print_table, seconds_of, synchronize

VOCAB = 32000  # of synthetic corpora, and of models whose config leaves it to the tokenizer
MEAN_LENGTH = 700  # tokens of a synthetic document


def make_corpus(prefix: Path, config: Config, *, num_tokens: int) -> Corpus:
    """Random ids in documents of exponential length, packed if the config wants rows."""
    rng = np.random.default_rng(0)
    vocab = config.model.vocab or VOCAB
    with IndexedWriter(prefix, token_dtype(vocab)) as writer:
        while writer.num_tokens < num_tokens:
            lengths = rng.exponential(MEAN_LENGTH, 128).astype(np.int64) + 2
            writer.add(rng.integers(0, vocab, int(lengths.sum())), lengths)
        writer.seal()
        writer.publish()
    if config.data.packing == "best_fit":
        write_pack(prefix, config.data.sequence_length)
    return Corpus(prefix)


def median_rate(call: Callable[[int], object], num_tokens: int, *, repeats: int) -> float:
    """Tokens/s of `call(1)`, `call(2)`, ...: the median."""
    times = []
    for step in range(1, repeats + 1):
        start = time.perf_counter()
        call(step)
        times.append(time.perf_counter() - start)
    return num_tokens / statistics.median(times)


def gather_rate(corpus: Corpus, segment: Segment, *, repeats: int) -> float:
    """Tokens/s of the least that a loader can do: rows at random places of an mmap, to int64 tensors."""
    length = segment.sequence_length
    ids = np.memmap(bin_path(corpus.path), dtype=corpus.tokens.dtype, mode="r")
    places = np.random.default_rng(0).integers(0, ids.size - length - 1, (repeats + 1, segment.batch_size))

    def gather(step: int) -> torch.Tensor:
        rows = [ids[place : place + length + 1] for place in places[step].tolist()]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    return median_rate(gather, segment.batch_size * length, repeats=repeats)


def prefetch_rate(loader: Loader, num_tokens: int, *, config: Config, mesh: Mesh, repeats: int) -> float:
    """Tokens/s of the thread that makes batches ahead when nothing else is done, the first one left out."""
    steps = range(1, repeats + 2)
    with source.prefetch(loader, steps, depth=config.data.prefetch or 1, mesh=mesh) as batches:
        batches.take(1)
        start = time.perf_counter()
        for step in steps[1:]:
            batches.take(step)
        return num_tokens * repeats / (time.perf_counter() - start)


def training_rate(batch: Batch, *, config: Config, mesh: Mesh, steps: int) -> float:
    """Tokens/s of optimizer steps on one batch: the median of `steps` after two."""
    model = wiring.build_model(config, mesh, vocab=config.model.vocab or VOCAB)
    engine = wiring.build_engine(config, model, mesh=mesh)
    executor = wiring.build_executors(config, model, mesh=mesh).train
    here = batch.to(mesh.device)

    def step() -> None:
        train_step(here, executor=executor, engine=engine, mesh=mesh, lr=1e-4)

    for _ in range(2):
        step()
    synchronize(mesh.device)
    return batch.tokens.numel() / statistics.median(seconds_of(step, mesh.device, repeats=steps))


def measure(
    config: Config, corpora: tuple[Corpus, ...], *, device: torch.device, repeats: int, steps: int
) -> None:
    """Print the table for one config."""
    history = source.wanted_history(config, corpora, saved=(), first_step=1)
    segment = history[-1]
    history = (replace(segment, first_step=1),)  # of full size from the first step on
    packing = Packing(vocab_size=1 << 31, document_mask=config.data.document_mask)
    loader = Loader(corpora, history, seed=config.run.seed, packing=packing, dp_rank=0, dp_size=1)
    mesh = build_mesh(wiring.layout_of(config, 1), 0, device=device)
    num_tokens = segment.batch_size * segment.sequence_length
    loader.batch(1)
    gather_rate(corpora[0], segment, repeats=2)
    rates = {
        "gather": gather_rate(corpora[0], segment, repeats=repeats),
        "loader": median_rate(loader.batch, num_tokens, repeats=repeats),
        "prefetch": prefetch_rate(loader, num_tokens, config=config, mesh=mesh, repeats=repeats),
    }
    if steps:
        rates["training"] = training_rate(loader.batch(1), config=config, mesh=mesh, steps=steps)
    rows = [
        [
            name,
            f"{rate / 1e6:.3g}",
            f"{rate / rates['gather']:.2f}",
            f"{rate / rates['training']:.4g}" if steps else "-",
        ]
        for name, rate in rates.items()
    ]
    what = f"{segment.batch_size} samples of {segment.sequence_length} tokens a step, {config.data.packing}"
    notes = [f"{what}, {len(corpora)} corpora of {sum(c.num_tokens for c in corpora) / 1e6:.0f} M tokens"]
    print_table(["", "M tokens/s", "of gather", "of training"], rows, device=device, notes=notes)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Tokens/s of the loader beside training.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50, help="batches that are timed")
    parser.add_argument("--steps", type=int, default=10, help="training steps that are timed; 0: none")
    parser.add_argument(
        "--synthetic", type=float, metavar="M", help="a corpus of so many million random tokens"
    )
    options = parser.parse_intermixed_args()
    one_rank = ["parallel.tensor=1", "parallel.pipeline=1", "parallel.context=1", "parallel.sequence=false"]
    config = load(options.config, [*one_rank, *options.overrides])
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        if options.synthetic:
            corpora: tuple[Corpus, ...] = (
                make_corpus(Path(folder) / "corpus", config, num_tokens=int(options.synthetic * 1e6)),
            )
            data = [f"data.train={corpora[0].path}", "data.valid=null", "data.temperature=null"]
            config = load(options.config, [*one_rank, *options.overrides, *data])
        else:
            corpora = open_corpora([share.path for share in source.corpus_shares(config.data)])
        measure(config, corpora, device=device, repeats=options.repeats, steps=options.steps)


if __name__ == "__main__":
    main()
