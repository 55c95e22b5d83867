"""Cross-checks of context parallelism: sequence lengths that can be cut evenly, heads that can be exchanged.

Rank r of P has the chunks r and 2P-1-r of 2P equal ones, and sequence parallelism cuts what a rank has once more.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule, divisors, multiples
from megads.config.root import Config
from megads.parallel.layout import sequence_unit


def sequence_fills_context(config: Config, world_size: int) -> Finding | None:
    length, parallel = config.data.sequence_length, config.parallel
    tensor = parallel.tensor if parallel.sequence else 1
    unit = sequence_unit(context=parallel.context, tensor=tensor)
    if parallel.context == 1 or length % unit == 0:
        return None
    chunk = length / (2 * parallel.context)
    found = f"{length}; {length} / (2 x parallel.context {parallel.context}) = {chunk:.6g} positions a chunk"
    if tensor > 1:
        share = length / (parallel.context * tensor)
        found += f", {share:.6g} positions a rank with parallel.sequence over parallel.tensor {tensor}"
    return Finding("data.sequence_length", found, f"a multiple of {unit}: {multiples(length, unit)}")


def heads_fill_context(config: Config, world_size: int) -> Finding | None:
    parallel, heads = config.parallel, config.model.heads
    local, rest = divmod(heads, parallel.tensor)
    if parallel.context_kind != "ulysses" or rest or local % parallel.context == 0:
        return None
    return Finding(
        "parallel.context",
        f"{parallel.context}; model.heads {heads} / parallel.tensor {parallel.tensor} / {parallel.context} = "
        f"{local / parallel.context:.4g} heads a rank",
        f"a divisor of {local}: {divisors(local)}",
        "parallel.context_kind=ring takes any number of heads",
    )


RULES: tuple[Rule, ...] = (sequence_fills_context, heads_fill_context)
