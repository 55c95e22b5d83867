"""Tokenizer files of a converted model: copied verbatim, and what transformers needs beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megads.checkpoint import hf
from megads.checkpoint.store import Store, write_file
from megads.data.tokenizer import Tokenizer, open_tokenizer
from megads.data.tokenizer_json import tokenizer_json
from megads.errors import CheckpointError, DataError

BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What stands beside a tokenizer.json and belongs to it: copied verbatim."""


def matching_tokenizer(file: Path, trained_with: str) -> Tokenizer:
    """The tokenizer in `file`.

    Args:
        trained_with: fingerprint of the one that the model was trained with; empty: not known.

    Raises:
        DataError: another one.
    """
    tokenizer = open_tokenizer(file)
    if trained_with and tokenizer.fingerprint != trained_with:
        raise DataError(
            f"{file}: not the tokenizer that the model was trained with",
            found=tokenizer.fingerprint[:16],
            allowed=trained_with[:16],
            do="--tokenizer FILE names the right one",
        )
    return tokenizer


def write_tokenizer(directory: Path, file: Path, *, tokenizer: Tokenizer, store: Store) -> tuple[str, ...]:
    """The tokenizer's files verbatim, and those without which transformers cannot read them; returns what is amiss."""
    copy_tokenizer(directory, file, store=store)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.eod_text,
        "eos_token": tokenizer.eod_text,
        "clean_up_tokenization_spaces": False,
    }
    notes: tuple[str, ...] = ()
    if file.suffix == ".model":
        settings["split_special_tokens"] = True  # as in training: text never becomes a control token
        try:
            write_file(store, directory / "tokenizer.json", blocks=[tokenizer_json(file).encode()])
        except DataError as error:
            settings["tokenizer_class"] = "LlamaTokenizer"
            notes = (f"transformers may cut text into other tokens: {error}",)
    if store.kind(directory / "tokenizer_config.json") == "missing":
        hf.write_json(directory / "tokenizer_config.json", settings, store=store)
    return notes


def copy_tokenizer(directory: Path, file: Path, *, store: Store) -> Path:
    """Copy a tokenizer under its customary name, with what belongs to it; returns its new path."""
    new = directory / ("tokenizer.json" if file.suffix == ".json" else "tokenizer.model")
    write_file(store, new, blocks=[file.read_bytes()])
    if file.suffix == ".json":
        for other in (file.with_name(name) for name in BESIDE_TOKENIZER):
            if other.is_file():
                write_file(store, directory / other.name, blocks=[other.read_bytes()])
    return new


def check_ids(directory: Path, *, text: str, ids: list[int]) -> None:
    """Refuse a directory whose tokenizer, read by transformers, cuts `text` into other ids.

    Raises:
        CheckpointError: with the first ids of both.
    """
    found = hf.transformers_ids(directory, text)
    if found != ids:
        raise CheckpointError(
            f"{directory}: transformers cuts text into other tokens than megads",
            found=f"{len(found)} ids, beginning with {found[:8]}",
            allowed=f"{len(ids)} ids, beginning with {ids[:8]}",
            do="nothing was written; look at tokenizer_config.json beside the tokenizer",
        )
