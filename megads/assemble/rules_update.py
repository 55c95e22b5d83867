"""Cross-checks of how parameters are updated and scaled: Muon, parameter groups, muP.

One small pure function a rule; `rules.py` joins the tables. Patterns of groups meet the model's names in
`optim/group.py`.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.model import LATENT_FAMILIES
from megads.config.root import Config
from megads.config.update import MuonConfig


def muon_keys_have_muon(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.name == "muon" or optim.muon == MuonConfig():
        return None
    return Finding("optim.muon", f"{optim.muon} with optim.name {optim.name}", "no keys, or optim.name muon")


def groups_have_their_optimizer(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    chosen = [group.match for group in optim.groups if group.optimizer is not None]
    if optim.name == "muon" or not chosen:
        return None
    return Finding(
        "optim.groups",
        f"optimizer for {', '.join(chosen)} with optim.name {optim.name}, which updates all",
        "no optimizer in a group, or optim.name muon",
    )


def groups_have_eps(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    chosen = [group.match for group in optim.groups if group.eps is not None]
    if optim.name != "sgd" or not chosen:
        return None
    return Finding(
        "optim.groups",
        f"eps for {', '.join(chosen)} with optim.name sgd, which has none",
        "groups without eps",
    )


def groups_say_something(config: Config, world_size: int) -> Finding | None:
    empty = [
        group.match
        for group in config.optim.groups
        if (group.optimizer, group.lr_scale, group.weight_decay, group.eps) == (None, None, None, None)
    ]
    if not empty:
        return None
    return Finding(
        "optim.groups",
        f"{', '.join(empty)} with nothing that holds for it",
        "lr_scale, weight_decay, eps or optimizer beside match",
    )


def head_base_has_mup(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.mup_base_head_dim is None or model.mup_base_hidden is not None:
        return None
    return Finding(
        "model.mup_base_head_dim",
        f"{model.mup_base_head_dim} with model.mup_base_hidden null",
        "null, or a base width too",
    )


def head_base_has_heads(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.mup_base_head_dim is None or model.family not in LATENT_FAMILIES:
        return None
    return Finding(
        "model.mup_base_head_dim",
        f"{model.mup_base_head_dim} with model.family {model.family}, whose heads keep their width",
        "null, a wider model having more heads",
    )


def mup_has_adam(config: Config, world_size: int) -> Finding | None:
    if config.model.mup_base_hidden is None or config.optim.name != "sgd":
        return None
    return Finding(
        "optim.name",
        f"sgd with model.mup_base_hidden {config.model.mup_base_hidden}: the scales of learning rates are Adam's",
        "adamw or muon with muP",
    )


RULES: tuple[Rule, ...] = (
    muon_keys_have_muon,
    groups_have_their_optimizer,
    groups_have_eps,
    groups_say_something,
    head_base_has_mup,
    head_base_has_heads,
    mup_has_adam,
)
