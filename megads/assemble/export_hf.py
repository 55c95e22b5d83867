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
from megads.checkpoint.fp8_blocks import (
    SCALE_SUFFIX,
    ScaleKind,
    quantisation,
    quantise,
    rounded,
    scale_shape,
)
from megads.checkpoint.hf_names import Entry, Family, match, pattern
from megads.checkpoint.proof import prove
from megads.checkpoint.store import Store, write_file
from megads.config.load import dump
from megads.data.segment import Segment, tokens_by
from megads.data.tokenizer import Tokenizer, tokenizer_file
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE

FP8_NOT_COMPARED = (
    "FP8 weights, read back as what they are worth; no logits were compared: transformers computes in FP8"
)


def export_hf(
    origin: Origin,
    target: Path,
    *,
    weights: str = "model",
    dtype: torch.dtype | None = None,
    fp8: ScaleKind | None = None,
    max_shard_bytes: int = 5_000_000_000,
    store: Store | None = None,
) -> Report:
    """Write `origin` as the Hugging Face model `target`.

    Memory: at most four times the largest tensor; with transformers also the model as it loads it.

    Args:
        weights: their kind: `model`, or an average such as `ema_0.999`.
        dtype: of the written weights; None: as they were saved.
        fp8: scales of the projections that are stored in FP8 (fp8_blocks.py), as the family is published; None: none.
        max_shard_bytes: largest safetensors file, unless one tensor is larger.

    Raises:
        CheckpointError: a model that Hugging Face has no name for, or one that came out different.
        DataError: the tokenizer is not that of the run.
        OSError: with the path.
    """
    hf.check_installed()
    store = store or Store()
    family = HUGGING_FACE[origin.config.model.family]
    sizes = family.to_config(origin.model)
    entries = entries_of(origin)
    values = origin.weights(weights)
    kept = dtype or _common_dtype(values)
    found = None if origin.tokenizer is None else tokenizer_file(origin.tokenizer)
    words = None if found is None else matching_tokenizer(found, str(origin.objects.get("tokenizer", "")))
    ends = {} if words is None else {"bos_token_id": words.eod, "eos_token_id": words.eod}
    # In training a document followed the end of the one before, never another token: that one is also the begin token.

    plain = {e.foreign: _whole(e, values[e.name], _stored_dtype(e.name, kept)) for e in entries}
    small = _in_fp8(family, plain, fp8)

    with built(target, store=store) as directory:
        tensors = {n: v for name in plain for n, v in small.get(name, {name: plain[name]}).items()}
        hf.write_weights(directory, tensors, max_shard_bytes=max_shard_bytes, store=store)
        facts: dict[str, Any] = {
            "model_type": family.model_type,
            "torch_dtype": str(kept).removeprefix("torch."),
        }
        if fp8 is not None:
            facts["quantization_config"] = quantisation(fp8)
        hf.write_json(directory / "config.json", {**sizes, **facts, **ends}, store=store)
        hf.write_json(directory / "generation_config.json", ends, store=store)
        notes = (*origin.notes, *_write_words(directory, found, words, store=store))
        written = hf.Weights(directory)
        hf.check_names(entries, written)
        expected = {name: _worth(plain[name], fp8) if name in small else plain[name] for name in plain}
        proofs = prove((name, values, _found(name, written, values)) for name, values in expected.items())
        comparison = None
        if fp8 is not None:
            notes = (*notes, FP8_NOT_COMPARED)
        elif hf.has_transformers():
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


def _whole(entry: Entry, values: Values, dtype: torch.dtype) -> Values:
    """The Hugging Face tensor of an entry."""
    return Values.of_whole(
        entry.shape, dtype, whole=lambda: entry.to_foreign(values.read(entry.box).to(dtype)).contiguous()
    )


def _found(name: str, weights: hf.Weights, expected: Values) -> Values:
    return Values.of_whole(weights.shapes[name], expected.dtype, whole=partial(weights.tensor, name))


def _in_fp8(
    family: Family, plain: Mapping[str, Values], kind: ScaleKind | None
) -> dict[str, dict[str, Values]]:
    """Name of a matrix that is stored in FP8 -> what is stored of it: values and scales.

    Raises:
        CheckpointError: a family that is not published in FP8.
    """
    if kind is None:
        return {}
    names = [name for name in plain if pattern(name) in family.fp8]
    if not names:
        raise CheckpointError(
            f"{family.model_type} is not published in FP8 with block scales",
            allowed="model.family deepseek_v3",
        )
    return {name: _stored(name, plain[name], kind) for name in names}


def _stored(name: str, values: Values, kind: ScaleKind) -> dict[str, Values]:
    def numbers() -> Tensor:
        return quantise(values.whole(), kind=kind).values

    def scales() -> Tensor:
        return quantise(values.whole(), kind=kind).scales

    return {
        name: Values.of_whole(values.shape, torch.float8_e4m3fn, whole=numbers),
        name + SCALE_SUFFIX: Values.of_whole(scale_shape(values.shape), torch.float32, whole=scales),
    }


def _worth(values: Values, kind: ScaleKind | None) -> Values:
    """What a matrix is worth in FP8."""
    if kind is None:
        return values
    return Values.of_whole(values.shape, torch.float32, whole=lambda: rounded(values.whole(), kind=kind))


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
        read=lambda name: values[name].whole().to(_stored_dtype(name, kept)),  # of the rounded weights
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


def _stored_dtype(name: str, kept: torch.dtype) -> torch.dtype:
    """Of a written tensor: a router's bias moves by thousandths, which 16 bits would swallow; transformers knows."""
    return torch.promote_types(kept, torch.float32) if name.endswith("router.bias") else kept


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
