"""Config section `data`: corpora, tokenizer and how samples are cut from them."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from megads.config.section import Text, section


@section
class CorpusConfig:
    """One corpus of a blend."""

    path: Text
    """Prefix of the corpus: PREFIX.bin, PREFIX.idx and, if made by megads, PREFIX.json."""
    weight: PositiveFloat = 1.0
    """Share of the samples that come from this corpus, relative to the other weights; with `data.temperature` a
    factor beside that of the size."""
    max_epochs: PositiveFloat | None = None
    """Refuse a run that would read this corpus more often than this; null: no limit."""


@section
class CurriculumConfig:
    """Sequence lengths that grow to `data.sequence_length`; the values are those of DeepSpeed's CurriculumScheduler."""

    kind: Literal["fixed_linear", "fixed_root", "fixed_discrete"]
    """Along a line, along a root, or by a list."""
    start: PositiveInt | None = None
    """Tokens of a sample at first (fixed_linear, fixed_root)."""
    steps: PositiveInt | None = None
    """Steps until `data.sequence_length` is reached (fixed_linear, fixed_root)."""
    unit: PositiveInt = 8
    """Lengths are rounded down to a multiple of this (fixed_linear, fixed_root)."""
    root: PositiveInt = 2
    """Degree of the root (fixed_root): 2 is the square root."""
    lengths: tuple[PositiveInt, ...] = ()
    """Tokens of a sample, one after another (fixed_discrete); `data.sequence_length` follows the last."""
    until: tuple[PositiveInt, ...] = ()
    """The last step of each of `lengths` (fixed_discrete)."""


@section
class DataConfig:
    """Corpora, tokenizer and how samples are cut from them."""

    train: Text | Annotated[tuple[Text | CorpusConfig, ...], MinLen(1)]
    """Training corpora: a PREFIX, a list of them, or a list of {path, weight, max_epochs}."""
    valid: Text | Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """Held-out corpora for validation: a PREFIX or a list of them; null: none."""
    tokenizer: Text
    """Tokenizer file: a SentencePiece `.model` or a Hugging Face `tokenizer.json`."""
    sequence_length: PositiveInt
    """Tokens of one sample."""
    temperature: PositiveFloat | None = None
    """Share of a corpus by its size: tokens ** (1 / temperature); 1 is by size, a high one nearly alike; null: by
    `weight` alone."""
    packing: Literal["cut", "best_fit"] = "cut"
    """How rows are made: `cut` the corpus every `sequence_length` tokens, or `best_fit` whole documents into rows as
    prepared by tools/preprocess_data.py --pack (it needs `document_mask`)."""
    page: PositiveInt | None = None
    """Tokens of the unit that is shuffled, fixed for a run's life: a sample is a whole number of pages or an equal
    cut of one, so that sequence length may change later; null: `data.sequence_length`."""
    document_mask: bool = False
    """Whether attention stays inside a document and positions restart with each document."""
    curriculum: CurriculumConfig | None = None
    """Shorter samples at first: {kind, start, steps, unit, root} or {kind, lengths, until}; tokens are cut otherwise,
    never dropped; null: `sequence_length` from the first step on."""
    eod_mask_loss: bool = False
    """Whether the prediction that follows an end-of-document token is left out of the loss."""
    prefetch: NonNegativeInt = 2
    """Batches that a thread makes ahead of the step that needs them; 0: each when it is needed."""
    check_every: PositiveInt | None = 100
    """Compare the batches of all ranks of a model replica, by hash, each time this many steps begin; null: never."""
