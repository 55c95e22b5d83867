"""A covering array: few combinations in which every two settings of different axes meet, chosen greedily.

    axes as data -> candidates drawn at random (a fixed seed) that the cross-checks let pass -> the one that covers most

A setting is a name and the keys of the config that it changes. What cannot be combined is not written here: the rules
of `assemble/rules.py` say so, and a pair for which no legal combination is found among many is not legal. The array
lies in `tests/golden/covering.txt`; `python -m tests.parity.covering` writes it anew when axes change.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megads.assemble.rules import findings
from megads.config.model import ModelConfig
from megads.config.parallel import ParallelConfig
from megads.config.root import Config
from megads.verify.batch import Masks
from megads.verify.trial import with_precision
from tests.parity.harness import Case, Model, make_config

FILE = Path(__file__).parents[1] / "golden" / "covering.txt"
LEAST = 60  # combinations
MOST_RANKS = 8
GLOBAL_BATCH = 12
SEQ = 12

EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_ffn": 12, "init_std": 0.1}
LATENTS = {"kv_heads": None, "q_lora": 10, "kv_lora": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 6}
PIPELINE = {"parallel.pipeline": 2}
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "tensor": {"1": {}, "2": {"parallel.tensor": 2}},
    "sequence": {
        "off": {},
        "on": {"parallel.sequence": True},
        "pieces": {"parallel.sequence": True, "parallel.sequence_pieces": 2},
    },
    "context": {
        "1": {},
        "ring": {"parallel.context": 2},
        "ulysses": {"parallel.context": 2, "parallel.context_kind": "ulysses"},
        "all_gather": {"parallel.context": 2, "parallel.context_kind": "all_gather"},
    },
    "pipeline": {
        "1": {},
        "gpipe": {**PIPELINE, "parallel.schedule": "gpipe"},
        "one_f_one_b": PIPELINE,
        "uneven": {**PIPELINE, "parallel.stage_layers": (0, 3)},
        "interleaved": {**PIPELINE, "parallel.schedule": "interleaved", "parallel.virtual_stages": 2},
        "zero_bubble_h1": {**PIPELINE, "parallel.schedule": "zero_bubble_h1"},
        "zero_bubble_h2": {**PIPELINE, "parallel.schedule": "zero_bubble_h2"},
        "zbv": {**PIPELINE, "parallel.schedule": "zbv", "parallel.virtual_stages": 2},
        "dualpipe_v": {**PIPELINE, "parallel.schedule": "dualpipe_v", "parallel.virtual_stages": 2},
    },
    "data": {"1": {}, "2": {"data": 2}},
    "expert": {"1": {}, "2": {"parallel.expert": 2}},
    "expert_tensor": {"as_tensor": {}, "1": {"parallel.expert_tensor": 1}, "2": {"parallel.expert_tensor": 2}},
    "zero": {"0": {}, "1": {"optim.zero_stage": 1}, "2": {"optim.zero_stage": 2}},
    "engine": {"native": {}, "deepspeed": {"optim.engine": "deepspeed"}},
    "recompute": {
        "none": {},
        "full": {"parallel.recompute": "full"},
        "branches": {"parallel.recompute": ("attention", "mlp")},
        "cheap": {"parallel.recompute": ("norm", "activation"), "parallel.recompute_layers": 1},
    },
    "memory": {"kept": {}, "offload": {"parallel.offload": True}, "loss_chunk": {"parallel.loss_chunk": 7}},
    "micro": {"1": {"batch.micro": 1}, "3": {"batch.micro": 3}},
    "mask": {"none": {"masks": "whole"}, "unequal": {}, "documents": {"data.document_mask": True}},
    "model": {
        "gpt": {"model.family": "gpt", "model.kv_heads": None},
        "llama": {},
        "dropout": {"model.dropout": 0.1, "model.attention_dropout": 0.1},
        "moe": {**{f"model.{k}": v for k, v in EXPERTS.items()}, "model.balance": "sequence", "model.z_loss": 0.01},
        "moe_bias": {
            **{f"model.{k}": v for k, v in EXPERTS.items()},
            "model.router": "sigmoid",
            "model.balance": "bias",
            "model.shared_experts": 1,
            "model.dense_layers": 1,
        },
        "qwen_moe": {
            **{f"model.{k}": v for k, v in EXPERTS.items()},
            "model.family": "qwen3_moe",
            "model.head_dim": 4,
            "model.dense_layers": (1,),
            "model.balance": "global",
            "model.mtp_layers": 2,
        },
        "deepseek": {
            **{f"model.{k}": v for k, v in (EXPERTS | LATENTS).items()},
            "model.family": "deepseek_v3",
            "model.router": "sigmoid",
            "model.expert_groups": 2,
            "model.balance": "bias",
            "model.balance_weight": 0.01,
            "model.shared_experts": 1,
            "model.dense_layers": 1,
            "model.mtp_layers": 1,
        },
    },
    "tied": {"yes": {"model.tied": True}, "no": {"model.tied": False}},
}  # fmt: skip

Settings = tuple[str, ...]  # of each axis, in the order of AXES
Pair = tuple[tuple[str, str], tuple[str, str]]


@dataclass(frozen=True)
class Combination:
    """One setting of each axis, and the training that it means."""

    settings: Settings
    config: Config
    world_size: int
    masks: Masks

    @property
    def pairs(self) -> set[Pair]:
        return set(itertools.combinations(zip(AXES, self.settings, strict=True), 2))

    @property
    def model(self) -> tuple[str, ...]:
        """The settings that one process has too: the key of the reference."""
        chosen = dict(zip(AXES, self.settings, strict=True))
        return tuple(chosen[axis] for axis in ("model", "tied", "mask"))

    def __str__(self) -> str:
        plain = (next(iter(settings)) for settings in AXES.values())
        named = zip(AXES, self.settings, plain, strict=True)
        return "-".join(f"{axis}={setting}" for axis, setting, usual in named if setting != usual)

    def alone(self) -> Config:
        """The same model and batch in one process, in float64."""
        config = with_precision(self.config, "fp64")
        return replace(
            config,
            parallel=ParallelConfig(),
            batch=replace(config.batch, micro=GLOBAL_BATCH),
            optim=replace(config.optim, engine="native", zero_stage=0),
        )


def combine(settings: Settings) -> Combination | None:
    """What these settings mean together; None: a cross-check refuses them, or they need too many ranks."""
    changes: dict[str, Any] = {}
    for axis, setting in zip(AXES, settings, strict=True):
        changes |= AXES[axis][setting]
    data, masks = changes.pop("data", 1), changes.pop("masks", "unequal")
    degrees = ("tensor", "context", "pipeline")
    world_size = data
    for degree in degrees:
        world_size *= changes.get(f"parallel.{degree}", 1)
    if world_size > MOST_RANKS:
        return None
    config = _base()
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    for section, values in sections.items():
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return None if findings(config, world_size) else Combination(settings, config, world_size, masks)


def _base() -> Config:
    config = make_config(Model("llama", layers=3, seq=SEQ), Case(), precision="fp32")
    small: ModelConfig = replace(config.model, hidden=48, heads=8, kv_heads=4, ffn=22)
    return replace(
        config,
        model=small,
        batch=replace(config.batch, global_size=GLOBAL_BATCH),
        optim=replace(config.optim, bucket_elements=3000, eps=1e-4),
    )


def all_pairs() -> set[Pair]:
    """Every two settings of two axes, legal or not."""
    return {
        ((a, x), (b, y))
        for (a, xs), (b, ys) in itertools.combinations(AXES.items(), 2)
        for x in xs
        for y in ys
    }


@dataclass(frozen=True)
class CoveringArray:
    combinations: tuple[Combination, ...]
    illegal: frozenset[Pair]  # for which no legal combination was found


def build_array(*, least: int = LEAST, num_candidates: int = 24, patience: int = 400) -> CoveringArray:
    """Combinations that cover every legal pair, at least `least` of them; the same each time.

    Args:
        num_candidates: legal combinations among which each is chosen.
        patience: draws after which a pair is called illegal.
    """
    draw = random.Random(7)
    uncovered, illegal = all_pairs(), set[Pair]()
    found: list[Combination] = []
    while uncovered:
        wanted = min(uncovered)
        candidates = list(itertools.islice(_candidates(draw, dict(wanted), patience), num_candidates))
        if not candidates:
            illegal.add(wanted)
            uncovered.remove(wanted)
            continue
        best = max(candidates, key=lambda candidate: len(candidate.pairs & uncovered))
        uncovered -= best.pairs
        found.append(best)
    while len(found) < least:
        found += itertools.islice(_candidates(draw, {}, patience), 1)
    return CoveringArray(tuple(found), frozenset(illegal))


def _candidates(draw: random.Random, fixed: Mapping[str, str], patience: int) -> Iterator[Combination]:
    """Legal combinations with these settings."""
    for _ in range(patience):
        settings = tuple(fixed.get(axis) or draw.choice(list(choices)) for axis, choices in AXES.items())
        combination = combine(settings)
        if combination is not None:
            yield combination


def write(array: CoveringArray) -> str:
    """The text of the array: a row a combination, a column an axis."""
    rows = [tuple(AXES), *(combination.settings for combination in array.combinations)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(AXES))]
    lines = [
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines) + "\n"


def read() -> tuple[Combination, ...]:
    """The array that lies in the file."""
    header, *rows = [line.split() for line in FILE.read_text().splitlines()]
    assert header == list(AXES), "axes have changed: write the array anew"
    found = [combine(tuple(row)) for row in rows]
    assert None not in found, f"row {found.index(None) + 1} is not legal any more: write the array anew"
    return tuple(combination for combination in found if combination is not None)


if __name__ == "__main__":
    sys.stdout.write(write(build_array()))
