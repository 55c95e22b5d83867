"""Checkpoints that DeepSpeed's engine wrote: weights and moments under the names of whatever model it trained.

    TAG/mp_rank_01_model_states.pt                          param_shapes, args, global_steps of tensor-parallel rank 1
    TAG/zero_pp_rank_2_mp_rank_01_optim_states.pt           fp32 weights and moments that data-parallel rank 2 holds
        stage 1, 2    flat groups of which each rank has a range: a parameter is its fragments of all ranks, in order
        stage 3       each parameter cut evenly over the ranks and padded
        (bf16_zero_.. the same as stage 1)
    TAG/layer_03-model_01-model_states.pt                   Megatron-DeepSpeed's pipeline: one layer of rank 1

Weights are the fp32 masters where the optimizer's files are there, else what computes. What names mean is not known
here: assemble/import_deepspeed.py.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint.foreign import Values
from megads.checkpoint.store import Store
from megads.checkpoint.torch_file import Remnant, read_torch_file, tensor_of, values_of
from megads.errors import CheckpointError
from megads.parallel.shard import Shape

MODEL = "model"
MOMENTS = ("exp_avg", "exp_avg_sq")

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")

Shards = tuple[Values, ...]
Named = Mapping[str, Shards]


@dataclass(frozen=True, slots=True)
class DeepSpeedFiles:
    """A tag, opened.

    Attributes:
        kinds: `model`, `optim/exp_avg`, ... -> parameter name -> what each tensor-parallel rank has.
        adam_steps: updates that the moments have seen; None: there are no moments.
        steps: steps of the engine.
        args: of the training script, if it saved them.
        notes: what is there and not read.
    """

    kinds: Mapping[str, Named]
    adam_steps: int | None
    steps: int
    args: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Rank:
    """The files of one model-parallel rank: of the model, and of the optimizer by data-parallel rank."""

    model: Mapping[str, Any]
    optimizers: tuple[Mapping[str, Any], ...]


def open_deepspeed(directory: Path, *, store: Store) -> DeepSpeedFiles:
    """Open a tag's directory; only trees are read.

    Raises:
        CheckpointError: files of ranks are missing, or their trees are not DeepSpeed's.
    """
    ranks = _ranks(directory, store)
    layers = _layer_shards(directory, store)
    first = ranks[0].model if ranks else {}
    parts = [_optimizer_part(rank, where=str(directory)) for rank in ranks if rank.optimizers]
    notes: tuple[str, ...] = ()
    if parts:
        size = _tensor_ranks(layers, ranks)
        steps = parts[0].adam_steps
        kinds: dict[str, Named] = {
            kind: _renamed(_by_rank([part.kinds[kind] for part in parts], size), layers)
            for kind in parts[0].kinds
        }
    elif layers:
        kinds, steps = {MODEL: {layer.name: layer.shards for layer in layers}}, None
        notes = ("no optimizer files: moments are not converted, and weights are as they computed",)
    else:
        modules = [_module(rank.model, where=str(directory)) for rank in ranks]
        kinds, steps = {MODEL: _by_rank(modules, len(ranks))}, None
        notes = ("no optimizer files of ZeRO: moments are not converted, and weights are as they computed",)
    args = first.get("args")
    return DeepSpeedFiles(
        kinds=kinds,
        adam_steps=steps,
        steps=int(first.get("global_steps") or first.get("iteration") or 0),
        args=dict(vars(args)) if isinstance(args, Remnant) else dict(args) if isinstance(args, dict) else {},
        notes=notes,
    )


def _ranks(directory: Path, store: Store) -> list[_Rank]:
    """The model-parallel ranks in order."""
    models: dict[int, Path] = {}
    optimizers: defaultdict[int, dict[int, Path]] = defaultdict(dict)
    for name in store.entries(directory):
        if (match := _MODEL_FILE.fullmatch(name)) and int(match[1] or 0) == 0:
            models[int(match[2])] = directory / name
        elif match := _OPTIM_FILE.fullmatch(name):
            optimizers[int(match[2])][int(match[1])] = directory / name
    found = []
    for rank in range(len(models)):
        files = optimizers.get(rank, {})
        if rank not in models or sorted(files) != list(range(len(files))):
            raise CheckpointError(
                f"{directory}: files of rank {rank} are missing",
                found=", ".join(path.name for path in (*models.values(), *files.values()))[:300],
            )
        found.append(_Rank(_dict(models[rank]), tuple(_dict(files[dp]) for dp in range(len(files)))))
    if len({len(rank.optimizers) for rank in found}) > 1 or len(optimizers.keys() - models.keys()):
        raise CheckpointError(f"{directory}: ranks have different numbers of optimizer files")
    return found


def _dict(file: Path) -> Mapping[str, Any]:
    tree = read_torch_file(file)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: not a dict", found=type(tree).__name__)
    return tree


@dataclass(frozen=True, slots=True)
class _Part:
    """What the optimizer files of one model-parallel rank hold, whole over data-parallel ranks."""

    kinds: Mapping[str, Mapping[str, Values]]
    adam_steps: int | None


def _optimizer_part(rank: _Rank, *, where: str) -> _Part:
    try:
        states = [optimizer["optimizer_state_dict"] for optimizer in rank.optimizers]
        if "fp32_flat_groups" in states[0]:
            return _stage_3(rank, states)
        return _stage_1_2(rank, states)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: optimizer files without what DeepSpeed writes into them", found=repr(error)
        ) from error


def _stage_1_2(rank: _Rank, states: Sequence[Mapping[str, Any]]) -> _Part:
    fragments: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
    shapes = _shapes(rank.model)
    has_moments = True
    for number, state in enumerate(states):
        base = state["base_optimizer_state"]["state"]
        for group, slices in enumerate(state["param_slice_mappings"]):
            moments = base.get(group, {})
            has_moments &= all(name in moments for name in MOMENTS)
            flats = {MODEL: state["single_partition_of_fp32_groups"][group]}
            flats |= {f"optim/{name}": moments[name] for name in MOMENTS if name in moments}
            for kind, flat in flats.items():
                values = tensor_of(flat, where=f"{kind} of rank {number}")
                for name, place in slices.items():
                    fragments[kind, name].append(values.narrow(0, int(place.start), int(place.numel)))
    return _whole(
        fragments, shapes, steps=_steps(states[0]["base_optimizer_state"]["state"]), has_moments=has_moments
    )


def _stage_3(rank: _Rank, states: Sequence[Mapping[str, Any]]) -> _Part:
    fragments: defaultdict[tuple[str, str], list[Tensor]] = defaultdict(list)
    groups = rank.model["param_shapes"]
    base = [state["optimizer_state_dict"]["state"] for state in states]
    has_moments = all(name in b[g] for b in base for g in range(len(groups)) for name in MOMENTS)
    for number, state in enumerate(states):
        for group, shapes in enumerate(groups):
            flats = {MODEL: state["fp32_flat_groups"][group]}
            flats |= {f"optim/{name}": base[number][group][name] for name in MOMENTS if has_moments}
            for kind, flat in flats.items():
                values, offset = tensor_of(flat, where=f"{kind} of rank {number}"), 0
                for name, shape in shapes.items():
                    size = math.prod(shape)
                    share = -(-size // len(states))
                    real = min(share, max(0, size - number * share))
                    fragments[kind, name].append(values.narrow(0, offset, real))
                    offset += share
    return _whole(fragments, _shapes(rank.model), steps=_steps(base[0]), has_moments=has_moments)


def _shapes(model: Mapping[str, Any]) -> dict[str, Shape]:
    """Parameter name -> this rank's shape."""
    groups = model["param_shapes"]
    groups = [groups] if isinstance(groups, dict) else groups
    return {name: tuple(shape) for group in groups for name, shape in group.items()}


def _steps(state: Mapping[Any, Any]) -> int | None:
    found = {int(group["step"]) for group in state.values() if "step" in group}
    return max(found, default=None)


def _whole(
    fragments: Mapping[tuple[str, str], Sequence[Tensor]],
    shapes: Mapping[str, Shape],
    *,
    steps: int | None,
    has_moments: bool,
) -> _Part:
    """Parameters of their fragments, in the order of data-parallel ranks."""
    kinds: defaultdict[str, dict[str, Values]] = defaultdict(dict)
    for (kind, name), parts in fragments.items():
        shape = shapes[name]
        found = sum(part.numel() for part in parts)
        if found != math.prod(shape):
            raise ValueError(f"{name}: {found} elements of {kind} for shape {shape}")
        kinds[kind][name] = Values.of_whole(shape, parts[0].dtype, whole=_joiner(parts, shape))
    wanted = {kind: named for kind, named in kinds.items() if kind == MODEL or has_moments}
    return _Part(wanted, steps if has_moments else None)


def _joiner(parts: Sequence[Tensor], shape: Shape) -> Callable[[], Tensor]:
    return lambda: torch.cat(list(parts)).view(shape)


def _module(model: Mapping[str, Any], *, where: str) -> dict[str, Values]:
    """The weights that compute, of a checkpoint without ZeRO."""
    module = model.get("module")
    if not isinstance(module, dict):
        raise CheckpointError(
            f"{where}: holds neither optimizer files nor a module", found=type(module).__name__
        )
    buffers, copies = set(model.get("buffer_names") or ()), set(model.get("shared_params") or ())
    return {
        name: values_of(tensor, where=f"{where}: {name}")
        for name, tensor in module.items()
        if name not in buffers and name not in copies
    }


def _by_rank(parts: Sequence[Mapping[str, Values]], size: int) -> dict[str, Shards]:
    """Parameters of all model-parallel ranks: neighbours are tensor-parallel, `size` of them make one stage."""
    found: dict[str, Shards] = {}
    for start in range(0, len(parts), size):
        stage = parts[start : start + size]
        for name in stage[0]:
            found.setdefault(name, tuple(part[name] for part in stage))
    return found


@dataclass(frozen=True, slots=True)
class _Layer:
    """One parameter of a pipeline's layer files.

    Attributes:
        names: what the optimizer's files may call it.
        name: Megatron's name of it in a model that is not a pipeline.
    """

    names: tuple[str, ...]
    name: str
    shards: Shards


def _layer_shards(directory: Path, store: Store) -> list[_Layer]:
    """The parameters of layer files in the order of the model; none if there are no such files."""
    files: defaultdict[int, dict[int, Path]] = defaultdict(dict)
    for name in store.entries(directory):
        if match := _LAYER_FILE.fullmatch(name):
            files[int(match[1])][int(match[2])] = directory / name
    found: list[_Layer] = []
    num_layers = 0
    for index, ranks in sorted(files.items()):
        if sorted(ranks) != list(range(len(ranks))):
            raise CheckpointError(f"{directory}: files of layer {index} are missing", found=sorted(ranks))
        trees = [_dict(ranks[rank]) for rank in range(len(ranks))]
        is_layer = any("attention" in name for name in trees[0])
        for name in trees[0]:
            shards = tuple(values_of(tree.get(name), where=f"layer {index}: {name}") for tree in trees)
            standard = _standard_name(name, shards[0].shape, number=num_layers if is_layer else None)
            if standard in {layer.name for layer in found}:
                continue  # the tied embedding's copy behind the last layer
            found.append(_Layer((f"{index}.{name}", f"tied_modules.embed.{name}"), standard, shards))
        num_layers += is_layer
    return found


def _standard_name(name: str, shape: Shape, *, number: int | None) -> str:
    if number is not None:
        return f"encoder.layers.{number}.{name}"
    if "embeddings" in name:
        return f"embedding.{name}"
    if len(shape) == 1:
        return f"encoder.final_layernorm.{name.rpartition('.')[2]}"
    return "output_layer.weight"


def _tensor_ranks(layers: Sequence[_Layer], ranks: Sequence[_Rank]) -> int:
    """How many of the model-parallel ranks are tensor-parallel; the rest are pipeline stages."""
    if layers:
        return len(layers[0].shards)
    told = ranks[0].model.get("checkpoint_parallel_dimensions")
    return int(told["tp_degree"]) if isinstance(told, dict) and told.get("tp_degree") else len(ranks)


def _renamed(named: Named, layers: Sequence[_Layer]) -> Named:
    """Parameters of a pipeline under Megatron's names; others as they are."""
    table = {short: layer.name for layer in layers for short in layer.names}
    return {table.get(name, name): shards for name, shards in named.items()}
