"""Generation with a cache makes the logits and tokens that computing the whole text anew for each token makes.

Under every layout, of every kind of attention, and beyond the model's positions, where the text slides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megads.assemble.wiring import Model as Built
from megads.assemble.wiring import layout_of, stage_ranges
from megads.evaluate import generate
from megads.evaluate.generate import Generator, Sampling
from megads.layers.cache import Cache
from megads.layers.mla import MLASpec
from megads.model.catalog import describe
from megads.model.decoder import make_blocks
from megads.model.spec import DecoderSpec
from megads.ops.rope import RopeSpec
from megads.parallel.mesh import build_mesh
from megads.parallel.parameter import Scope, fill
from tests.parity.harness import VOCAB, Case, Model, make_config
from tests.ranks import run_ranks

PROMPT = (7, 3, 1, 22, 5)
NUM_TOKENS = 9
POSITIONS = 11  # the last three tokens are of a text that slides
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_ffn": 12, "shared_experts": 1, "dense_layers": 1}
WIDE = {"init_std": 0.3, "max_positions": POSITIONS}  # weights so large that every token matters
LATENTS = MLASpec(heads=8, q_lora=10, kv_lora=12, nope_dim=6, rope_dim=4, v_dim=6, norm_eps=1e-6, scale=0.3)
MODELS = {
    "gpt": Model("gpt", overrides=WIDE),
    "llama": Model("llama", kv_heads=4, overrides=WIDE | {"mtp_layers": 1}),
    "mqa": Model("llama", kv_heads=1, overrides=WIDE),
    "experts": Model("llama", overrides=WIDE | EXPERTS),
    "latent": Model("llama", overrides=WIDE),
}
CASES = (
    ("gpt", Case()),
    ("gpt", Case(tensor=2, sequence=True)),
    ("gpt", Case(pipeline=2, schedule="zbv", chunks=2)),
    ("llama", Case(pipeline=2, tensor=2)),
    ("llama", Case(context=2, tensor=2, sequence=True)),
    ("mqa", Case(context=2, context_kind="all_gather")),
    ("experts", Case(data=2, expert=2)),
    ("experts", Case(tensor=2, expert=2, expert_tensor=1, sequence=True, pipeline=2)),
    ("experts", Case(tensor=2, context=2, expert=2)),
    ("latent", Case()),
    ("latent", Case(tensor=2, sequence=True, pipeline=2)),
    ("latent", Case(context=2)),
)


@dataclass(frozen=True)
class Text:
    """What a rank made: tokens, and the logits of each of them if it has the head."""

    tokens: list[int]
    logits: list[Tensor]


def spec_of(name: str, config: Any) -> DecoderSpec:
    spec = describe(config.model, vocab=VOCAB, sequence_length=10)
    if name == "latent":
        return replace(spec, attention=LATENTS, rope=RopeSpec(10000.0, is_interleaved=True))
    return spec


def texts(rank: int, size: int, *, name: str, case: Case, precision: str) -> tuple[Text, Text]:
    """With the cache and without, on one rank."""
    config = make_config(MODELS[name], case, precision=precision)
    mesh = build_mesh(layout_of(config, size), rank)
    spec = spec_of(name, config)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    scope = Scope(mesh, dtype, 7, sequence_parallel=case.sequence, context_kind=config.parallel.context_kind)
    ranges = stage_ranges(config, spec, layout=mesh.layout)
    mine = {stage: range(*ranges[stage]) for stage in mesh.layout.stages_of(mesh.group("pp").rank)}
    model = Built(spec, make_blocks(scope, spec, stages=mine), case.sequence, scope.queue)
    for parameter in model.parameters:
        fill(parameter, seed=7)
    return made(model, mesh, has_cache=True), made(model, mesh, has_cache=False)


def made(model: Built, mesh: Any, *, has_cache: bool) -> Text:
    seen: list[Tensor] = []
    pick = generate.pick_token

    def watched(logits: Tensor, sampling: Sampling, *, generator: torch.Generator) -> int:
        seen.append(logits.clone())
        return pick(logits, sampling, generator=generator)

    generate.pick_token = watched
    try:
        tokens = Generator(model, mesh, has_cache=has_cache).extend(
            PROMPT, num_tokens=NUM_TOKENS, sampling=Sampling(temperature=0.7, seed=3)
        )
    finally:
        generate.pick_token = pick
    assert all(blocks.training for blocks in model.stages.values())
    return Text(tokens, seen)


@functools.cache
def alone(name: str) -> Text:
    """Without a cache, in one fp64 process."""
    return texts(0, 1, name=name, case=Case(), precision="fp64")[1]


def distance(got: Text, expected: Text) -> float:
    assert len(got.logits) == len(expected.logits) == NUM_TOKENS
    scale = max(float(logits.abs().max()) for logits in expected.logits)
    return max(float((a - b).abs().max()) for a, b in zip(got.logits, expected.logits, strict=True)) / scale


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}-{case}" for name, case in CASES])
def test_a_cache_changes_nothing(name: str, case: Case) -> None:
    run = functools.partial(texts, name=name, case=case, precision="fp64")
    found = run_ranks(run, case.world_size)
    expected = alone(name)
    assert len(set(expected.tokens)) > 3  # no text that says the same all the time
    assert any(cached.logits for cached, _ in found)
    for cached, plain in found:
        assert cached.tokens == plain.tokens == expected.tokens
        for text in (cached, plain):
            assert not text.logits or distance(text, expected) < 1e-12


@pytest.mark.parametrize("name", MODELS)
def test_in_fp32_to_rounding(name: str) -> None:
    cached, plain = texts(0, 1, name=name, case=Case(), precision="fp32")
    assert cached.tokens == plain.tokens
    assert distance(cached, plain) < 1e-5


def test_each_token_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the text slides; with experts that drop tokens, all of them each time."""
    steps: list[int] = []
    step = Cache.step

    def counted(cache: Cache, num_new: int) -> Any:
        steps.append(num_new)
        return step(cache, num_new)

    monkeypatch.setattr(Cache, "step", counted)
    texts(0, 1, name="llama", case=Case(), precision="fp32")
    ones = POSITIONS - len(PROMPT)
    assert steps == [len(PROMPT)] + [1] * ones + [POSITIONS] * (NUM_TOKENS - 1 - ones)
    steps.clear()
    monkeypatch.setitem(MODELS, "drops", Model("llama", overrides=WIDE | EXPERTS | {"capacity": 1.0}))
    cached, plain = texts(0, 1, name="drops", case=Case(), precision="fp32")
    assert cached.tokens == plain.tokens
    assert not steps


def _no_clear(cache: Cache) -> None:
    """The first tokens stay in sight when the text slides."""


def _one_behind(cache: Cache, layer: torch.nn.Module, *new: Tensor) -> tuple[Tensor, ...]:
    """A token does not see itself."""
    found = EXTEND(cache, layer, *new)
    if cache.length:
        for x in found:
            x[..., -1, :] = x[..., -2, :]
    return found


EXTEND = Cache.extend


@pytest.mark.parametrize(("method", "broken"), [("clear", _no_clear), ("extend", _one_behind)])
def test_a_wrong_cache_is_seen(
    method: str, broken: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone("llama")
    monkeypatch.setattr(Cache, method, broken)
    try:
        cached, _ = texts(0, 1, name="llama", case=Case(), precision="fp64")
    except RuntimeError:
        assert method == "clear"  # there is no room
    else:
        assert distance(cached, expected) > 1e-3
