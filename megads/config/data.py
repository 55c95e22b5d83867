"""Config section `data`: corpora, tokenizer and how samples are cut from them."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MinLen
from pydantic import PositiveFloat, PositiveInt

from megads.config.section import Text, section


@section
class CorpusConfig:
    """One corpus of a blend."""

    path: Text
    """Prefix of the corpus: PREFIX.bin, PREFIX.idx and, if made by megads, PREFIX.json."""
    weight: PositiveFloat = 1.0
    """Share of the samples that come from this corpus, relative to the other weights."""
    max_epochs: PositiveFloat | None = None
    """Refuse a run that would read this corpus more often than this; null: no limit."""


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
    page: PositiveInt | None = None
    """Tokens of the unit that is shuffled, fixed for a run's life: a sample is a whole number of pages or an equal
    cut of one, so that sequence length may change later; null: `data.sequence_length`."""
    document_mask: bool = False
    """Whether attention stays inside a document and positions restart with each document."""
    eod_mask_loss: bool = False
    """Whether the prediction that follows an end-of-document token is left out of the loss."""
