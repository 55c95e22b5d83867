"""Cross-checks of the native engine: how gradients are reduced, where and in which dtype the state is kept.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule, divisors
from megads.config.loss_scale import LossScaleConfig
from megads.config.root import Config


def reduction_is_in_step(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.engine != "native" or optim.reduce_every == 1 or optim.zero_stage == 2:
        return None
    return Finding(
        "optim.reduce_every",
        f"{optim.reduce_every} with optim.zero_stage {optim.zero_stage}, which reduces once a step",
        "1, or optim.zero_stage 2",
    )


def reduction_is_rounded_once(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.engine != "native" or optim.reduce_dtype == "fp32":
        return None
    if optim.zero_stage == 0:
        why = "optim.zero_stage 0, where sums would be rounded once more on their way back"
    elif optim.precision == "fp64":
        why = "optim.precision fp64, which is for exact numbers"
    else:
        return None
    return Finding(
        "optim.reduce_dtype", f"{optim.reduce_dtype} with {why}", "fp32", "optim.zero_stage=1 rounds once"
    )


def shards_fit_ranks(config: Config, world_size: int) -> Finding | None:
    optim, parallel = config.optim, config.parallel
    used = parallel.tensor * parallel.pipeline
    if optim.engine != "native" or optim.shard_size is None or world_size % used:
        return None
    ranks = world_size // used
    if optim.zero_stage == 0:
        return Finding(
            "optim.shard_size",
            f"{optim.shard_size} with optim.zero_stage 0",
            "null, or optim.zero_stage 1 or 2",
        )
    if ranks % optim.shard_size:
        return Finding(
            "optim.shard_size",
            f"{optim.shard_size} of {world_size} / (tensor {parallel.tensor} x pipeline {parallel.pipeline}) = {ranks} "
            "data-parallel ranks",
            divisors(ranks),
        )
    block, grid = (
        optim.shard_size * parallel.tensor,
        parallel.expert * (parallel.expert_tensor or parallel.tensor),
    )
    if block % grid == 0 or grid % block == 0:
        return None
    fits = [
        n
        for n in range(1, ranks + 1)
        if ranks % n == 0 and not (n * parallel.tensor % grid and grid % (n * parallel.tensor))
    ]
    return Finding(
        "optim.shard_size",
        f"{optim.shard_size} x tensor {parallel.tensor} = {block} ranks, and experts dealt over {grid}",
        ", ".join(map(str, fits)),
    )


def state_is_adams(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    key = "optim.offload" if optim.offload else "optim.moment_dtype"
    is_plain = not optim.offload and optim.moment_dtype == "fp32"
    if optim.engine != "native" or is_plain or optim.name == "adamw":
        return None
    value = optim.offload if optim.offload else optim.moment_dtype
    return Finding(
        key, f"{value} with optim.name {optim.name}", "optim.name adamw, whose state alone is kept so"
    )


def moments_have_precision(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.moment_dtype == "fp32" or optim.precision != "fp64" or optim.engine != "native":
        return None
    return Finding(
        "optim.moment_dtype",
        f"{optim.moment_dtype} with optim.precision fp64, which is for exact numbers",
        "fp32",
    )


def averages_are_on_device(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if not optim.offload or not optim.ema:
        return None
    return Finding(
        "optim.ema",
        f"{list(optim.ema)} with optim.offload true, whose masters are in the host's memory when averages are to move",
        "[], or optim.offload false",
    )


def loss_scale_has_reader(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.precision == "fp16" or optim.loss_scale == LossScaleConfig():
        return None
    return Finding(
        "optim.loss_scale",
        f"given with optim.precision {optim.precision}, whose loss is not scaled",
        "no loss_scale, or optim.precision fp16",
    )


RULES: tuple[Rule, ...] = (
    reduction_is_in_step,
    reduction_is_rounded_once,
    shards_fit_ranks,
    state_is_adams,
    moments_have_precision,
    averages_are_on_device,
    loss_scale_has_reader,
)
