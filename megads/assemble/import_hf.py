"""A Hugging Face model as the origin of a conversion. No pickle is read.

Names and file format: checkpoint/hf_names.py, checkpoint/hf.py; what is made of it: import_checkpoint.py, export_*.py;
the other way: export_hf.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megads.assemble.compare import declared
from megads.assemble.origin import Hints, Origin, foreign_config, made_by
from megads.checkpoint import hf
from megads.checkpoint.foreign import Values
from megads.checkpoint.hf_names import Entry, Family, match
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE
from megads.model.spec import DecoderSpec
from megads.optim.precision import initial_dtype
from megads.parallel.shard import Box, ShardSpec


def open_hf(path: Path, hints: Hints) -> Origin:
    """Open the model in directory `path`; headers are read, weights are mapped.

    Raises:
        CheckpointError: files that are damaged, no safetensors, or of a model that megads does not have.
        ConfigError: config.json holds impossible sizes.
    """
    hf.check_installed()
    where = path / "config.json"
    model = read_hf_config(where)
    weights = hf.Weights(path)
    tokenizer = hints.tokenizer or tokenizer_in(path)
    is_double = set(weights.dtypes.values()) == {"F64"}
    config = foreign_config(model.section, origin=str(where), tokenizer=tokenizer, is_double=is_double)
    origin = Origin("hf", path, config, {}, {}, {"made_by": made_by()}, tokenizer)
    _check_sizes(origin.spec, weights)
    parameters, dtype = declared(origin.spec), initial_dtype(config.optim.precision)
    named = named_entries(model.family, parameters, present=weights.shapes, is_tied=origin.spec.tied)
    hf.check_names(named.entries, weights, ignored=(*named.ignored, *named.copies))
    hf.check_copies(weights, named.copies)
    parts = {
        e.foreign: Values.of_whole(e.shape, dtype, whole=partial(weights.tensor, e.foreign))
        for e in named.entries
    }
    tensors = {f"model/{n}": v for n, v in joined(named.entries, parts, dtype=dtype).items()}
    return replace(origin, tensors=tensors, names=names_of(named.entries))


@dataclass(frozen=True, slots=True)
class HuggingFaceModel:
    """What a config.json says.

    Attributes:
        family: its names there.
        section: config section `model`.
    """

    family: Family
    section: Mapping[str, Any]


def read_hf_config(path: Path) -> HuggingFaceModel:
    """The family and the sizes of a config.json.

    Raises:
        CheckpointError: no readable file, a family that megads does not have, or one that it computes otherwise.
    """
    tree = hf.read_json(path)
    for name, family in HUGGING_FACE.items():
        if family.model_type == tree.get("model_type"):
            return HuggingFaceModel(family, {"family": name, **family.from_config(tree)})
    raise CheckpointError(
        f"{path}: not a family that megads has",
        found=f"model_type {tree.get('model_type')!r}",
        allowed=", ".join(family.model_type for family in HUGGING_FACE.values()),
    )


@dataclass(frozen=True, slots=True)
class NamedEntries:
    """The tensors of a model under the names that are there, and patterns of others.

    Attributes:
        ignored: patterns of those that are no weights.
        copies: patterns of those that repeat one -> that one's name.
    """

    entries: tuple[Entry, ...]
    ignored: tuple[str, ...]
    copies: Mapping[str, str]


def named_entries(
    family: Family, parameters: Mapping[str, ShardSpec], *, present: Collection[str], is_tied: bool
) -> NamedEntries:
    """The family's names of the parameters, shortened where those that are `present` leave out its prefix."""
    is_short = not any(name.startswith(family.prefix) for name in present)
    names = {family.prefix + name for name in present} if is_short else present
    entries = match(family.rows, parameters, present=names)
    ignored = (
        (*family.ignored, "lm_head.weight") if is_tied else family.ignored
    )  # some files repeat the embedding
    if is_short:
        entries = tuple(replace(e, foreign=e.foreign.removeprefix(family.prefix)) for e in entries)
        ignored = tuple(pattern.removeprefix(family.prefix) for pattern in ignored)
    cut = family.prefix if is_short else ""
    copies = {repeated.removeprefix(cut): name.removeprefix(cut) for repeated, name in family.copies}
    return NamedEntries(entries, ignored, copies)


def joined(entries: Sequence[Entry], parts: Mapping[str, Values], *, dtype: torch.dtype) -> dict[str, Values]:
    """Logical name -> its values, put together of Hugging Face's tensors.

    Args:
        parts: Hugging Face name -> values.
        dtype: of the result.
    """
    by_name: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_name[entry.name].append(entry)
    return {
        name: Values(found[0].whole, dtype, partial(_read, found, parts, dtype))
        for name, found in by_name.items()
    }


def _read(entries: Sequence[Entry], parts: Mapping[str, Values], dtype: torch.dtype, box: Box) -> Tensor:
    if len(entries) == 1 and box == Box.whole(entries[0].whole):
        return entries[0].from_foreign(parts[entries[0].foreign].whole()).to(dtype)
    values = torch.empty(box.shape, dtype=dtype)
    for entry in entries:
        common = entry.box.intersect(box)
        if common is not None:
            part = entry.from_foreign(parts[entry.foreign].whole())
            inside = common.shift(tuple(-a for a in entry.box.start))
            values[common.shift(tuple(-a for a in box.start)).slices] = part[inside.slices].to(dtype)
    return values


def names_of(entries: Sequence[Entry]) -> dict[str, tuple[str, ...]]:
    """Logical name -> what Hugging Face calls its parts."""
    found: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
    for entry in entries:
        found[entry.name] += (entry.foreign,)
    return dict(found)


def _check_sizes(spec: DecoderSpec, weights: hf.Weights) -> None:
    """Refuse sizes that no tensor of the files has, before anything is made in such a size."""
    longest = max((dim for shape in weights.shapes.values() for dim in shape), default=0)
    num_tensors = len(weights.shapes)
    found = {"layers": spec.layers, "hidden": spec.hidden, "vocab": spec.vocab}
    limits = {"layers": num_tensors, "hidden": longest, "vocab": longest}
    if len(spec.expert_layers) < spec.layers:
        found["ffn"], limits["ffn"] = spec.ffn, longest
    if spec.moe is not None:
        found["experts"], limits["experts"] = spec.moe.experts, max(num_tensors, longest)
    for name, limit in limits.items():
        if found[name] > limit:
            raise CheckpointError(
                f"config.json and the weights differ in what is model.{name} in megads",
                found=found[name],
                allowed=f"at most {limit}, by the tensors in the files",
            )


def tokenizer_in(path: Path) -> Path | None:
    """The original of a tokenizer.json, where there is one, rather than its translation."""
    files = (path / "tokenizer.model", path / "tokenizer.json")
    return next((file for file in files if file.is_file()), None)
