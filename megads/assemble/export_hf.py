"""Anything as a Hugging Face model: weights, config.json, tokenizer, card; compared before it exists.

    origin --box by box--> .tmp-DST/ *.safetensors, config.json, tokenizer files
                              |  every bit is read back; transformers' logits and token ids against megads' own
                              v
                         equal: README.md, rename to DST          not equal: an error, and no DST

Lives here: the order of things and the card. Names: checkpoint/hf_names.py; file format: checkpoint/hf.py; the
comparison: compare.py; tokenizer: tokenizer_files.py; the way back: import_hf.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megads
from megads.assemble.compare import NOT_COMPARED, SAMPLE, Comparison, compare, declared, sample_tokens
from megads.assemble.conversion import Renaming, Report
from megads.assemble.origin import Origin
from megads.assemble.tokenizer_files import check_ids, matching_tokenizer, write_tokenizer
from megads.checkpoint import hf
from megads.checkpoint.directory import built
from megads.checkpoint.foreign import Values
from megads.checkpoint.hf_names import Entry, match
from megads.checkpoint.proof import prove
from megads.checkpoint.store import Store, write_file
from megads.config.load import dump
from megads.data.segment import Segment, tokens_by
from megads.data.tokenizer import Tokenizer, tokenizer_file
from megads.model.catalog import HUGGING_FACE


def export_hf(
    origin: Origin,
    target: Path,
    *,
    weights: str = "model",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    store: Store | None = None,
) -> Report:
    """Write `origin` as the Hugging Face model `target`.

    Memory: at most four times the largest tensor; with transformers also the model as it loads it.

    Args:
        weights: their kind: `model`, or an average such as `ema_0.999`.
        dtype: of the written weights; None: as they were saved.
        max_shard_bytes: largest safetensors file, unless one tensor is larger.

    Raises:
        CheckpointError: a model that Hugging Face has no name for, or one that came out different.
        DataError: the tokenizer is not that of the run.
        OSError: with the path.
    """
    hf.check_installed()
    store = store or Store()
    sizes = HUGGING_FACE[origin.config.model.family].to_config(origin.model)
    entries = entries_of(origin)
    values = origin.weights(weights)
    kept = dtype or _common_dtype(values)
    found = None if origin.tokenizer is None else tokenizer_file(origin.tokenizer)
    words = None if found is None else matching_tokenizer(found, str(origin.objects.get("tokenizer", "")))
    ends = {} if words is None else {"bos_token_id": words.eod, "eos_token_id": words.eod}
    # In training a document followed the end of the one before, never another token: that one is also the begin token.

    def read(entry: Entry) -> Tensor:
        return values[entry.name].read(entry.box).to(kept)

    with built(target, store=store) as directory:
        hf.write_weights(
            directory, entries, read=read, dtype=kept, max_shard_bytes=max_shard_bytes, store=store
        )
        kinds = {"model_type": HUGGING_FACE[origin.config.model.family].model_type}
        named = {"torch_dtype": str(kept).removeprefix("torch.")}
        hf.write_json(directory / "config.json", {**sizes, **kinds, **named, **ends}, store=store)
        hf.write_json(directory / "generation_config.json", ends, store=store)
        notes = (*origin.notes, *_write_words(directory, found, words, store=store))
        written = hf.Weights(directory)
        hf.check_names(entries, written)
        proofs = prove((e.foreign, _expected(e, read, kept), _found(e, written, kept)) for e in entries)
        comparison = None
        if hf.has_transformers():
            comparison = _comparison(directory, origin, values, words, kept)
        else:
            notes = (*notes, NOT_COMPARED)
        report = Report(origin, "hf", proofs, comparison, notes)
        report.write(directory, store=store)
        write_file(store, directory / "README.md", blocks=[_card(report).encode()])
    return report


def entries_of(origin: Origin) -> tuple[Entry, ...]:
    """The tensors of Hugging Face's model.

    Raises:
        CheckpointError: a tensor that the family's names leave out.
    """
    return match(HUGGING_FACE[origin.config.model.family].rows, declared(origin.spec))


def renamings(origin: Origin) -> list[Renaming]:
    """The rows of a dry run."""
    return [Renaming(origin.names.get(e.name, ()), e.name, (e.foreign,), e.shape) for e in entries_of(origin)]


def _expected(entry: Entry, read: Any, dtype: torch.dtype) -> Values:
    return Values.of_whole(entry.shape, dtype, whole=lambda: entry.to_foreign(read(entry)))


def _found(entry: Entry, weights: hf.Weights, dtype: torch.dtype) -> Values:
    return Values.of_whole(weights.shapes[entry.foreign], dtype, whole=partial(weights.tensor, entry.foreign))


def _comparison(
    directory: Path, origin: Origin, values: Mapping[str, Values], words: Tokenizer | None, kept: torch.dtype
) -> Comparison:
    """Logits of what was written by transformers, against megads' own of the source, in at least float32."""
    spec = origin.spec
    ids = list(range(spec.vocab)) if words is None else words.encode_batch([SAMPLE])[0].tolist()
    return compare(
        directory,
        spec,
        tokens=sample_tokens(ids, spec),
        read=lambda name: values[name].whole().to(kept),  # of the rounded weights
        dtype=torch.promote_types(kept, torch.float32),
    )


def _write_words(
    directory: Path, file: Path | None, words: Tokenizer | None, *, store: Store
) -> tuple[str, ...]:
    """The tokenizer's files; returns what is amiss with them."""
    if file is None or words is None:
        return ("no tokenizer is known: none was written; --tokenizer FILE names it",)
    notes = write_tokenizer(directory, file, tokenizer=words, store=store)
    if not notes and hf.has_transformers():
        check_ids(directory, text=SAMPLE, ids=words.encode_batch([SAMPLE])[0].tolist())
    return notes


def _common_dtype(values: Mapping[str, Values]) -> torch.dtype:
    """The smallest dtype that holds every weight."""
    dtype: torch.dtype = functools.reduce(torch.promote_types, {value.dtype for value in values.values()})
    return dtype


def _card(report: Report) -> str:
    """README.md of the model: the facts of the run."""
    origin = report.origin
    history = [Segment.from_dict(row) for row in origin.objects.get("history", ())]
    steps = int(origin.objects.get("step", 0))
    versions = ", ".join(f"{name} {version}" for name, version in origin.objects.get("made_by", {}).items())
    notes = "".join(f"- {note}\n" for note in report.notes)
    return f"""---
library_name: transformers
tags: [megads]
---
# A {origin.config.model.family} model trained with megads

- steps: {steps:,}
- tokens read: {tokens_by(history, steps) if history else 0:,}
- trained with {versions}; exported with megads {megads.__version__}
- logits of transformers against megads' own: {report.comparison or "not compared"}
- tokenizer: blake3 {origin.objects.get("tokenizer")}
{notes}
The run's config:

```yaml
{dump(origin.config).strip()}
```
"""
