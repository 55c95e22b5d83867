"""Cross-checks of context parallelism: sequence lengths that can be cut evenly, heads that can be exchanged.

Rank r of P has the chunks r and 2P-1-r of 2P equal ones, and sequence parallelism cuts what a rank has once more.
"""

from __future__ import annotations

from math import lcm

from megads.assemble.finding import Finding, Rule, divisors, multiples
from megads.config.parallel import ParallelConfig
from megads.config.root import Config


def sequence_unit(parallel: ParallelConfig) -> int:
    """Every sequence length must be a multiple of this many tokens, so that ranks can share a row evenly."""
    tensor = parallel.tensor if parallel.sequence else 1
    return parallel.context * lcm(2, tensor) if parallel.context > 1 else tensor


def sequence_fills_context(config: Config, world_size: int) -> Finding | None:
    length, parallel = config.data.sequence_length, config.parallel
    unit = sequence_unit(parallel)
    if parallel.context == 1 or length % unit == 0:
        return None
    chunk = length / (2 * parallel.context)
    found = f"{length}; {length} / (2 x parallel.context {parallel.context}) = {chunk:.6g} positions a chunk"
    if parallel.sequence and parallel.tensor > 1:
        share = length / (parallel.context * parallel.tensor)
        found += (
            f", {share:.6g} positions a rank with parallel.sequence over parallel.tensor {parallel.tensor}"
        )
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
