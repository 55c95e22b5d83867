"""Anything as a universal checkpoint of DeepSpeed, moments included; read back and compared before it exists.

    DST/latest_universal
        universal/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
        config.json or config.yaml      the model, by which the names are understood
        conversion.json

Names are those of the Hugging Face model that DeepSpeed is to train, or megads' own. Load it with
`"checkpoint": {"load_universal": true}` in DeepSpeed's config. Files: checkpoint/universal.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megads.assemble import export_hf
from megads.assemble.conversion import Renaming, Report
from megads.assemble.import_deepspeed import open_deepspeed_checkpoint
from megads.assemble.origin import Hints, Origin
from megads.checkpoint import hf
from megads.checkpoint.directory import built
from megads.checkpoint.foreign import Found, Values
from megads.checkpoint.hf_names import Entry
from megads.checkpoint.proof import pairs_of, prove
from megads.checkpoint.store import Store, write_file
from megads.checkpoint.universal import FILES, TAG, write_universal
from megads.config.load import dump
from megads.model.catalog import HUGGING_FACE

Names = Literal["hf", "megads"]


def export_deepspeed(
    origin: Origin,
    target: Path,
    *,
    weights: str = "model",
    names: Names = "hf",
    store: Store | None = None,
) -> Report:
    """Write `origin` as a universal checkpoint in float32.

    Memory: at most four times the largest tensor.

    Args:
        weights: their kind; another one than `model` leaves the moments out.
        names: whose names the parameters get.

    Raises:
        CheckpointError: a model that Hugging Face has no names for, or one that came out different.
        OSError: with the path.
    """
    store = store or Store()
    kinds = {"model": _as_float(origin.weights(weights))}
    notes = origin.notes
    if weights == "model":
        moments = {kind: _of_kind(origin, kind) for kind, _ in FILES[1:]}
        if all(named.keys() == kinds["model"].keys() for named in moments.values()):
            kinds |= moments
        else:
            notes = (*notes, "no moments of Adam for every parameter: weights alone")
    if len(kinds) == 1:
        notes = (*notes, "DeepSpeed must load it with load_optimizer_states=False")
    named = {kind: _renamed(origin, values, names) for kind, values in kinds.items()}
    step = int(origin.objects.get("step", 0))
    adam_steps = int(origin.objects.get("optim", {}).get("step", step))
    with built(target, store=store) as directory:
        write_universal(directory, named, adam_steps=adam_steps, steps=step, store=store)
        if names == "hf":
            family = HUGGING_FACE[origin.config.model.family]
            sizes = {**family.to_config(origin.model), "model_type": family.model_type}
            hf.write_json(directory / "config.json", sizes, store=store)
        else:
            write_file(store, directory / "config.yaml", blocks=[dump(origin.config).encode()])
        found = Found("universal", directory / TAG)
        again = open_deepspeed_checkpoint(found, Hints(), store=store)
        expected = {f"{kind}/{name}": v for kind, values in kinds.items() for name, v in values.items()}
        proofs = prove(pairs_of(expected, again.tensors))
        report = Report(origin, "universal", proofs, None, notes)
        report.write(directory, store=store)
    return report


def renamings(origin: Origin, *, names: Names) -> list[Renaming]:
    """The rows of a dry run."""
    if names == "hf":
        return export_hf.renamings(origin)
    weights = origin.weights("model").items()
    return [Renaming(origin.names.get(name, ()), name, (name,), values.shape) for name, values in weights]


def _as_float(values: Mapping[str, Values]) -> dict[str, Values]:
    return {name: value.to(torch.float32) for name, value in values.items()}


def _of_kind(origin: Origin, kind: str) -> dict[str, Values]:
    prefix = f"{kind}/"
    found = {n.removeprefix(prefix): v for n, v in origin.tensors.items() if n.startswith(prefix)}
    return _as_float(found)


def _renamed(origin: Origin, values: Mapping[str, Values], names: Names) -> Mapping[str, Values]:
    if names == "megads":
        return values
    return {
        entry.foreign: Values.of_whole(
            entry.shape, torch.float32, whole=partial(_read, values[entry.name], entry)
        )
        for entry in export_hf.entries_of(origin)
    }


def _read(values: Values, entry: Entry) -> Tensor:
    return entry.to_foreign(values.read(entry.box))
