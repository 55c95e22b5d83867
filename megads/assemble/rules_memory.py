"""Cross-checks of what is kept for the backward: recompute and its layers.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.root import Config


def recompute_layers_are_recomputed(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    if parallel.recompute_layers is None or parallel.recompute != "none":
        return None
    return Finding(
        "parallel.recompute_layers",
        f"{parallel.recompute_layers} with parallel.recompute none",
        "null, or parallel.recompute full or parts of a layer",
    )


def recompute_layers_are_there(config: Config, world_size: int) -> Finding | None:
    wanted, layers = config.parallel.recompute_layers, config.model.layers
    if wanted is None or wanted <= layers:
        return None
    return Finding(
        "parallel.recompute_layers", f"{wanted} of each stage; model.layers {layers}", f"at most {layers}"
    )


RULES: tuple[Rule, ...] = (
    recompute_layers_are_recomputed,
    recompute_layers_are_there,
)
