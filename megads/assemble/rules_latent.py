"""Cross-checks of latent attention: its keys belong to the families that have it.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.model import LATENT_FAMILIES
from megads.config.root import Config

LATENT_KEYS = ("q_lora", "kv_lora", "nope_dim", "rope_dim", "v_dim", "rope_mscale", "rope_mscale_all_dim")
"""Keys of section `model` that only latent attention reads."""


def latent_keys_have_family(config: Config, world_size: int) -> Finding | None:
    model = config.model
    used = [f"model.{key}" for key in LATENT_KEYS if getattr(model, key) is not None]
    if model.family in LATENT_FAMILIES or not used:
        return None
    return Finding(
        used[0],
        f"{', '.join(used)} with model.family {model.family}, whose attention has no latents",
        f"null, or model.family {' or '.join(LATENT_FAMILIES)}",
    )


def latent_head_is_even(config: Config, world_size: int) -> Finding | None:
    rope_dim = config.model.rope_dim
    if rope_dim is None or rope_dim % 2 == 0:
        return None
    return Finding("model.rope_dim", f"{rope_dim}, odd; rotary positions turn pairs", "an even number")


def latent_heads_have_keys(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.family not in LATENT_FAMILIES or model.kv_heads in (None, model.heads):
        return None
    return Finding(
        "model.kv_heads",
        f"{model.kv_heads} with model.family {model.family}: each of model.heads {model.heads} has keys of its own",
        "null",
    )


def latent_heads_have_their_dims(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.family not in LATENT_FAMILIES or model.head_dim in (None, model.hidden // model.heads):
        return None
    return Finding(
        "model.head_dim",
        f"{model.head_dim} with model.family {model.family}, which does not read it",
        "null; model.nope_dim, model.rope_dim and model.v_dim",
    )


def mscales_have_yarn(config: Config, world_size: int) -> Finding | None:
    model = config.model
    used = [
        f"model.{key}" for key in ("rope_mscale", "rope_mscale_all_dim") if getattr(model, key) is not None
    ]
    if model.rope_scaling == "yarn" or model.family not in LATENT_FAMILIES or not used:
        return None
    return Finding(
        used[0],
        f"{' and '.join(used)} with model.rope_scaling {model.rope_scaling}",
        "model.rope_scaling yarn",
    )


RULES: tuple[Rule, ...] = (
    latent_keys_have_family,
    latent_head_is_even,
    latent_heads_have_keys,
    latent_heads_have_their_dims,
    mscales_have_yarn,
)
