"""A checkpoint of Megatron-LM as the origin of a conversion.

Files and cuts: checkpoint/megatron.py; moments: checkpoint/megatron_optim.py; names and args: model/megatron.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megads.assemble.compare import declared
from megads.assemble.origin import Hints, Origin, foreign_config, made_by, vocab_of
from megads.checkpoint.foreign import Values
from megads.checkpoint.megatron import Cutting, Shards, open_megatron
from megads.checkpoint.megatron_optim import optimizer_state
from megads.checkpoint.store import Store
from megads.config.model import ModelConfig
from megads.model.megatron import read_names, section_of
from megads.parallel.shard import ShardSpec


def open_megatron_lm(path: Path, hints: Hints, *, store: Store) -> Origin:
    """Open an iteration's directory; trees are read, tensors are mapped.

    Raises:
        CheckpointError: files that are damaged or missing, or an architecture that megads does not have.
        ConfigError: args with impossible sizes.
    """
    files = open_megatron(path, store=store)
    vocab = vocab_of(hints)
    section = section_of(files.args, vocab=vocab)
    config = foreign_config(section, origin=f"args of {path}", tokenizer=hints.tokenizer)
    origin = Origin("megatron", path, config, {}, {}, {"made_by": made_by()}, hints.tokenizer)
    parameters, shards = declared(origin.spec), files.shards
    names = read_names(list(parameters), list(shards))
    state = optimizer_state(files)
    kinds: dict[str, Mapping[str, Shards]] = {"model": {**shards, **state.masters}, **state.moments}
    tensors = {
        f"{kind}/{name}": values
        for kind, named in kinds.items()
        for name, values in from_ranks(parameters, named, names=names, model=origin.model).items()
    }
    notes = state.notes
    if vocab is None and not files.args.get("vocab_size"):
        notes = (
            *notes,
            f"the vocabulary has {section['vocab']} rows, padding included: --vocab N leaves it out",
        )
    return replace(
        origin,
        tensors=tensors,
        names={name: (foreign,) for name, foreign in names.items()},
        objects={**origin.objects, **adam_object(state.adam_steps)},
        notes=notes,
    )


def from_ranks(
    parameters: Mapping[str, ShardSpec],
    shards: Mapping[str, Shards],
    *,
    names: Mapping[str, str],
    model: ModelConfig,
) -> dict[str, Values]:
    """Logical name -> the whole tensor, of what tensor-parallel ranks have under Megatron's names.

    Args:
        names: logical name -> Megatron's.

    Raises:
        CheckpointError: a tensor of another shape than the model's.
    """
    return {
        name: cutting_of(name, spec, model=model).join(shards[names[name]], where=names[name])
        for name, spec in parameters.items()
    }


def cutting_of(name: str, spec: ShardSpec, *, model: ModelConfig, padded: int = 0) -> Cutting:
    """How Megatron spreads a tensor.

    Args:
        padded: rows of the padded vocabulary, where it is known.
    """
    if any(cut.pad for cut in spec.cuts):
        return Cutting(name, spec, padded=padded)
    return Cutting(name, spec, groups=model.kv_heads if ".attention.qkv." in name else None)


def adam_object(steps: int | None) -> dict[str, Any]:
    """The object `optim` of a step whose moments have seen so many updates; none without moments."""
    return {} if steps is None else {"optim": {"name": "adamw", "step": steps}}
