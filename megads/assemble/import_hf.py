"""A Hugging Face model as step 0 of megads with a config.yaml; compared before it exists. No pickle is read.

    DST/checkpoints/step-00000000/    the weights, and no optimizer state
        config.yaml                   section `model` from config.json; the rest to be filled in
        tokenizer/                    verbatim

Names: checkpoint/hf_names.py; file format: checkpoint/hf.py; the comparison: compare.py; the other way: export_hf.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megads
from megads.assemble import rules
from megads.assemble.compare import NOT_COMPARED, SAMPLE, Report, compare, declared, sample_tokens
from megads.assemble.export_hf import copy_tokenizer
from megads.checkpoint import hf
from megads.checkpoint.directory import built
from megads.checkpoint.hf_names import Entry, Family, match
from megads.checkpoint.load import read_box
from megads.checkpoint.reader import open_step
from megads.checkpoint.save import save
from megads.checkpoint.store import Store, write_file
from megads.config import document
from megads.config.load import dump, load_text
from megads.data.tokenizer import open_tokenizer
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE, describe
from megads.model.spec import DecoderSpec
from megads.optim.precision import initial_dtype
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box

HEADER = """\
# Imported from Hugging Face. Section `model` is that of the weights. Everything else holds placeholders:
# set run, batch, data and optim before training.
"""
LONGEST_SEQUENCE = 2048  # of the placeholder data.sequence_length


def import_hf(
    source: Path, target: Path, *, tokenizer: Path | None = None, store: Store | None = None
) -> Report:
    """Write the Hugging Face model `source` as `target`: step 0, config.yaml and tokenizer.

    Memory: weights are mapped, not read, unless they must become fp32 (those of 2 bytes); then the model as
    transformers loads it.

    Args:
        tokenizer: file; None: tokenizer.model or else tokenizer.json of `source`.

    Raises:
        CheckpointError: files that are damaged, no safetensors, or of a model that megads does not have.
        ConfigError: config.json holds impossible sizes.
        OSError: with the path.
    """
    hf.check_installed()
    store = store or Store()
    tree = hf.read_json(source / "config.json")
    name, family = _family_of(tree, source)
    weights = hf.Weights(source)
    file = tokenizer or _tokenizer_in(source)
    new_file = None if file is None else target / "tokenizer" / f"tokenizer{file.suffix}"
    is_double = set(weights.dtypes.values()) == {"F64"}
    section = {"family": name, **family.from_config(tree)}
    missing = [f"model.{key}" for key in ("vocab", "max_positions") if section[key] is None]
    if missing:
        raise CheckpointError(
            f"{source / 'config.json'}: leaves out a size", found=f"no {', '.join(missing)}"
        )
    text = _config_text(section, new_file, is_double=is_double)
    config = load_text(text, source=f"{source / 'config.json'}, as a config of megads")
    rules.check(config, 1)
    spec = describe(config.model, vocab=1, sequence_length=config.data.sequence_length)
    _check_sizes(spec, weights)
    parameters, dtype = declared(spec), initial_dtype(config.optim.precision)
    is_short = not any(name.startswith(family.prefix) for name in weights.shapes)
    present = {family.prefix + name for name in weights.shapes} if is_short else weights.shapes
    entries = match(family.rows, parameters, present=present)
    ignored = (
        (*family.ignored, "lm_head.weight") if spec.tied else family.ignored
    )  # some files repeat the embedding
    if is_short:
        entries = tuple(replace(e, foreign=e.foreign.removeprefix(family.prefix)) for e in entries)
        ignored = tuple(pattern.removeprefix(family.prefix) for pattern in ignored)
    hf.check_names(entries, weights, ignored=ignored)

    def values(entry: Entry) -> Tensor:
        return entry.from_foreign(weights.tensor(entry.foreign)).to(dtype)

    words = None if file is None else open_tokenizer(file)
    objects = {
        "config": dump(config),
        "tokenizer": "" if words is None else words.fingerprint,
        "made_by": {"megads": megads.__version__, "torch": str(torch.__version__)},
    }
    notes: tuple[str, ...] = ()
    with built(target, store=store) as directory:
        pieces = [Piece(f"model/{e.name}", e.whole, e.box, values(e)) for e in entries]
        alone = Control(0, 1)
        step = save(directory / "checkpoints", 0, pieces=pieces, objects=objects, control=alone, store=store)
        reader = open_step(step, store=store)
        write_file(store, directory / "config.yaml", blocks=[text.encode()])
        if file is None:
            notes = (*notes, "no tokenizer.model or tokenizer.json there: set data.tokenizer")
        else:
            store.make_directory(directory / "tokenizer")
            copy_tokenizer(directory / "tokenizer", file, store=store)
            store.sync_directory(directory / "tokenizer")

        def read_whole(name: str) -> Tensor:
            return read_box(reader, f"model/{name}", box=Box.whole(parameters[name].shape))

        comparison = None
        if hf.has_transformers():
            ids = list(range(spec.vocab)) if words is None else words.encode_batch([SAMPLE])[0].tolist()
            tokens = sample_tokens(ids, spec)
            comparison = compare(source, spec, tokens=tokens, read=read_whole, dtype=dtype)
        else:
            notes = (*notes, NOT_COMPARED)
    return Report(len(entries), sum(e.box.size for e in entries) * dtype.itemsize, comparison, notes)


def _family_of(tree: Mapping[str, Any], source: Path) -> tuple[str, Family]:
    for name, family in HUGGING_FACE.items():
        if family.model_type == tree.get("model_type"):
            return name, family
    raise CheckpointError(
        f"{source / 'config.json'}: not a family that megads has",
        found=f"model_type {tree.get('model_type')!r}",
        allowed=", ".join(family.model_type for family in HUGGING_FACE.values()),
    )


def _check_sizes(spec: DecoderSpec, weights: hf.Weights) -> None:
    """Refuse sizes that no tensor of the files has, before anything is made in such a size."""
    longest = max((dim for shape in weights.shapes.values() for dim in shape), default=0)
    limits = {"layers": len(weights.shapes), "hidden": longest, "ffn": longest, "vocab": longest}
    for name, limit in limits.items():
        if getattr(spec, name) > limit:
            raise CheckpointError(
                f"config.json and the weights differ in what is model.{name} in megads",
                found=getattr(spec, name),
                allowed=f"at most {limit}, by the tensors in the files",
            )


def _tokenizer_in(source: Path) -> Path | None:
    """The original of a tokenizer.json, where there is one, rather than its translation."""
    files = (source / "tokenizer.model", source / "tokenizer.json")
    return next((file for file in files if file.is_file()), None)


def _config_text(section: Mapping[str, Any], tokenizer: Path | None, *, is_double: bool) -> str:
    """config.yaml: the section `model`, and placeholders that make it a config."""
    longest = section.get("max_positions")
    tree = {
        "run": {"dir": "runs/imported", "steps": 1000},
        "model": dict(section),
        "batch": {"global": 8},
        "data": {
            "train": "PREFIX",
            "tokenizer": "TOKENIZER" if tokenizer is None else str(tokenizer),
            "sequence_length": min(longest, LONGEST_SEQUENCE)
            if isinstance(longest, int)
            else LONGEST_SEQUENCE,
        },
        "optim": {"lr": 1e-5, "precision": "fp64" if is_double else "fp32"},
    }
    return HEADER + document.write(tree)
