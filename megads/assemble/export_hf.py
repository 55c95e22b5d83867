"""A step as a Hugging Face model: weights, config.json, tokenizer, card; compared before it exists.

    step --box by box--> .tmp-DST/ *.safetensors, config.json, tokenizer files
                              |  every bit is read back; transformers' logits and token ids against megads' own
                              v
                         equal: README.md, rename to DST          not equal: an error, and no DST

Lives here: the order of things, the tokenizer's files and the card. Names: checkpoint/hf_names.py; file format:
checkpoint/hf.py; the comparison: compare.py; the way back: import_hf.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megads
from megads.assemble.compare import NOT_COMPARED, SAMPLE, Report, compare, declared, sample_tokens
from megads.checkpoint import hf
from megads.checkpoint.directory import built
from megads.checkpoint.hf_names import Entry, Family, grouped, match
from megads.checkpoint.load import read_box
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.retention import steps_at
from megads.checkpoint.store import Store, write_file
from megads.config.load import load_text
from megads.config.root import Config
from megads.data.segment import Segment, tokens_by
from megads.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_file
from megads.data.tokenizer_json import tokenizer_json
from megads.errors import CheckpointError, DataError
from megads.model.catalog import HUGGING_FACE, complete, describe
from megads.parallel.shard import Box, ShardSpec

BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""What stands beside a tokenizer.json and belongs to it: copied verbatim."""


def export_hf(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer: Path | None = None,
    store: Store | None = None,
) -> Report:
    """Write the newest step under `source` as the Hugging Face model `target`.

    Memory: the largest tensor while writing; then one layer, and the model as transformers loads it.

    Args:
        source: a run, its checkpoints, or a step.
        dtype: of the written weights; None: as they were saved.
        max_shard_bytes: largest safetensors file, unless one tensor is larger.
        tokenizer: file; None: the one that the run's config names.

    Raises:
        CheckpointError: no intact step, a model that Hugging Face has no name for, or one that came out different.
        DataError: the tokenizer is not that of the run.
        OSError: with the path.
    """
    hf.check_installed()
    store = store or Store()
    reader = _open(source, store)
    config = _config_of(reader)
    sequence_length = config.data.sequence_length
    model = complete(config.model, vocab=config.model.vocab or 1, sequence_length=sequence_length)
    spec = describe(model, vocab=1, sequence_length=sequence_length)
    family, parameters = HUGGING_FACE[config.model.family], declared(spec)
    sizes = family.to_config(model)
    _check_step(reader, parameters)
    entries = match(family.rows, parameters)
    kept = dtype or _common_dtype(reader, parameters)
    file = tokenizer_file(tokenizer or Path(config.data.tokenizer))
    words = _tokenizer_of(reader, file)
    tree = {**sizes, **_facts(family, kept, words)}

    def read(entry: Entry) -> Tensor:
        return read_box(reader, f"model/{entry.name}", box=entry.box).to(kept)

    def read_whole(name: str) -> Tensor:
        return read_box(reader, f"model/{name}", box=Box.whole(parameters[name].shape)).to(kept)

    with built(target, store=store) as directory:
        size = hf.write_weights(
            directory, entries, read=read, dtype=kept, max_shard_bytes=max_shard_bytes, store=store
        )
        hf.write_json(directory / "config.json", tree, store=store)
        ends = {key: tree[key] for key in ("bos_token_id", "eos_token_id")}
        hf.write_json(directory / "generation_config.json", ends, store=store)
        notes = _write_tokenizer(directory, file, words, store=store)
        weights = hf.Weights(directory)
        hf.check_names(entries, weights)
        hf.check_values(entries, weights, expected=read)
        comparison = None
        if hf.has_transformers():
            ids = words.encode_batch([SAMPLE])[0].tolist()
            if not notes:
                _check_ids(directory, ids)
            arithmetic = torch.promote_types(kept, torch.float32)  # of the rounded weights
            tokens = sample_tokens(ids, spec)
            comparison = compare(directory, spec, tokens=tokens, read=read_whole, dtype=arithmetic)
        else:
            notes = (*notes, NOT_COMPARED)
        report = Report(len(entries), size, comparison, notes)
        write_file(store, directory / "README.md", blocks=[_card(reader, config, report).encode()])
    return report


def _open(source: Path, store: Store) -> StepReader:
    steps = steps_at(source, store=store)
    if not steps:
        raise CheckpointError(
            f"{source}: no checkpoint there",
            found="no step in it" if source.exists() else "nothing there",
            allowed="the directory of a run, of its checkpoints, or of a step",
        )
    return open_step(steps[0], store=store)


def _config_of(reader: StepReader) -> Config:
    text = reader.objects.get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{reader.path}: the checkpoint holds no config", found=type(text).__name__)
    return load_text(text, source=f"{reader.path}/config")


def _check_step(reader: StepReader, parameters: Mapping[str, ShardSpec]) -> None:
    """The step holds exactly the parameters of its config."""
    saved = {
        n.removeprefix("model/"): t.shape for n, t in reader.manifest.tensors.items() if n[:6] == "model/"
    }
    wanted = {name: spec.shape for name, spec in parameters.items()}
    wrong = sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name))
    if wrong:
        raise CheckpointError(f"{reader.path}: its tensors are not those of its config", found=grouped(wrong))


def _common_dtype(reader: StepReader, parameters: Mapping[str, ShardSpec]) -> torch.dtype:
    """The smallest dtype that holds every weight of the step."""
    found = {getattr(torch, reader.manifest.tensors[f"model/{name}"].dtype) for name in parameters}
    dtype: torch.dtype = functools.reduce(torch.promote_types, found)
    return dtype


def _facts(family: Family, dtype: torch.dtype, tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json says beside the sizes.

    In training a document followed the end of the one before, never another token: that one is also the begin token.
    """
    return {
        "model_type": family.model_type,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": tokenizer.eod,
        "eos_token_id": tokenizer.eod,
    }


def _tokenizer_of(reader: StepReader, file: Path) -> Tokenizer:
    tokenizer = open_tokenizer(file)
    trained_with = str(reader.objects.get("tokenizer", ""))
    if tokenizer.fingerprint != trained_with:
        raise DataError(
            f"{file}: not the tokenizer that the model was trained with",
            found=tokenizer.fingerprint[:16],
            allowed=trained_with[:16] or "none: the checkpoint does not name it",
            do="--tokenizer FILE names the right one",
        )
    return tokenizer


def _write_tokenizer(directory: Path, file: Path, tokenizer: Tokenizer, *, store: Store) -> tuple[str, ...]:
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


def _check_ids(directory: Path, ids: list[int]) -> None:
    found = hf.transformers_ids(directory, SAMPLE)
    if found != ids:
        raise CheckpointError(
            f"{directory}: transformers cuts text into other tokens than megads",
            found=f"{len(found)} ids, beginning with {found[:8]}",
            allowed=f"{len(ids)} ids, beginning with {ids[:8]}",
            do="nothing was written; look at tokenizer_config.json beside the tokenizer",
        )


def _card(reader: StepReader, config: Config, report: Report) -> str:
    """README.md of the model: the facts of the run."""
    history = [Segment.from_dict(row) for row in reader.objects.get("history", ())]
    made_by = reader.objects.get("made_by", {})
    versions = ", ".join(f"{name} {version}" for name, version in made_by.items())
    notes = "".join(f"- {note}\n" for note in report.notes)
    return f"""---
library_name: transformers
tags: [megads]
---
# A {config.model.family} model trained with megads

- steps: {reader.step:,}
- tokens read: {tokens_by(history, reader.step):,}
- trained with {versions}; exported with megads {megads.__version__}
- logits of transformers against megads' own: {report.comparison or "not compared"}
- tokenizer: blake3 {reader.objects.get("tokenizer")}
{notes}
The run's config:

```yaml
{reader.objects["config"].strip()}
```
"""
