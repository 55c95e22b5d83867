"""Cross-checks of the layout: degrees against ranks, heads, widths, stages, sequence and batch.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from itertools import product
from math import prod

from megads.assemble.finding import Finding, Rule, divisors, multiples
from megads.config.model import LATENT_FAMILIES
from megads.config.root import Config


def ranks_fill_layout(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    used = parallel.tensor * parallel.context * parallel.pipeline
    if world_size % used == 0:
        return None
    wanted = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline}
    if parallel.context == 1:
        del wanted["context"]
    fitting = [
        " x ".join(f"{name} {degree}" for name, degree in zip(wanted, degrees, strict=True))
        for degrees in _degrees_near(world_size, tuple(wanted.values()))
    ]
    return Finding(
        " x ".join(f"parallel.{name}" for name in wanted),
        f"{' x '.join(map(str, wanted.values()))} = {used} ranks for one replica of the model; {world_size} / {used} = "
        f"{world_size / used:.4g} data-parallel replicas",
        f"{multiples(world_size, used)} ranks; or on {world_size}: {', '.join(fitting)}",
        "change the number of processes or the degrees",
    )


def heads_fill_tensor(config: Config, world_size: int) -> Finding | None:
    heads, tensor = config.model.heads, config.parallel.tensor
    if heads % tensor == 0:
        return None
    return Finding(
        "parallel.tensor",
        f"{tensor}; model.heads {heads} / {tensor} = {heads / tensor:.4g} heads a rank",
        f"a divisor of model.heads: {divisors(heads)}; or {multiples(heads, tensor)} heads",
    )


def kv_heads_fill_tensor(config: Config, world_size: int) -> Finding | None:
    kv_heads, tensor = config.model.kv_heads, config.parallel.tensor
    if kv_heads is None or kv_heads % tensor == 0:
        return None
    return Finding(
        "parallel.tensor",
        f"{tensor}; model.kv_heads {kv_heads} / {tensor} = {kv_heads / tensor:.4g} key/value heads a rank",
        f"a divisor of model.kv_heads: {divisors(kv_heads)}",
        "use more of parallel.pipeline or data-parallel ranks instead",
    )


def ffn_fills_tensor(config: Config, world_size: int) -> Finding | None:
    ffn, tensor = config.model.ffn, config.parallel.tensor
    if ffn is None or ffn % tensor == 0:
        return None
    return Finding(
        "model.ffn",
        f"{ffn}; {ffn} / parallel.tensor {tensor} = {ffn / tensor:.6g} columns a rank",
        f"a multiple of {tensor}: {multiples(ffn, tensor)}",
    )


def heads_share_kv_heads(config: Config, world_size: int) -> Finding | None:
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if kv_heads is None or heads % kv_heads == 0:
        return None
    return Finding(
        "model.kv_heads",
        f"{kv_heads}; model.heads {heads} / {kv_heads} = {heads / kv_heads:.4g} query heads a key/value head",
        f"a divisor of model.heads: {divisors(heads)}",
    )


def hidden_fills_heads(config: Config, world_size: int) -> Finding | None:
    hidden, heads = config.model.hidden, config.model.heads
    if config.model.head_dim is not None or config.model.family in LATENT_FAMILIES or hidden % heads == 0:
        return None
    return Finding(
        "model.hidden",
        f"{hidden}; {hidden} / model.heads {heads} = {hidden / heads:.6g} for one head",
        f"a multiple of {heads}: {multiples(hidden, heads)}",
        "or name the width of a head: model.head_dim",
    )


def rotary_head_is_even(config: Config, world_size: int) -> Finding | None:
    hidden, heads, head_dim = config.model.hidden, config.model.heads, config.model.head_dim
    if config.model.family in ("gpt", *LATENT_FAMILIES):
        return None
    if head_dim is not None:
        is_odd = head_dim % 2 == 1
        return (
            Finding("model.head_dim", f"{head_dim}, odd; rotary positions turn pairs", "an even number")
            if is_odd
            else None
        )
    if hidden % heads or hidden // heads % 2 == 0:
        return None
    return Finding(
        "model.hidden",
        f"{hidden}; {hidden} / model.heads {heads} = {hidden // heads}, odd; rotary positions turn pairs",
        f"a multiple of 2 x {heads}: {multiples(hidden, 2 * heads)}",
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


def stage_layers_are_the_layers(config: Config, world_size: int) -> Finding | None:
    listed, layers = config.parallel.stage_layers, config.model.layers
    stages = config.parallel.pipeline * config.parallel.virtual_stages
    if listed is None or stages > layers + 2:
        return None
    has_empty = 0 in listed[1:-1]
    if len(listed) == stages and sum(listed) == layers and not has_empty:
        return None
    few, rest = divmod(layers, stages)
    even = [few + (stages - rest <= stage) for stage in range(stages)]
    return Finding(
        "parallel.stage_layers",
        f"{list(listed)}: {len(listed)} stages, {sum(listed)} layers"
        + (", a stage of none" if has_empty else ""),
        f"{stages} numbers (parallel.pipeline x parallel.virtual_stages) whose sum is model.layers {layers}, such as "
        f"{even}; 0 only first and last, beside the embedding and the head",
        "null deals the layers by cost",
    )


def sequence_fills_tensor(config: Config, world_size: int) -> Finding | None:
    length, tensor = config.data.sequence_length, config.parallel.tensor
    if not config.parallel.sequence or config.parallel.context > 1 or length % tensor == 0:
        return None  # with context parallelism: rules_context
    return Finding(
        "data.sequence_length",
        f"{length}; {length} / parallel.tensor {tensor} = {length / tensor:.6g} positions a rank",
        f"a multiple of {tensor}: {multiples(length, tensor)}",
        "parallel.sequence=false keeps activations whole",
    )


def pieces_need_sequence(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    if parallel.sequence_pieces == 1 or (parallel.sequence and parallel.tensor > 1):
        return None
    return Finding(
        "parallel.sequence_pieces",
        f"{parallel.sequence_pieces} with parallel.sequence {str(parallel.sequence).lower()} and parallel.tensor "
        f"{parallel.tensor}: nothing travels in pieces",
        "1, or parallel.sequence=true with parallel.tensor above 1",
    )


def batch_fills_ranks(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    replicas, rest = divmod(world_size, parallel.tensor * parallel.context * parallel.pipeline)
    total, micro = config.batch.global_size, config.batch.micro
    if rest or total % (micro * replicas) == 0:
        return None
    unit = micro * replicas
    return Finding(
        "batch.global",
        f"{total}; {total} / (batch.micro {micro} x {replicas} data-parallel ranks) = "
        f"{total / unit:.4g} micro-batches",
        f"a multiple of {unit}: {multiples(total, unit)}",
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


def _degrees_near(world_size: int, wanted: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Up to three tuples of degrees that fill `world_size` ranks and differ least from the wanted ones."""
    fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found = [d for d in product(fitting, repeat=len(wanted)) if world_size % prod(d) == 0]
    return sorted(found, key=lambda d: (sum(abs(a - b) for a, b in zip(d, wanted, strict=True)), d))[:3]


RULES: tuple[Rule, ...] = (
    ranks_fill_layout,
    heads_fill_tensor,
    kv_heads_fill_tensor,
    ffn_fills_tensor,
    heads_share_kv_heads,
    hidden_fills_heads,
    rotary_head_is_even,
    stages_have_blocks,
    stage_layers_are_the_layers,
    sequence_fills_tensor,
    pieces_need_sequence,
    batch_fills_ranks,
)
