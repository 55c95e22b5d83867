"""From a config to its data: tokenizer, corpora, history and loaders, checked against each other before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megads.assemble.changes import curriculum_of, ramp_of
from megads.config.data import CorpusConfig, DataConfig
from megads.config.root import Config
from megads.data.blend import temperature_weights
from megads.data.corpus import Corpus, open_corpora
from megads.data.loader import Loader, ValidLoader
from megads.data.origin import warning_of_order
from megads.data.pack import Pack
from megads.data.plan import plan_history
from megads.data.prefetch import Prefetcher
from megads.data.segment import CorpusShare, Segment
from megads.data.sequence import Batch, Packing
from megads.data.tokenizer import Tokenizer, open_tokenizer
from megads.errors import ConfigError
from megads.parallel.mesh import Mesh

_log = logging.getLogger("megads.data")


@dataclass(frozen=True, slots=True)
class Source:
    """The data of a run: open, and fitting each other.

    Attributes:
        shares: `data.train`, one entry a corpus.
        train, valid: open corpora, in the order of the config.
    """

    tokenizer: Tokenizer
    shares: tuple[CorpusConfig, ...]
    train: tuple[Corpus, ...]
    valid: tuple[Corpus, ...]
    packing: Packing

    @property
    def fingerprints(self) -> dict[str, str]:
        """What must be the same on every rank: file -> fingerprint."""
        named = {corpus.path: corpus.fingerprint for corpus in (*self.train, *self.valid)}
        return named | {"data.tokenizer": self.tokenizer.fingerprint}


def open_source(config: Config) -> Source:
    """Open the tokenizer and every corpus that the config names.

    Raises:
        ConfigError: the model's vocabulary is smaller than the tokenizer's.
        DataError: a file that is absent, damaged, made with another tokenizer, or not packed where rows are wanted.
    """
    tokenizer = open_tokenizer(config.data.tokenizer)
    check_vocabulary(config, tokenizer)
    shares = corpus_shares(config.data)
    valid = config.data.valid or ()
    source = Source(
        tokenizer,
        shares,
        open_corpora([share.path for share in shares]),
        open_corpora([valid] if isinstance(valid, str) else list(valid)),
        Packing(
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod if config.data.eod_mask_loss else None,
            document_mask=config.data.document_mask,
            eod_mask_loss=config.data.eod_mask_loss,
            depth=config.model.mtp_layers,
        ),
    )
    for corpus in (*source.train, *source.valid):
        corpus.check_tokenizer(tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
        if config.data.packing == "best_fit":
            Pack(corpus, config.data.sequence_length)  # refuses a corpus that was not packed
    return source


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Refuse a model that has no row for some token id."""
    if config.model.vocab is not None and config.model.vocab < tokenizer.vocab_size:
        raise ConfigError(
            "model.vocab is smaller than the tokenizer's vocabulary",
            found=f"model.vocab {config.model.vocab}, {config.data.tokenizer} has {tokenizer.vocab_size} ids",
            allowed=f"at least {tokenizer.vocab_size}, or null",
        )


def corpus_shares(data: DataConfig) -> tuple[CorpusConfig, ...]:
    """`data.train` in its long form."""
    listed = (data.train,) if isinstance(data.train, str) else data.train
    return tuple(CorpusConfig(path=item) if isinstance(item, str) else item for item in listed)


def warn_of_order(source: Source) -> None:
    """Say which training corpora look as if their documents were never shuffled."""
    for corpus in source.train:
        if warning := warning_of_order(corpus):
            _log.warning("%s", warning)


def wanted_history(
    config: Config,
    corpora: Sequence[Corpus],
    *,
    saved: Sequence[Segment],
    first_step: int,
    skipped_tokens: int = 0,
) -> tuple[Segment, ...]:
    """The history of the whole run: what was `saved`, then from `first_step` on what the config asks for.

    Args:
        corpora: those of `data.train`, in its order.
        skipped_tokens: what no step reads before step `first_step`.

    Raises:
        DataError: the run cannot go on from `saved`.
    """
    weights = [share.weight for share in corpus_shares(config.data)]
    if config.data.temperature is not None:
        sizes = [corpus.num_tokens for corpus in corpora]
        factors = temperature_weights(sizes, config.data.temperature)
        weights = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
    wanted = Segment(
        first_step=first_step,
        batch_size=config.batch.global_size,
        sequence_length=config.data.sequence_length,
        page=config.data.page or config.data.sequence_length,
        corpora=tuple(
            CorpusShare(corpus.path, corpus.fingerprint, weight)
            for corpus, weight in zip(corpora, weights, strict=True)
        ),
        packing=config.data.packing,
    )
    return plan_history(
        saved,
        wanted,
        ramp=ramp_of(config.batch),
        curriculum=curriculum_of(config.data),
        last_step=config.run.steps,
        skipped_tokens=skipped_tokens,
    )


def build_loader(config: Config, source: Source, *, history: Sequence[Segment], mesh: Mesh) -> Loader:
    """Training batches of this data-parallel rank; only ranks with the first or the last stage read tokens."""
    group = mesh.group("dp")
    stages = mesh.layout.stages_of(mesh.group("pp").rank)
    return Loader(
        source.train,
        history,
        seed=config.run.seed,
        packing=source.packing,
        dp_rank=group.rank,
        dp_size=group.size,
        reads_tokens=0 in stages or mesh.layout.num_stages - 1 in stages,
    )


def prefetch(loader: Loader, steps: range, *, depth: int, mesh: Mesh) -> Prefetcher:
    """The batches of `steps`, made ahead by a thread, in page-locked memory if the device is a GPU."""

    def make(step: int) -> Batch:
        batch = loader.batch(step)
        if mesh.device.type != "cuda":
            return batch
        torch.cuda.set_device(mesh.device)  # a thread begins on the first GPU, which may be another rank's
        return batch.pin_memory()

    return Prefetcher(make, steps, depth=depth)


def build_valid_loader(config: Config, corpus: Corpus, *, packing: Packing, mesh: Mesh) -> ValidLoader:
    """All of a held-out corpus in batches of `batch.global`: in order, or in rows of documents (`data.packing`)."""
    group = mesh.group("dp")
    return ValidLoader(
        corpus,
        packing=packing,
        sequence_length=config.data.sequence_length,
        batch_size=config.batch.global_size,
        dp_rank=group.rank,
        dp_size=group.size,
        rows=config.data.packing,
    )
