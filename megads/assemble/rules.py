"""Cross-checks: keys that are right alone and wrong together, as a table of small pure functions.

    check(config, world_size) -> every rule of RULES -> findings -> one ConfigError that lists them all

Runs before any process group exists and needs no torch. Single keys are checked in `config/load.py`; files
that a config names (corpora, tokenizer, checkpoints) are checked where they are opened.

Legal and therefore no rule: ZeRO stage 1 on one data-parallel rank (it shards over 1), a decay that ends
before or after the run, fewer micro-batches than stages, a vocabulary divisible by nothing (ranks pad it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megads.assemble.deepspeed_keys import OWNED, owned_keys
from megads.config.data import CorpusConfig
from megads.config.root import Config
from megads.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says no to.

    Attributes:
        key: the key to change first.
        found: its value and what it does not fit, with the arithmetic.
        allowed: the nearest values that fit.
        do: another way out, if there is one.
    """

    key: str
    found: str
    allowed: str
    do: str | None = None

    def __str__(self) -> str:
        lines = [self.key, f"  found:   {self.found}", f"  allowed: {self.allowed}"]
        return "\n".join([*lines, f"  do:      {self.do}"] if self.do else lines)


def check(config: Config, world_size: int, *, host_ranks: range | None = None) -> None:
    """Refuse a config whose keys do not fit each other, `world_size` ranks, or the hosts they run on.

    Args:
        host_ranks: global ranks of one host; None: not known here, and every rank checks its own.

    Raises:
        ConfigError: listing the findings of all rules.
    """
    found = list(findings(config, world_size))
    if host_ranks is not None and len(host_ranks) < world_size:
        found += filter(None, [tensor_stays_on_host(config, host_ranks)])
    if found:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise ConfigError("\n".join([f"the config does not fit {ranks}:", *map(str, found)]))


def findings(config: Config, world_size: int) -> tuple[Finding, ...]:
    """What the rules of the table say no to, in the order of the table."""
    return tuple(finding for rule in RULES if (finding := rule(config, world_size)) is not None)


def ranks_fill_layout(config: Config, world_size: int) -> Finding | None:
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    used = tensor * pipeline
    if world_size % used == 0:
        return None
    fitting = [f"tensor {t} x pipeline {p}" for t, p in _pairs_near(world_size, tensor, pipeline)]
    return Finding(
        "parallel.tensor x parallel.pipeline",
        f"{tensor} x {pipeline} = {used} ranks for one replica of the model; {world_size} / {used} = "
        f"{world_size / used:.4g} data-parallel replicas",
        f"{_multiples(world_size, used)} ranks; or on {world_size}: {', '.join(fitting)}",
        "change the number of processes or the degrees",
    )


def heads_fill_tensor(config: Config, world_size: int) -> Finding | None:
    heads, tensor = config.model.heads, config.parallel.tensor
    if heads % tensor == 0:
        return None
    return Finding(
        "parallel.tensor",
        f"{tensor}; model.heads {heads} / {tensor} = {heads / tensor:.4g} heads a rank",
        f"a divisor of model.heads: {_divisors(heads)}; or {_multiples(heads, tensor)} heads",
    )


def kv_heads_fill_tensor(config: Config, world_size: int) -> Finding | None:
    kv_heads, tensor = config.model.kv_heads, config.parallel.tensor
    if kv_heads is None or kv_heads % tensor == 0:
        return None
    return Finding(
        "parallel.tensor",
        f"{tensor}; model.kv_heads {kv_heads} / {tensor} = {kv_heads / tensor:.4g} key/value heads a rank",
        f"a divisor of model.kv_heads: {_divisors(kv_heads)}",
        "use more of parallel.pipeline or data-parallel ranks instead",
    )


def ffn_fills_tensor(config: Config, world_size: int) -> Finding | None:
    ffn, tensor = config.model.ffn, config.parallel.tensor
    if ffn is None or ffn % tensor == 0:
        return None
    return Finding(
        "model.ffn",
        f"{ffn}; {ffn} / parallel.tensor {tensor} = {ffn / tensor:.6g} columns a rank",
        f"a multiple of {tensor}: {_multiples(ffn, tensor)}",
    )


def heads_share_kv_heads(config: Config, world_size: int) -> Finding | None:
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if kv_heads is None or heads % kv_heads == 0:
        return None
    return Finding(
        "model.kv_heads",
        f"{kv_heads}; model.heads {heads} / {kv_heads} = {heads / kv_heads:.4g} query heads a key/value head",
        f"a divisor of model.heads: {_divisors(heads)}",
    )


def hidden_fills_heads(config: Config, world_size: int) -> Finding | None:
    hidden, heads = config.model.hidden, config.model.heads
    if hidden % heads == 0:
        return None
    return Finding(
        "model.hidden",
        f"{hidden}; {hidden} / model.heads {heads} = {hidden / heads:.6g} for one head",
        f"a multiple of {heads}: {_multiples(hidden, heads)}",
    )


def rotary_head_is_even(config: Config, world_size: int) -> Finding | None:
    hidden, heads = config.model.hidden, config.model.heads
    if config.model.family == "gpt" or hidden % heads or hidden // heads % 2 == 0:
        return None
    return Finding(
        "model.hidden",
        f"{hidden}; {hidden} / model.heads {heads} = {hidden // heads}, odd; rotary positions turn pairs",
        f"a multiple of 2 x {heads}: {_multiples(hidden, 2 * heads)}",
    )


def stages_have_blocks(config: Config, world_size: int) -> Finding | None:
    layers = config.model.layers
    stages = config.parallel.pipeline * config.parallel.virtual_stages
    if stages <= layers + 2:
        return None
    return Finding(
        "parallel.pipeline x parallel.virtual_stages",
        f"{stages} stages for {layers} layers + embedding + head = {layers + 2} blocks",
        f"at most {layers + 2}",
    )


def only_interleaving_has_virtual_stages(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    if parallel.virtual_stages == 1 or parallel.schedule == "interleaved":
        return None
    return Finding(
        "parallel.virtual_stages",
        f"{parallel.virtual_stages} with parallel.schedule {parallel.schedule}, which has one stage a rank",
        "1, or parallel.schedule=interleaved",
    )


def sequence_fills_tensor(config: Config, world_size: int) -> Finding | None:
    length, tensor = config.data.sequence_length, config.parallel.tensor
    if not config.parallel.sequence or length % tensor == 0:
        return None
    return Finding(
        "data.sequence_length",
        f"{length}; {length} / parallel.tensor {tensor} = {length / tensor:.6g} positions a rank",
        f"a multiple of {tensor}: {_multiples(length, tensor)}",
        "parallel.sequence=false keeps activations whole",
    )


def batch_fills_ranks(config: Config, world_size: int) -> Finding | None:
    replicas, rest = divmod(world_size, config.parallel.tensor * config.parallel.pipeline)
    total, micro = config.batch.global_size, config.batch.micro
    if rest or total % (micro * replicas) == 0:
        return None
    unit = micro * replicas
    return Finding(
        "batch.global",
        f"{total}; {total} / (batch.micro {micro} x {replicas} data-parallel ranks) = "
        f"{total / unit:.4g} micro-batches",
        f"a multiple of {unit}: {_multiples(total, unit)}",
    )


def page_fits_sequence(config: Config, world_size: int) -> Finding | None:
    page, length = config.data.page, config.data.sequence_length
    if page is None or length % page == 0 or page % length == 0:
        return None
    return Finding(
        "data.page",
        f"{page} tokens; data.sequence_length {length} is neither whole pages nor an equal cut of one",
        f"a multiple of {length} ({_multiples(page, length)}), or a divisor: {_divisors(length)}",
    )


def positions_hold_sequence(config: Config, world_size: int) -> Finding | None:
    positions, length = config.model.max_positions, config.data.sequence_length
    if config.model.family != "gpt" or positions is None or length <= positions:
        return None
    return Finding(
        "data.sequence_length",
        f"{length} tokens for model.max_positions {positions} learned positions",
        f"at most {positions}",
        "raise model.max_positions",
    )


def decay_goes_down(config: Config, world_size: int) -> Finding | None:
    lr, min_lr = config.optim.lr, config.optim.min_lr
    if min_lr <= lr:
        return None
    return Finding("optim.min_lr", f"{min_lr} above optim.lr {lr}", f"at most {lr}")


def constant_lr_has_no_end(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.decay != "constant" or (optim.decay_steps is None and optim.min_lr == 0.0):
        return None
    return Finding(
        "optim.decay",
        f"constant with optim.min_lr {optim.min_lr} and decay_steps {optim.decay_steps}, which it ignores",
        "neither of them with constant",
        "leave them out, or choose cosine or linear",
    )


def warmup_ends_before_decay(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    key, last = ("run.steps", config.run.steps)
    if optim.decay_steps is not None:
        key, last = ("optim.decay_steps", optim.decay_steps)
    if optim.warmup_steps < last:
        return None
    return Finding("optim.warmup_steps", f"{optim.warmup_steps} of {key} {last}", f"at most {last - 1}")


def stop_is_in_run(config: Config, world_size: int) -> Finding | None:
    stop, steps = config.run.stop_after, config.run.steps
    if stop is None or stop <= steps:
        return None
    return Finding("run.stop_after", f"{stop} of run.steps {steps}", f"at most {steps}, or null")


def validation_has_data(config: Config, world_size: int) -> Finding | None:
    every = config.log.validate_every
    if every is None or config.data.valid is not None:
        return None
    return Finding("data.valid", f"null with log.validate_every {every}", "the PREFIX of a held-out corpus")


def corpora_differ(config: Config, world_size: int) -> Finding | None:
    train = config.data.train
    paths = [corpus.path if isinstance(corpus, CorpusConfig) else corpus for corpus in train]
    twice = [] if isinstance(train, str) else sorted({path for path in paths if paths.count(path) > 1})
    if not twice:
        return None
    return Finding(
        "data.train", f"{', '.join(twice)} more than once", "each corpus once", "raise its weight instead"
    )


def engine_has_stage(config: Config, world_size: int) -> Finding | None:
    engine, stage = config.optim.engine, config.optim.zero_stage
    stages = (1, 2) if engine == "deepspeed" else (0, 1)
    if stage in stages:
        return None
    return Finding(
        "optim.zero_stage",
        f"{stage} with optim.engine {engine}",
        f"{stages[0]} or {stages[1]} with {engine}",
        f"optim.engine={'native' if engine == 'deepspeed' else 'deepspeed'} has it",
    )


def engine_has_precision(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.engine != "deepspeed" or optim.precision != "fp64":
        return None
    return Finding(
        "optim.precision",
        "fp64 with optim.engine deepspeed, whose masters are float32",
        "fp32, bf16, or fp16",
        "optim.engine=native has fp64",
    )


def deepspeed_keys_have_reader(config: Config, world_size: int) -> Finding | None:
    optim = config.optim
    if optim.engine == "deepspeed" or not optim.deepspeed:
        return None
    return Finding(
        "optim.deepspeed",
        f"{', '.join(optim.deepspeed)} with optim.engine {optim.engine}, which does not read them",
        "no keys, or optim.engine deepspeed",
    )


def deepspeed_keys_are_free(config: Config, world_size: int) -> Finding | None:
    zero = config.optim.deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return Finding(
            "optim.deepspeed", f"zero_optimization: {zero}", "zero_optimization: {key: value, ...}"
        )
    owned = owned_keys(config.optim.deepspeed)
    if not owned:
        return None
    return Finding(
        "optim.deepspeed",
        f"{', '.join(owned)}, which megads sets itself",
        "keys of DeepSpeed that megads has no part in",
        "; ".join(f"instead of {name}: {OWNED[name]}" for name in owned),
    )


def tensor_stays_on_host(config: Config, host_ranks: range) -> Finding | None:
    """Every layer waits for its tensor-parallel group, so that group belongs on the links inside a host.

    Groups are ranks [k * tensor, (k + 1) * tensor): none crosses if every host starts and ends at a multiple.
    """
    tensor, first, size = config.parallel.tensor, host_ranks.start, len(host_ranks)
    if config.parallel.allow_cross_node or (first % tensor == 0 and size % tensor == 0):
        return None
    end = first + size
    lowest = first // tensor * tensor if first % tensor else end // tensor * tensor
    fitting = [degree for degree in range(1, size + 1) if size % degree == 0 and first % degree == 0]
    return Finding(
        "parallel.tensor",
        f"{tensor}; this host runs ranks {first} to {end - 1} ({size} ranks), so the group of ranks {lowest} to "
        f"{lowest + tensor - 1} crosses to another host",
        f"a degree that divides the ranks of a host: {', '.join(map(str, fitting))}",
        "use more of parallel.pipeline or data-parallel ranks instead; or, if the hosts' network is as fast as their "
        "inner links, parallel.allow_cross_node=true",
    )


Rule = Callable[[Config, int], Finding | None]

RULES: tuple[Rule, ...] = (
    ranks_fill_layout,
    heads_fill_tensor,
    kv_heads_fill_tensor,
    ffn_fills_tensor,
    heads_share_kv_heads,
    hidden_fills_heads,
    rotary_head_is_even,
    stages_have_blocks,
    only_interleaving_has_virtual_stages,
    sequence_fills_tensor,
    batch_fills_ranks,
    page_fits_sequence,
    positions_hold_sequence,
    decay_goes_down,
    constant_lr_has_no_end,
    warmup_ends_before_decay,
    stop_is_in_run,
    validation_has_data,
    corpora_differ,
    engine_has_stage,
    engine_has_precision,
    deepspeed_keys_have_reader,
    deepspeed_keys_are_free,
)


def _multiples(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`."""
    below = value // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _divisors(value: int) -> str:
    return ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)


def _pairs_near(world_size: int, tensor: int, pipeline: int) -> list[tuple[int, int]]:
    """Up to three (tensor, pipeline) that fill `world_size` ranks and differ least from the wanted pair."""
    degrees = [n for n in range(1, world_size + 1) if world_size % n == 0]
    pairs = [(t, p) for t in degrees for p in degrees if world_size % (t * p) == 0]
    return sorted(pairs, key=lambda pair: (abs(pair[0] - tensor) + abs(pair[1] - pipeline), pair))[:3]
