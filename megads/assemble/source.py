"""From a config to its data: tokenizer, corpora, history and loaders, checked against each other before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megads.config.data import CorpusConfig, DataConfig
from megads.config.root import Config
from megads.data.blend import CorpusShare, Segment
from megads.data.corpus import Corpus, open_corpora
from megads.data.loader import Loader, ValidLoader
from megads.data.sequence import Packing
from megads.data.tokenizer import Tokenizer, open_tokenizer
from megads.errors import ConfigError
from megads.parallel.mesh import Mesh


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
        DataError: a file that is absent, damaged, or made with another tokenizer.
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
        ),
    )
    for corpus in (*source.train, *source.valid):
        corpus.check_tokenizer(tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
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


def wanted_segment(config: Config, source: Source, *, first_step: int) -> Segment:
    """The row of history that the config asks for from `first_step` on."""
    return Segment(
        first_step=first_step,
        batch_size=config.batch.global_size,
        sequence_length=config.data.sequence_length,
        page=config.data.page or config.data.sequence_length,
        corpora=tuple(
            CorpusShare(share.path, corpus.fingerprint, share.weight)
            for share, corpus in zip(source.shares, source.train, strict=True)
        ),
    )


def build_loader(config: Config, source: Source, *, history: Sequence[Segment], mesh: Mesh) -> Loader:
    """Training batches of this data-parallel rank."""
    group = mesh.group("dp")
    return Loader(
        source.train,
        history,
        seed=config.run.seed,
        packing=source.packing,
        dp_rank=group.rank,
        dp_size=group.size,
    )


def build_valid_loader(config: Config, corpus: Corpus, *, packing: Packing, mesh: Mesh) -> ValidLoader:
    """All of a held-out corpus in order, in batches of `batch.global`."""
    group = mesh.group("dp")
    return ValidLoader(
        corpus,
        packing=packing,
        sequence_length=config.data.sequence_length,
        batch_size=config.batch.global_size,
        dp_rank=group.rank,
        dp_size=group.size,
    )
