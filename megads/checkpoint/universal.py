"""DeepSpeed's universal checkpoint: one directory a parameter, whole, for any number of ranks.

    TAG/zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt     {"param": tensor}
        zero/NAME/step.pt                                updates that the moments have seen
        zero/optimizer_state.pt                          param_groups and what all ranks share
        mp_rank_00_model_states.pt                       counters; weights are taken from zero/
    latest_universal                                     the tag

Written and read here: files. What names mean: assemble/import_deepspeed.py, assemble/export_deepspeed.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megads.checkpoint.deepspeed_files import MODEL, MOMENTS, DeepSpeedFiles
from megads.checkpoint.foreign import Values
from megads.checkpoint.store import Store, write_file
from megads.checkpoint.torch_file import Remnant, read_torch_file, values_of, write_torch_file
from megads.errors import CheckpointError

FILES: tuple[tuple[str, str], ...] = ((MODEL, "fp32"), *((f"optim/{name}", name) for name in MOMENTS))
TAG = "universal"
MAX_GROUPS = 64
"""Groups of parameters that the run which loads it may have; DeepSpeed goes through as many as both sides name."""
READS_LIKE = "0.19.8"
"""The version of DeepSpeed whose reader these files are written for."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,250}")
_STATES = re.compile(r"(?:zero_pp_rank_0_)?mp_rank_\d+_model_states\.pt")


def open_universal(directory: Path, *, store: Store) -> DeepSpeedFiles:
    """Open a universal checkpoint; only trees are read.

    Raises:
        CheckpointError: a parameter's files are missing or hold something else.
    """
    zero = directory / "zero"
    names = [name for name in store.entries(zero) if store.kind(zero / name) == "directory"]
    kinds: dict[str, dict[str, tuple[Values, ...]]] = {kind: {} for kind, _ in FILES}
    steps: int | None = None
    for name in names:
        for kind, stem in FILES:
            file = zero / name / f"{stem}.pt"
            if store.kind(file) == "file":
                tree = read_torch_file(file)
                tensor = tree.get("param") if isinstance(tree, dict) else tree
                kinds[kind][name] = (values_of(tensor, where=str(file)),)
        if store.kind(zero / name / "step.pt") == "file":
            steps = int(read_torch_file(zero / name / "step.pt"))
    if not kinds[MODEL] or len(kinds[MODEL]) != len(names):
        raise CheckpointError(
            f"{zero}: parameters without fp32.pt", found=f"{len(kinds[MODEL])} of {len(names)} have one"
        )
    states = _states(directory, store)
    if steps is None:
        steps = _steps_of(zero / "optimizer_state.pt", store)
    args = states.get("args")
    return DeepSpeedFiles(
        kinds={kind: named for kind, named in kinds.items() if named},
        adam_steps=steps,
        steps=int(states.get("global_steps") or states.get("iteration") or 0),
        args=dict(vars(args)) if isinstance(args, Remnant) else {},
        notes=(),
    )


def _states(directory: Path, store: Store) -> Mapping[str, Any]:
    files = [name for name in store.entries(directory) if _STATES.fullmatch(name)]
    tree = read_torch_file(directory / files[0]) if files else {}
    return tree if isinstance(tree, dict) else {}


def _steps_of(file: Path, store: Store) -> int | None:
    """Adam's step of a stage 3 checkpoint, which has no step.pt."""
    if store.kind(file) != "file":
        return None
    state = read_torch_file(file)
    try:
        return int(state["optimizer_state_dict"]["state"][0]["step"])
    except (KeyError, IndexError, TypeError, ValueError):
        return None


def write_universal(
    root: Path, kinds: Mapping[str, Mapping[str, Values]], *, adam_steps: int, steps: int, store: Store
) -> int:
    """Write `root`/universal and `root`/latest_universal; returns the bytes of all tensors.

    Memory: one tensor at a time.

    Args:
        kinds: `model` and perhaps `optim/exp_avg`, `optim/exp_avg_sq` -> parameter name -> values, all in float32.
        adam_steps: updates that the moments have seen.
        steps: of the run.

    Raises:
        CheckpointError: a parameter whose name cannot be that of a directory.
        OSError: with the path.
    """
    tag = root / TAG
    for directory in (tag, tag / "zero"):
        store.make_directory(directory)
    total = 0
    for name in kinds[MODEL]:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{name!r}: cannot be the name of a directory")
        place = tag / "zero" / name
        store.make_directory(place)
        for kind, stem in FILES:
            if kind in kinds:
                total += write_torch_file(store, place / f"{stem}.pt", tree={"param": kinds[kind][name]})
        if len(kinds) > 1:
            write_torch_file(store, place / "step.pt", tree=_scalar(adam_steps))
        store.sync_directory(place)
    write_torch_file(store, tag / "zero" / "optimizer_state.pt", tree=_shared_state(adam_steps))
    for name in (
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
    ):  # the second: stage 3
        write_torch_file(store, tag / name, tree=_counters(kinds[MODEL], steps))
    for directory in (tag / "zero", tag):
        store.sync_directory(directory)
    write_file(store, root / "latest_universal", blocks=[TAG.encode()])
    return total


def _scalar(value: float) -> Values:
    tensor = torch.tensor(float(value))
    return Values((), tensor.dtype, lambda box: tensor)


def _shared_state(adam_steps: int) -> dict[str, Any]:
    """zero/optimizer_state.pt; the groups say nothing, so that the run which loads it keeps its own."""
    return {
        "param_groups": [{} for _ in range(MAX_GROUPS)],
        "ds_version": READS_LIKE,
        "optimizer_state_dict": {"state": {0: {"step": _scalar(adam_steps)}}, "param_groups": [{}]},
    }


def _counters(weights: Mapping[str, Values], steps: int) -> dict[str, Any]:
    """mp_rank_00_model_states.pt; `module` is empty because a universal checkpoint is read from zero/."""
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(values.shape) for name, values in weights.items()}],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": steps,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {},
        "ds_version": READS_LIKE,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
