"""A checkpoint of DeepSpeed as the origin of a conversion: ZeRO's files, a universal checkpoint, or layer files.

DeepSpeed keeps the names of the model that it trained and nothing about the model. Three kinds of names are known:

    transformers          config.json beside the checkpoint, or --config; names by the family's table
    megads                --config with a config.yaml
    Megatron-DeepSpeed    the training script's args in the checkpoint, or --config; names by model/megatron.py

Files: checkpoint/deepspeed_files.py, checkpoint/universal.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megads.assemble.compare import declared
from megads.assemble.import_hf import joined, named_entries, names_of, read_hf_config, tokenizer_in
from megads.assemble.import_megatron import adam_object, from_ranks
from megads.assemble.origin import Hints, Origin, foreign_config, made_by, vocab_of
from megads.checkpoint.deepspeed_files import MODEL, MOMENTS, DeepSpeedFiles, Named, open_deepspeed
from megads.checkpoint.foreign import Found, Values
from megads.checkpoint.hf_names import grouped, pattern
from megads.checkpoint.store import Store
from megads.checkpoint.universal import open_universal
from megads.config.load import load, tree
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE
from megads.model.megatron import read_names, section_of

NO_MOMENTS = "no moments of Adam for every parameter: none are converted"
MODULE = "module."
"""What wrappers put before every name."""


def open_deepspeed_checkpoint(found: Found, hints: Hints, *, store: Store) -> Origin:
    """Open a tag's directory; trees are read, tensors are mapped.

    Raises:
        CheckpointError: files that are damaged or missing, no config, or names that are not this model's.
        ConfigError: impossible sizes.
    """
    is_universal = found.format == "universal"
    files = (open_universal if is_universal else open_deepspeed)(found.path, store=store)
    kinds = {kind: _unwrapped(named) for kind, named in files.kinds.items()}
    file = hints.config or _config_beside(found.path)
    section = _section(files, file, hints)
    tokenizer = hints.tokenizer or (None if file is None else tokenizer_in(file.parent))
    config = foreign_config(section, origin=str(file or f"args of {found.path}"), tokenizer=tokenizer)
    origin = Origin(found.format, found.path, config, {}, {}, {"made_by": made_by()}, tokenizer, files.notes)
    naming = _naming(origin, kinds[MODEL])
    needed = {name for foreign in naming.names.values() for name in foreign}
    whole = {kind: named for kind, named in kinds.items() if needed <= named.keys()}
    tensors = {
        f"{kind}/{name}": values
        for kind, named in whole.items()
        for name, values in naming.read(named).items()
    }
    has_moments = {f"optim/{moment}" for moment in MOMENTS} <= whole.keys()
    return replace(
        origin,
        tensors=tensors if has_moments else {n: v for n, v in tensors.items() if n.startswith("model/")},
        names=naming.names,
        objects={**origin.objects, **adam_object(files.adam_steps if has_moments else None)},
        notes=origin.notes if has_moments or files.notes else (*origin.notes, NO_MOMENTS),
    )


def _unwrapped(named: Named) -> Named:
    if all(name.startswith(MODULE) for name in named):
        return {name.removeprefix(MODULE): shards for name, shards in named.items()}
    return named


def _config_beside(path: Path) -> Path | None:
    """A config in the tag's directory or in the one above it, where transformers' trainer puts it."""
    places = (path, path.parent)
    files = (place / name for place in places for name in ("config.json", "config.yaml"))
    return next((file for file in files if file.is_file()), None)


def _section(files: DeepSpeedFiles, file: Path | None, hints: Hints) -> Mapping[str, Any]:
    """The config section `model`."""
    if file is not None and file.suffix == ".json":
        return read_hf_config(file).section
    if file is not None:
        return {key: value for key, value in tree(load(file))["model"].items() if value is not None}
    if not files.args.get("num_layers"):
        raise CheckpointError(
            "a DeepSpeed checkpoint does not say what model it is of",
            found="neither config.json nor config.yaml beside it, nor args in it",
            allowed="config.json of the Hugging Face model, or config.yaml of megads",
            do="--config FILE",
        )
    return section_of(files.args, vocab=vocab_of(hints))


@dataclass(frozen=True, slots=True)
class _Naming:
    """What the parameters are called, and how tensors of these names become logical ones.

    Attributes:
        names: logical name -> names in the source.
        read: parameters of one kind -> logical name -> values.
    """

    names: Mapping[str, tuple[str, ...]]
    read: Callable[[Named], Mapping[str, Values]]


def _naming(origin: Origin, present: Named) -> _Naming:
    """The kind of names that is there."""
    parameters = declared(origin.spec)
    if set(present) == set(parameters):
        return _Naming({name: (name,) for name in parameters}, _unsharded)
    if any("query_key_value" in name or "linear_qkv" in name for name in present):
        names = read_names(list(parameters), list(present))
        return _Naming(
            {name: (foreign,) for name, foreign in names.items()},
            lambda named: from_ranks(parameters, named, names=names, model=origin.model),
        )
    family = HUGGING_FACE[origin.config.model.family]
    found = named_entries(family, parameters, present=present, is_tied=origin.spec.tied)
    wanted = {entry.foreign: entry.shape for entry in found.entries}
    extra = [name for name in present if name not in wanted and pattern(name) not in found.ignored]
    missing = [name for name in wanted if name not in present]
    if extra or missing:
        raise CheckpointError(
            "DeepSpeed's parameters are not those of this model",
            found="; ".join(
                f"{len(names)} {title}: {grouped(names)}"
                for title, names in (("missing", missing), ("unexpected", extra))
                if names
            ),
            allowed="the names of transformers, of Megatron-DeepSpeed, or of megads",
        )
    return _Naming(
        names_of(found.entries),
        lambda named: joined(found.entries, _shaped(_unsharded(named), wanted), dtype=torch.float32),
    )


def _unsharded(named: Named) -> dict[str, Values]:
    """Parameters of a model that one tensor-parallel rank holds."""
    cut = [name for name, shards in named.items() if len(shards) > 1]
    if cut:
        raise CheckpointError(
            "tensor-parallel ranks of a model that is not Megatron's: how it is cut is not known",
            found=grouped(cut),
            allowed="Megatron-DeepSpeed, one rank, or a universal checkpoint of it",
        )
    return {name: shards[0] for name, shards in named.items()}


def _shaped(parts: Mapping[str, Values], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, Values]:
    """Each in the shape of its name; a universal checkpoint of stage 3 holds them flat."""
    found = {}
    for name, shape in wanted.items():
        values = parts[name]
        if values.shape != shape:
            if len(values.shape) != 1 or values.shape[0] != torch.Size(shape).numel():
                raise CheckpointError(
                    f"{name}: another shape than this model's", found=values.shape, allowed=shape
                )
            values = _viewed(values, shape)
        found[name] = values
    return found


def _viewed(values: Values, shape: tuple[int, ...]) -> Values:
    return Values.of_whole(shape, values.dtype, whole=lambda: values.whole().view(shape))
