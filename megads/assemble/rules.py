"""Cross-checks: keys that are right alone and wrong together, as tables of small pure functions.

    check(config, world_size) -> every rule of RULES -> findings -> one ConfigError that lists them all

Runs before any process group exists and needs no torch. Single keys are checked in `config/load.py`; files
that a config names (corpora, tokenizer, checkpoints) are checked where they are opened.

Legal and therefore no rule: ZeRO stage 1 on one data-parallel rank (it shards over 1), a decay that ends
before or after the run, fewer micro-batches than stages, a vocabulary divisible by nothing (ranks pad it).
"""

from __future__ import annotations

from megads.assemble import (
    rules_checkpoint,
    rules_context,
    rules_data,
    rules_engine,
    rules_experts,
    rules_family,
    rules_latent,
    rules_layout,
    rules_memory,
    rules_mtp,
    rules_native,
    rules_optim,
    rules_recipe,
    rules_schedule,
    rules_update,
)
from megads.assemble.finding import Finding, Rule
from megads.config.root import Config
from megads.errors import ConfigError

RULES: tuple[Rule, ...] = (
    *rules_layout.RULES,
    *rules_family.RULES,
    *rules_latent.RULES,
    *rules_context.RULES,
    *rules_schedule.RULES,
    *rules_memory.RULES,
    *rules_experts.RULES,
    *rules_mtp.RULES,
    *rules_data.RULES,
    *rules_optim.RULES,
    *rules_engine.RULES,
    *rules_native.RULES,
    *rules_recipe.RULES,
    *rules_checkpoint.RULES,
    *rules_update.RULES,
)


def check(config: Config, world_size: int, *, host_ranks: range | None = None) -> None:
    """Refuse a config whose keys do not fit each other, `world_size` ranks, or the hosts they run on.

    Args:
        host_ranks: global ranks of one host; None: not known here, and every rank checks its own.

    Raises:
        ConfigError: listing the findings of all rules.
    """
    found = list(findings(config, world_size))
    if host_ranks is not None and len(host_ranks) < world_size:
        found += filter(None, [rules_layout.tensor_stays_on_host(config, host_ranks)])
    if found:
        ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
        raise ConfigError("\n".join([f"the config does not fit {ranks}:", *map(str, found)]))


def findings(config: Config, world_size: int) -> tuple[Finding, ...]:
    """What the rules of the table say no to, in the order of the table."""
    return tuple(finding for rule in RULES if (finding := rule(config, world_size)) is not None)
