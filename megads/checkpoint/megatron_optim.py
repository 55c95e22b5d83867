"""Optimizer state in Megatron-LM's checkpoints: fp32 masters and Adam's moments, where a file holds them by parameter.

    optimizer                                             of fp16, bf16 runs           of fp32 runs
        optimizer/param_groups[g]/params                  numbers of its parameters    param_groups[g]/params
        optimizer/state[number]/exp_avg, exp_avg_sq       moments                      state[number]/..
        fp32_from_fp16_params[g][i]                       masters

Groups know numbers, not names. A group has the parameters with weight decay or those without (biases and all that have
one dim), in the order of the model; shapes must agree, and a master must round to the weight of its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megads.checkpoint.foreign import Values
from megads.checkpoint.megatron import MegatronFiles, Shards, Stage
from megads.checkpoint.torch_file import values_of
from megads.errors import CheckpointError
from megads.parallel.shard import Box

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What was found.

    Attributes:
        masters: name -> fp32 weights of the ranks; empty: the weights themselves are the masters.
        moments: `optim/exp_avg`, `optim/exp_avg_sq` -> name -> values of the ranks; empty: none.
        adam_steps: updates that the moments have seen.
        notes: why there are none.
    """

    masters: Mapping[str, Shards]
    moments: Mapping[str, Mapping[str, Shards]]
    adam_steps: int | None
    notes: tuple[str, ...]


def optimizer_state(files: MegatronFiles) -> OptimizerState:
    """The optimizer state of an iteration.

    Raises:
        CheckpointError: groups that do not fit the model's parameters.
    """
    reason = _unreadable(files)
    if reason is not None:
        return OptimizerState({}, {}, None, (f"moments are not converted: {reason}",))
    found: dict[str, dict[str, Shards]] = {}
    steps: set[int] = set()
    num_ranks = len(files.optimizers)
    for rank, optimizers in enumerate(files.optimizers):
        stages = files.stages[rank::num_ranks]
        parts = [_by_name(optimizer, stages, number, steps) for number, optimizer in enumerate(optimizers)]
        for kind in parts[0]:
            for name in parts[0][kind]:
                found.setdefault(kind, {}).setdefault(name, tuple(part[kind][name] for part in parts))
    masters = found.pop("masters", {})
    return OptimizerState(masters, found, max(steps, default=0), ())


def _unreadable(files: MegatronFiles) -> str | None:
    """Why the state cannot be read by parameter; None if it can."""
    for optimizer in (one for row in files.optimizers for one in row):
        if optimizer is None:
            return "the files hold no optimizer"
        inner = _inner(optimizer)
        if not isinstance(inner, dict) or not isinstance(inner.get("state"), dict) or not inner["state"]:
            return "of a distributed optimizer (flat buffers in distrib_optim.pt), or of several"
        if any(not set(MOMENTS) <= state.keys() for state in inner["state"].values()):
            return "not Adam's"
        if len(inner["param_groups"]) > 2:
            return "more groups of parameters than with and without weight decay"
    return None


def _inner(optimizer: Any) -> Any:
    """torch's own part of the state."""
    found = optimizer.get("optimizer", optimizer) if isinstance(optimizer, dict) else None
    return found


def _by_name(
    optimizer: Mapping[str, Any], stages: Sequence[Stage], tensor_rank: int, steps: set[int]
) -> dict[str, dict[str, Values]]:
    """Kind -> name -> values of one rank."""
    inner = _inner(optimizer)
    found: dict[str, dict[str, Values]] = {f"optim/{moment}": {} for moment in MOMENTS}
    weights = {name: stage.shards[name][tensor_rank] for stage in stages for name in stage.names}
    groups = inner["param_groups"]
    masters = optimizer.get("fp32_from_fp16_params")
    for number, group in enumerate(groups):
        names = _names_of(group, weights, is_only=len(groups) == 1)
        members = group["params"]
        if len(names) != len(members):
            raise CheckpointError(
                "Megatron's optimizer has another number of parameters than its model",
                found=f"{len(members)} in group {number}",
                allowed=f"{len(names)}, by names and dims",
            )
        for place, (name, member) in enumerate(zip(names, members, strict=True)):
            state = inner["state"][member]
            steps.update(int(value) for value in (group.get("step"), state.get("step")) if value is not None)
            for moment in MOMENTS:
                found[f"optim/{moment}"][name] = _fitting(state[moment], weights[name], name)
            if masters is not None:
                master = _fitting(masters[number][place], weights[name], name)
                found.setdefault("masters", {})[name] = _rounding_to(master, weights[name], name)
    return found


def _names_of(group: Mapping[str, Any], weights: Mapping[str, Values], *, is_only: bool) -> list[str]:
    """The parameters of a group, in the order of the model."""
    if is_only:
        return list(weights)
    decays = bool(group.get("wd_mult", group.get("weight_decay", 1.0)))
    return [
        name
        for name, values in weights.items()
        if decays != (name.endswith("bias") or len(values.shape) == 1)
    ]


def _fitting(tensor: Any, weight: Values, name: str) -> Values:
    values = values_of(tensor, where=f"optimizer state of {name}")
    if values.shape != weight.shape:
        raise CheckpointError(
            f"{name}: its optimizer state has another shape", found=values.shape, allowed=weight.shape
        )
    return values


def _rounding_to(master: Values, weight: Values, name: str) -> Values:
    """`master`, which is refused when it is read if it does not round to `weight`."""

    def read(box: Box) -> torch.Tensor:
        values = master.read(box)
        if not torch.equal(values.to(weight.dtype), weight.read(box)):
            raise CheckpointError(
                f"{name}: its master does not round to it: the optimizer's order is another one"
            )
        return values

    return Values(master.shape, master.dtype, read)
