"""Parameter groups: by which optimizer, at which learning rate, decay and eps each parameter is updated.

    declaration (role, decay, width)  --defaults-->  ParameterGroup  <--keys that are set--  optim.groups that match

A parameter takes each key from the group of `optim.groups` whose pattern matches its logical name and that sets it,
else from `optim` itself; nothing depends on the order of the groups. Two groups that set the same key of one parameter,
and a pattern that matches nothing, are errors. Tied copies have the name of the original and so its group, always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch

from megads.config.optim import OptimConfig
from megads.config.update import GroupConfig
from megads.errors import ConfigError
from megads.parallel.collectives import all_reduce_
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import ShardedParameter, stored_name
from megads.parallel.width import width_rule

KEYS = ("optimizer", "lr_scale", "weight_decay", "eps")

Kind = Literal["adamw", "sgd", "muon"]


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """How some parameters are updated; those of one bucket all alike.

    Attributes:
        lr_scale: what the step's learning rate is multiplied by.
        weight_decay: decoupled; 0 for what does not decay.
        eps: of AdamW.
    """

    kind: Kind
    lr_scale: float
    weight_decay: float
    eps: float


def group_of(parameter: ShardedParameter, config: OptimConfig) -> ParameterGroup:
    """How a parameter is updated.

    Raises:
        ConfigError: two of `optim.groups` disagree about it, or Muon is to update what is no hidden matrix.
    """
    name, spec, width = stored_name(parameter), parameter.spec, parameter.width
    chosen = _chosen(name, config.groups)
    is_hidden = spec.decay and spec.role == "hidden" and len(spec.shape) >= 2
    default: Kind = config.name
    if config.name == "muon":
        default = "muon" if is_hidden else "adamw"
    kind = default if chosen.optimizer is None else chosen.optimizer
    if kind == "muon" and not is_hidden:
        raise ConfigError(
            f"optim.groups: muon is to update {name}, which is no hidden matrix",
            found=f"match: {chosen.match}, optimizer: muon",
            allowed="a pattern that matches weights of attention and feed-forward layers alone",
        )
    rule = width_rule(spec)
    has_width = kind != "muon"  # the size of Muon's step does not come from the gradient
    decay = config.weight_decay if spec.decay and kind != "sgd" else 0.0
    lr_scale = 1.0 if chosen.lr_scale is None else chosen.lr_scale
    if config.name == "muon" and kind == "adamw" and config.muon.adamw_lr is not None:
        lr_scale *= config.muon.adamw_lr / config.lr
    return ParameterGroup(
        kind,
        lr_scale * (width**rule.lr if has_width else 1.0),
        (decay if chosen.weight_decay is None else chosen.weight_decay)
        * (width**rule.weight_decay if has_width else 1.0),
        (config.eps if chosen.eps is None else chosen.eps) * (width**rule.eps if has_width else 1.0),
    )


def _chosen(name: str, groups: Iterable[GroupConfig]) -> GroupConfig:
    """What all groups together say of a parameter."""
    values: dict[str, object] = {}
    patterns: dict[str, str] = {}
    for group in groups:
        if not fnmatchcase(name, group.match):
            continue
        for key in KEYS:
            value = getattr(group, key)
            if value is None:
                continue
            if key in patterns:
                raise ConfigError(
                    f"optim.groups: two groups set {key} of {name}",
                    found=f"match: {patterns[key]} and match: {group.match}",
                    allowed="one group for each key of a parameter",
                    do="make one of the patterns narrower",
                )
            values[key], patterns[key] = value, group.match
    return GroupConfig(match=" and ".join(dict.fromkeys(patterns.values())) or "*", **values)  # type: ignore[arg-type]


def check_groups(parameters: Iterable[ShardedParameter], mesh: Mesh, *, config: OptimConfig) -> None:
    """Refuse a pattern that matches no parameter of the whole model; all ranks call it with their own parameters.

    Raises:
        ConfigError: on every rank, naming the patterns.
    """
    if not config.groups:
        return
    names = {stored_name(parameter) for parameter in parameters}
    counts = [sum(fnmatchcase(name, group.match) for name in names) for group in config.groups]
    totals = all_reduce_(torch.tensor(counts, device=mesh.device), mesh.group("world")).tolist()
    unused = [group.match for group, count in zip(config.groups, totals, strict=True) if count == 0]
    if unused:
        raise ConfigError(
            "optim.groups: a pattern matches no parameter",
            found=", ".join(unused),
            allowed=f"logical names, such as {', '.join(sorted(names)[:3])}; * stands for any text",
        )
