"""Cross-checks of the recipe: what is trained on, and the schedule of the learning rate.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from megads.assemble.finding import Finding, Rule
from megads.config.optim import OptimConfig
from megads.config.root import Config
from megads.config.schedule import LengthConfig, RestartsConfig, TailConfig
from megads.optim.schedule import counts_tokens

READER: Mapping[str, str] = MappingProxyType(
    {
        "tail": "wsd",
        "restarts": "cosine_restarts",
        "timescale": "inverse_sqrt",
        "pieces": "pieces",
        "plateau": "plateau",
    }
)
"""Key -> the decay that reads it."""
NEEDED = ("tail", "restarts", "pieces")  # keys without which their decay says nothing
ENDLESS = (
    "constant",
    "cosine_restarts",
    "inverse_sqrt",
    "pieces",
    "plateau",
)  # without decay_steps, decay_tokens
WITHOUT_MINIMUM = ("constant", "pieces")


def decay_reads_its_keys(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    for key, decay in READER.items():
        if getattr(optim, key) is not None and optim.decay != decay:
            return Finding(
                f"optim.{key}",
                f"given with optim.decay {optim.decay}, which does not read it",
                f"null, or optim.decay={decay}",
            )
    return None


def decay_has_its_keys(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    for key in NEEDED:
        if optim.decay == READER[key] and getattr(optim, key) is None:
            example = "[{tokens: N, lr: ...}, ...]" if key == "pieces" else "{steps: N} or {tokens: N}"
            return Finding(f"optim.{key}", f"null with optim.decay {optim.decay}", example)
    has_scale = optim.timescale is not None or optim.warmup_steps or optim.warmup_tokens
    if optim.decay == "inverse_sqrt" and not has_scale:
        return Finding(
            "optim.timescale",
            "null with optim.decay inverse_sqrt and no warm-up, as long as which it would be",
            "{steps: N} or {tokens: N}",
            "or a warm-up: optim.warmup_steps",
        )
    return None


def decay_reads_its_end(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    ignored: dict[str, float | None] = {}
    if optim.decay in ENDLESS:
        ignored |= {"decay_steps": optim.decay_steps, "decay_tokens": optim.decay_tokens}
    if optim.decay in WITHOUT_MINIMUM:
        ignored["min_lr"] = optim.min_lr or None
    given = [f"optim.{key} {value}" for key, value in ignored.items() if value is not None]
    if not given:
        return None
    return Finding(
        "optim.decay",
        f"{optim.decay} with {' and '.join(given)}, which it ignores",
        f"none of them with {optim.decay}",
        "leave them out, or choose cosine, linear or wsd",
    )


def lengths_have_one_unit(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    for name in ("warmup", "decay"):
        steps, tokens = getattr(optim, f"{name}_steps"), getattr(optim, f"{name}_tokens")
        if steps and tokens:
            return Finding(f"optim.{name}_tokens", f"{tokens} with optim.{name}_steps {steps}", "one of them")
    for key, length in _lengths(optim).items():
        if (length.steps is None) is (length.tokens is None):
            found = "neither steps nor tokens" if length.steps is None else "steps and tokens"
            return Finding(f"optim.{key}", found, "{steps: N} or {tokens: N}")
    return None


def schedule_has_one_unit(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if lengths_have_one_unit(config, world_size) or not counts_tokens(optim):
        return None
    for key, length in _lengths(optim).items():
        if length.steps is not None:
            return Finding(
                f"optim.{key}",
                f"{length.steps} steps in a schedule with a key in tokens",
                "tokens, as the other keys, or all in steps",
            )
    return None


def tail_fits_decay(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.decay != "wsd" or optim.tail is None:
        return None
    if optim.tail.steps is not None and optim.decay_tokens is None and optim.warmup_tokens is None:
        start, end, length = optim.warmup_steps, optim.decay_steps or config.run.steps, optim.tail.steps
    elif optim.tail.tokens is not None and optim.decay_tokens is not None:
        start, end, length = optim.warmup_tokens or 0, optim.decay_tokens, optim.tail.tokens
    else:
        return None
    if length <= end - start:
        return None
    return Finding(
        "optim.tail",
        f"{length} long; from the warm-up to the end of the decay it is {end - start}",
        "at most that",
    )


def pieces_follow_one_another(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.pieces is None:
        return None
    ends = [piece.tokens for piece in optim.pieces]
    closed = [end for end in ends if end is not None]
    first = optim.warmup_tokens or 0
    is_open = ends[-1] is None
    shapes = [piece.shape for piece in optim.pieces if piece.tokens is None]
    in_order = [first, *closed] == sorted({first, *closed}) and len(closed) == len(ends) - is_open
    if in_order and shapes in ([], ["constant"]):
        return None
    words = ", ".join(f"{piece.shape} to {piece.tokens}" for piece in optim.pieces)
    return Finding(
        "optim.pieces",
        f"{words}; optim.warmup_tokens {optim.warmup_tokens}",
        "ascending tokens behind the warm-up; without tokens only the last, and that constant",
    )


def plateau_has_validation(config: Config, world_size: int) -> Finding | None:
    if config.optim.decay != "plateau" or config.log.validate_every is not None:
        return None
    return Finding(
        "log.validate_every",
        "null with optim.decay plateau, which goes by the validation loss",
        "steps between two validations",
    )


def rollback_has_checkpoints(config: Config, world_size: int) -> Finding | None:
    guard = config.optim.guard
    if guard is None or guard.policy != "rollback" or config.checkpoint.every is not None:
        return None
    return Finding(
        "checkpoint.every",
        "null with optim.guard.policy rollback, which goes back to the last checkpoint",
        "steps between two checkpoints",
    )


def averages_differ(config: Config, world_size: int) -> Finding | None:
    decays = config.optim.ema
    if len(set(decays)) == len(decays):
        return None
    return Finding("optim.ema", f"{list(decays)}, one more than once", f"{sorted(set(decays))}")


def smoothing_kind_has_smoothing(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.label_smoothing_kind == "torch" or optim.label_smoothing > 0.0:
        return None
    return Finding(
        "optim.label_smoothing_kind",
        f"{optim.label_smoothing_kind} with optim.label_smoothing 0.0",
        "torch, or label smoothing",
    )


def _lengths(optim: OptimConfig) -> dict[str, LengthConfig | TailConfig | RestartsConfig]:
    """The lengths that are given, by key."""
    given = {"tail": optim.tail, "restarts": optim.restarts, "timescale": optim.timescale}
    return {key: length for key, length in given.items() if length is not None}


RULES: tuple[Rule, ...] = (
    decay_reads_its_keys,
    decay_has_its_keys,
    decay_reads_its_end,
    lengths_have_one_unit,
    schedule_has_one_unit,
    tail_fits_decay,
    pieces_follow_one_another,
    plateau_has_validation,
    rollback_has_checkpoints,
    averages_differ,
    smoothing_kind_has_smoothing,
)
