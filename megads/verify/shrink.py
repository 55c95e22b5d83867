"""The user's config made so small that float64 on a few CPU ranks takes seconds, with every feature left on.

Kept: family, query heads a key/value head, tied or not, dropout, norms, recompute, documents, router, shared experts,
balance, capacity, clipping, weight decay, engine, ZeRO. Made small: widths, layers, experts, vocabulary, sequence and
batch, to the least sizes that every layout can cut, and beyond that to odd ones: a vocabulary that is prime, layers
that stages do not divide, a number of micro-batches that is no multiple of the stages. All trials get the same sizes,
so one reference serves them all. Plain SGD becomes AdamW, whose first moment shows the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from megads.assemble.schedule import own_schedule
from megads.config.model import LATENT_FAMILIES, ModelConfig
from megads.config.root import Config
from megads.verify.trial import Trial

VOCAB = 53  # prime: no tensor-parallel degree divides it
HEAD_DIM = 6  # even, for rotary positions
SEQUENCE = 10
LAYERS = 3
FFN = 33
EXPERT_FFN = 15
MOST = 4  # query heads a key/value head, experts a token, groups of experts
BUCKET = 3000  # gradient elements: several buckets in any model
LEAST_EPS = (
    1e-4  # Adam's: with less, a gradient that is noise (GPT-2's key bias) moves a weight by a whole lr
)


def shrink(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials with small sizes, the same in all of them."""
    configs = [trial.config for trial in trials]
    model = _model(configs[0].model, configs)
    length = _sequence_length(configs)
    trials = tuple(
        replace(trial, config=_small(trial.config, model, length, has_micro=trial.has_micro))
        for trial in trials
    )
    size = _global_batch(trials)
    return tuple(
        replace(t, config=replace(t.config, batch=replace(t.config.batch, global_size=size))) for t in trials
    )


def _small(config: Config, model: ModelConfig, length: int, *, has_micro: bool) -> Config:
    parallel = config.parallel
    return replace(
        config,
        model=model,
        data=replace(config.data, sequence_length=length, page=None),
        batch=replace(
            config.batch,
            micro=config.batch.micro if has_micro else min(config.batch.micro, 2),
            ramp=None,
            ramp_unit=None,
        ),
        optim=replace(
            config.optim,
            moment_dtype="fp32",  # low precision in the state or on the way is no matter of layouts
            reduce_dtype="fp32",
            name="muon" if config.optim.name == "muon" else "adamw",  # whose moments tell the gradient
            groups=(),  # they may name layers that are gone
            bucket_elements=min(config.optim.bucket_elements, BUCKET),
            eps=max(config.optim.eps, LEAST_EPS),
        ),
        parallel=replace(
            parallel,
            recompute_layers=None if parallel.recompute_layers is None else 1,
            loss_chunk=None if parallel.loss_chunk is None else 7,
            stage_layers=_stage_layers(parallel.stage_layers, model.layers),
        ),
    )


def _stage_layers(listed: tuple[int, ...] | None, layers: int) -> tuple[int, ...] | None:
    """A user's list for fewer layers: one in each inner stage, the rest in the stage that had most."""
    if listed is None:
        return None
    last = len(listed) - 1
    least = [int(0 < stage < last) for stage in range(len(listed))]
    least[listed.index(max(listed))] += layers - sum(least)
    return tuple(least)


def _model(model: ModelConfig, configs: Sequence[Config]) -> ModelConfig:
    tensor = math.lcm(*(c.parallel.tensor for c in configs))
    heads = math.lcm(tensor, *(c.parallel.tensor * _ulysses(c) for c in configs))
    has_one_kv = model.kv_heads == 1
    kv_heads = 1 if has_one_kv else max(heads, 2)
    ratio = model.heads // (model.kv_heads or model.heads)
    num_heads = heads * min(ratio, MOST) if has_one_kv else kv_heads * min(ratio, MOST)
    stages = max(c.parallel.pipeline * c.parallel.virtual_stages for c in configs)
    layers = max(LAYERS, stages - 1)
    experts = math.lcm(*(c.parallel.expert for c in configs))
    expert_tensor = math.lcm(tensor, *(c.parallel.expert_tensor or 1 for c in configs))
    small = replace(
        _latents(model),
        layers=layers,
        heads=num_heads,
        kv_heads=None if model.kv_heads is None else kv_heads,
        hidden=num_heads * HEAD_DIM,
        head_dim=None if model.head_dim in (None, model.hidden // model.heads) else HEAD_DIM + 2,
        ffn=_odd_multiple(tensor, FFN),
        vocab=VOCAB,
        max_positions=None,
    )
    return small if model.experts is None else _experts(small, experts, expert_tensor)


def _latents(model: ModelConfig) -> ModelConfig:
    """Narrow latents and heads of latent attention, all of different widths."""
    if model.family not in LATENT_FAMILIES:
        return model
    q_lora = None if model.q_lora is None else 2 * HEAD_DIM
    return replace(model, q_lora=q_lora, kv_lora=HEAD_DIM + 3, nope_dim=HEAD_DIM, rope_dim=4, v_dim=5)


def _ulysses(config: Config) -> int:
    """Parts in which the context ranks need heads."""
    return config.parallel.context if config.parallel.context_kind == "ulysses" else 1


def _experts(model: ModelConfig, degree: int, tensor: int) -> ModelConfig:
    """Few experts, as many groups and choices a token as fit."""
    groups = min(model.expert_groups, MOST)
    per_token = min(model.experts_per_token, MOST)
    chosen = min(model.groups_per_token, groups)
    if model.groups_per_token < model.expert_groups:
        chosen = min(chosen, max(groups - 1, 1))
    unit = math.lcm(groups, degree)
    experts = unit
    while experts <= per_token or experts < 2 * groups or experts // groups * chosen < per_token:
        experts += unit
    return replace(
        model,
        experts=experts,
        experts_per_token=per_token,
        expert_groups=groups,
        groups_per_token=chosen,
        expert_ffn=_odd_multiple(tensor, EXPERT_FFN),
        shared_experts=min(model.shared_experts, 1),
        dense_layers=min(model.dense_layers, 1) if isinstance(model.dense_layers, int) else (1,),
    )


def _odd_multiple(unit: int, least: int) -> int:
    """An odd number of units, at least `least` in all."""
    return unit * (-(-least // unit) | 1)


def _sequence_length(configs: Iterable[Config]) -> int:
    unit = 1
    for config in configs:
        parallel = config.parallel
        cut = 2 * parallel.context if parallel.context > 1 else 1
        unit = math.lcm(unit, cut * (parallel.tensor if parallel.sequence else 1))
    return _odd_multiple(unit, SEQUENCE) if unit > 1 else SEQUENCE


def _global_batch(trials: Sequence[Trial]) -> int:
    """Samples that every layout can deal, in more micro-batches than it has stages."""
    units = [trial.data * trial.config.batch.micro for trial in trials]
    for trial in trials:
        own = own_schedule(trial.config.parallel)
        if own is not None:
            return own.num_micro_batches * trial.data * trial.config.batch.micro
    unit = math.lcm(*units)
    most = max(
        u * (t.config.parallel.pipeline * t.config.parallel.virtual_stages + 1)
        for u, t in zip(units, trials, strict=True)
    )
    return _odd_multiple(unit, max(most, 7))
