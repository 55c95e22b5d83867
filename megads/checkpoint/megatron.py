"""Checkpoints of Megatron-LM, written with `--ckpt-format torch`: files of ranks, stages, and what is cut how.

    SRC/latest_checkpointed_iteration.txt     "500", or "release"
        iter_0000500/mp_rank_01/              tensor rank 1 of a run without pipeline
                     mp_rank_01_002/          tensor rank 1, pipeline rank 2
            model_optim_rng.pt                args, checkpoint_version 3.0, iteration, model (or model0, model1, ... of
                                              virtual stages), optimizer

Differences from megads, per tensor-parallel rank:

    qkv   megads [q0 q1 | k0 | v0]  per rank: all queries, all keys, all values
          Megatron  a group of queries with its key and value after the other: [q0 q1 k0 v0], [q2 q3 k1 v1], ..
    vocabulary    Megatron pads the whole to a multiple and cuts that evenly
    gate and up   the same: [gate, up] of the rank
    layer numbers count from 0 in each stage, and the tied embedding has a copy on the last stage

Lives here: files, stages and cuts. Names and args: model/megatron.py. Optimizer state: megatron_optim.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint.foreign import Values
from megads.checkpoint.store import Store
from megads.checkpoint.torch_file import Remnant, read_torch_file, values_of
from megads.errors import CheckpointError
from megads.parallel.shard import ShardSpec, local_shape, regions

STATE_FILE = "model_optim_rng.pt"
OLDEST_VERSION = 2.0
"""checkpoint_version in which qkv got its order of today."""

_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3}))?(?:_(\d{3}))?")
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")

Shards = tuple[Values, ...]
"""One tensor, as each tensor-parallel rank has it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One model chunk: what the tensor-parallel ranks of a pipeline stage have of it.

    Attributes:
        names: parameter names in the chunk's own order, layers numbered over the whole model.
        shards: name -> the ranks' tensors.
    """

    names: tuple[str, ...]
    shards: Mapping[str, Shards]


@dataclass(frozen=True, slots=True)
class MegatronFiles:
    """An iteration, opened.

    Attributes:
        args: the run's arguments.
        iteration: steps done.
        stages: in the order of the model.
        optimizers: pipeline rank -> what each of its tensor-parallel ranks has under `optimizer`.
        virtual_stages: chunks of a pipeline rank.
    """

    args: Mapping[str, Any]
    iteration: int
    stages: tuple[Stage, ...]
    optimizers: tuple[tuple[Any, ...], ...]
    virtual_stages: int

    @property
    def shards(self) -> dict[str, Shards]:
        """Every tensor of the model, a copy of the tied embedding included."""
        return {name: shards for stage in self.stages for name, shards in stage.shards.items()}


def open_megatron(directory: Path, *, store: Store) -> MegatronFiles:
    """Open an iteration's directory; only trees are read.

    Raises:
        CheckpointError: ranks are missing or differ, an older order of qkv, experts.
    """
    trees = [
        [_tree(path / STATE_FILE, store) for path in paths] for paths in _rank_directories(directory, store)
    ]
    first = trees[0][0]
    version = first.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < OLDEST_VERSION:
        raise CheckpointError(
            f"{directory}: checkpoint_version is older than today's order of queries, keys and values",
            found=version,
            allowed=f"at least {OLDEST_VERSION}",
            do="load it in a Megatron-LM of its time that can write 3.0, and save it again",
        )
    args = first.get("args")
    chunks = _chunks(trees, directory)
    return MegatronFiles(
        args=dict(vars(args)) if isinstance(args, Remnant) else {},
        iteration=int(first.get("iteration", 0)),
        stages=_number_layers([stage for row in zip(*chunks, strict=True) for stage in row]),
        optimizers=tuple(tuple(tree.get("optimizer") for tree in row) for row in trees),
        virtual_stages=len(chunks[0]),
    )


def _rank_directories(directory: Path, store: Store) -> list[list[Path]]:
    """Directories by pipeline rank, then tensor rank."""
    grid: dict[tuple[int, int], Path] = {}
    for name in store.entries(directory):
        if match := _RANK.fullmatch(name):
            if match[3] is not None:
                raise CheckpointError(
                    f"{directory / name}: a rank of expert parallelism", allowed="models without experts"
                )
            grid[int(match[2] or 0), int(match[1])] = directory / name
    num_stages, num_ranks = (max(index) + 1 for index in zip(*grid, strict=True))
    missing = [(p, t) for p in range(num_stages) for t in range(num_ranks) if (p, t) not in grid]
    if missing or len(grid) != num_stages * num_ranks:
        raise CheckpointError(
            f"{directory}: files of ranks are missing",
            found=f"{len(grid)} of {num_stages} pipeline x {num_ranks} tensor-parallel ranks",
            allowed="a directory for each",
        )
    return [[grid[p, t] for t in range(num_ranks)] for p in range(num_stages)]


def _tree(file: Path, store: Store) -> dict[str, Any]:
    if store.kind(file) != "file":
        raise CheckpointError(f"{file}: not there", found=store.kind(file), allowed="a file")
    tree = read_torch_file(file)
    if not isinstance(tree, dict) or not ("model" in tree or "model0" in tree):
        raise CheckpointError(f"{file}: holds no model", found=", ".join(map(str, tree))[:200])
    return tree


def _chunks(trees: Sequence[Sequence[dict[str, Any]]], directory: Path) -> list[list[Stage]]:
    """Stages by pipeline rank, then virtual stage; layers still numbered from 0."""
    found = []
    for row in trees:
        keys = (
            ["model"] if "model" in row[0] else sorted(k for k in row[0] if re.fullmatch(r"model\d+", str(k)))
        )
        found.append([_stage([tree.get(key) for tree in row], where=f"{directory}, {key}") for key in keys])
    if len({len(row) for row in found}) != 1:
        raise CheckpointError(f"{directory}: pipeline ranks have different numbers of virtual stages")
    return found


def _stage(models: Sequence[Any], *, where: str) -> Stage:
    """What the ranks of one stage have of one chunk."""
    flats = [dict(_flatten(model, "")) for model in models]
    if any(flat.keys() != flats[0].keys() for flat in flats):
        raise CheckpointError(f"{where}: tensor-parallel ranks have different tensors")
    shards = {n: tuple(values_of(flat[n], where=f"{where}: {n}") for flat in flats) for n in flats[0]}
    return Stage(tuple(shards), shards)


def _flatten(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Tensors of nested dicts by dotted names; the states of fp8 recipes and of inverse frequencies are left out."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, Tensor) and not prefix.endswith(("_extra_state", "inv_freq")):
        yield prefix.removeprefix("module."), tree


def _number_layers(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Stages with layers numbered over the whole model."""
    found, first = [], 0
    for stage in stages:
        numbers = {int(match[2]) for name in stage.names if (match := _LAYER.fullmatch(name))}
        new = {name: _shifted(name, first) for name in stage.names}
        found.append(Stage(tuple(new.values()), {new[name]: shards for name, shards in stage.shards.items()}))
        first += max(numbers, default=-1) + 1
    return tuple(found)


def _shifted(name: str, first: int) -> str:
    match = _LAYER.fullmatch(name)
    return name if match is None else f"{match[1]}{int(match[2]) + first}{match[3]}"


@dataclass(frozen=True, slots=True)
class Cutting:
    """How one logical tensor is spread over tensor-parallel ranks in Megatron.

    Attributes:
        name: logical name.
        spec: megads' declaration.
        groups: groups of queries that share a key; None: not a qkv projection.
        padded: rows of the padded vocabulary; None: not a vocabulary.
    """

    name: str
    spec: ShardSpec
    groups: int | None = None
    padded: int | None = None

    def shape(self, size: int) -> tuple[int, ...]:
        """Of one rank's tensor."""
        if self.padded is not None:
            return (self.padded // size, *self.spec.shape[1:])
        return local_shape(self.spec, {"tp": size}, name=self.name)

    def join(self, shards: Shards, *, where: str) -> Values:
        """The logical tensor of what the ranks have.

        Raises:
            CheckpointError: other shapes than the model's (at once), or copies that differ (when read).
        """
        size = len(shards)
        padded = None if self.padded is None else sum(shard.shape[0] for shard in shards)
        wanted = Cutting(self.name, self.spec, self.groups, padded).shape(size)
        wrong = [shard.shape for shard in shards if shard.shape != wanted]
        if wrong or (padded is not None and padded < self.spec.shape[0]):
            raise CheckpointError(
                f"{where}: another shape than this model's {self.name}",
                found=f"{wrong[0] if wrong else padded} on one of {size} ranks",
                allowed=wanted if wrong else f"at least {self.spec.shape[0]} rows",
            )
        return Values.of_whole(
            self.spec.shape, shards[0].dtype, whole=lambda: self._joined(shards, where=where)
        )

    def _joined(self, shards: Shards, *, where: str) -> Tensor:
        if self.padded is not None:
            return torch.cat([shard.whole() for shard in shards])[: self.spec.shape[0]]
        whole = torch.empty(self.spec.shape, dtype=shards[0].dtype)
        if not self.spec.cuts:
            whole.copy_(shards[0].whole())
            if any(not torch.equal(whole, shard.whole()) for shard in shards[1:]):
                raise CheckpointError(f"{where}: tensor-parallel ranks have different copies")
            return whole
        for rank, shard in enumerate(shards):
            local = self._ungrouped(shard.whole(), len(shards))
            for region in self._regions(rank, len(shards)):
                whole[region.source.slices] = local[region.local.slices]
        return whole

    def share(self, whole: Values, *, rank: int, size: int) -> Values:
        """What one rank has of the logical tensor."""
        return Values.of_whole(
            self.shape(size), whole.dtype, whole=lambda: self._cut(whole.whole(), rank=rank, size=size)
        )

    def _cut(self, whole: Tensor, *, rank: int, size: int) -> Tensor:
        local = torch.zeros(self.shape(size), dtype=whole.dtype)
        if self.padded is not None:
            rows = whole[rank * len(local) : (rank + 1) * len(local)]
            local[: len(rows)] = rows
            return local
        for region in self._regions(rank, size):
            local[region.local.slices] = whole[region.source.slices]
        return self._grouped(local, size)

    def _regions(self, rank: int, size: int) -> Sequence[Any]:
        return regions(self.spec, {"tp": size}, ranks={"tp": rank}, name=self.name)

    def _parts(self, size: int) -> tuple[int, int]:
        """Rows of a group's queries, and of its key, on one of `size` ranks; each rank has groups / size groups."""
        (cut,) = self.spec.cuts
        assert self.groups is not None
        if self.groups % size:
            raise CheckpointError(
                f"{self.name}: groups of queries cannot be cut evenly",
                found=f"{self.groups} over {size} ranks",
                allowed="a divisor",
            )
        return cut.blocks[0] // self.groups, cut.blocks[1] // self.groups

    def _grouped(self, local: Tensor, size: int) -> Tensor:
        if self.groups is None:
            return local
        query, key = self._parts(size)
        groups, rest = self.groups // size, local.shape[1:]
        q, k, v = torch.split(local, [groups * query, groups * key, groups * key])
        parts = (q.view(groups, query, *rest), k.view(groups, key, *rest), v.view(groups, key, *rest))
        return torch.cat(parts, dim=1).view(local.shape)

    def _ungrouped(self, local: Tensor, size: int) -> Tensor:
        if self.groups is None:
            return local
        query, key = self._parts(size)
        grouped = local.view(self.groups // size, query + 2 * key, *local.shape[1:])
        parts = torch.split(grouped, [query, key, key], dim=1)
        return torch.cat([part.reshape(-1, *local.shape[1:]) for part in parts])
