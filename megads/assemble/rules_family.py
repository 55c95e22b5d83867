"""Cross-checks of the model family: its experts, and how its rotary positions are stretched.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule
from megads.config.root import Config

FAMILIES_OF_EXPERTS = ("qwen3_moe", "mixtral")
ROPE_KEYS = ("rope_original_positions", "rope_few_turns", "rope_many_turns")
"""Keys of section `model` that only stretched rotary positions read."""


def family_has_experts(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.family not in FAMILIES_OF_EXPERTS or model.experts is not None:
        return None
    return Finding(
        "model.experts",
        f"null with model.family {model.family}, whose layers have experts",
        "a number of experts",
        "model.family=qwen3 or llama is the same model without experts",
    )


def rope_keys_have_scaling(config: Config, world_size: int) -> Finding | None:
    model = config.model
    used = [f"model.{key}" for key in ROPE_KEYS if getattr(model, key) is not None]
    used += ["model.rope_factor"] * (model.rope_factor != 1.0)
    if model.rope_scaling != "none" or not used:
        return None
    return Finding(
        used[-1],
        f"{', '.join(used)} with model.rope_scaling none: frequencies stay as they are",
        "model.rope_scaling llama3 or yarn",
    )


def rope_scaling_has_sizes(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.rope_scaling == "none":
        return None
    if model.family == "gpt":
        return Finding(
            "model.rope_scaling", f"{model.rope_scaling} with model.family gpt: positions are learned", "none"
        )
    if model.rope_original_positions is None:
        return Finding(
            "model.rope_original_positions",
            f"null with model.rope_scaling {model.rope_scaling}",
            "the length of the context before it was stretched",
        )
    if model.rope_factor < 1:
        return Finding(
            "model.rope_factor", f"{model.rope_factor:g}: slow pairs would turn faster", "1 or more"
        )
    return None


def rope_turns_are_in_order(config: Config, world_size: int) -> Finding | None:
    model = config.model
    if model.rope_scaling == "none":
        return None
    few = model.rope_few_turns or 1.0
    many = model.rope_many_turns or (4.0 if model.rope_scaling == "llama3" else 32.0)
    if few < many:
        return None
    return Finding(
        "model.rope_few_turns", f"{few:g} with model.rope_many_turns {many:g}", f"less than {many:g}"
    )


RULES: tuple[Rule, ...] = (
    family_has_experts,
    rope_keys_have_scaling,
    rope_scaling_has_sizes,
    rope_turns_are_in_order,
)
