"""Cross-checks of multi-token prediction: keys that it alone reads, how far it looks, and the points of its weight.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.model import ModelConfig
from megads.config.root import Config


def mtp_weight_has_layers(config: Config, world_size: int) -> Finding | None:
    model = config.model
    default = ModelConfig.__dataclass_fields__["mtp_weight"].default
    if model.mtp_layers or model.mtp_weight == default:
        return None
    return Finding(
        "model.mtp_weight",
        "given with model.mtp_layers 0: there is no multi-token prediction that would read it",
        f"{default:g}, the default, or a number of model.mtp_layers",
    )


def mtp_weight_starts_at_nothing(config: Config, world_size: int) -> Finding | None:
    if not isinstance(config.model.mtp_weight, tuple):
        return None
    tokens = [point.tokens for point in config.model.mtp_weight]
    if tokens[0] == 0 and tokens == sorted(set(tokens)):
        return None
    return Finding(
        "model.mtp_weight",
        f"points at {', '.join(map(str, tokens))} tokens",
        "the first at 0, then ever more",
    )


def mtp_layers_see_labels(config: Config, world_size: int) -> Finding | None:
    depth, length = config.model.mtp_layers, config.data.sequence_length
    if depth < length:
        return None
    return Finding(
        "model.mtp_layers",
        f"{depth} with data.sequence_length {length}: no token has a label so far ahead",
        f"at most {length - 1}",
    )


def mtp_layers_find_the_head(config: Config, world_size: int) -> Finding | None:
    if not config.model.mtp_layers or config.optim.zero_stage < 3:
        return None
    return Finding(
        "optim.zero_stage",
        f"{config.optim.zero_stage} with model.mtp_layers {config.model.mtp_layers}: weights are whole only while the "
        "block that owns them runs, and the output head's are used by the layers behind it",
        "at most 2",
    )


RULES: tuple[Rule, ...] = (
    mtp_weight_has_layers,
    mtp_weight_starts_at_nothing,
    mtp_layers_see_labels,
    mtp_layers_find_the_head,
)
