"""Cross-checks of the data: pages, positions and corpora.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from megads.assemble.finding import Finding, Rule, divisors, multiples
from megads.config.data import CorpusConfig
from megads.config.root import Config


def page_fits_sequence(config: Config, world_size: int) -> Finding | None:
    page, length = config.data.page, config.data.sequence_length
    if page is None or length % page == 0 or page % length == 0:
        return None
    return Finding(
        "data.page",
        f"{page} tokens; data.sequence_length {length} is neither whole pages nor an equal cut of one",
        f"a multiple of {length} ({multiples(page, length)}), or a divisor: {divisors(length)}",
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


RULES: tuple[Rule, ...] = (
    page_fits_sequence,
    positions_hold_sequence,
    validation_has_data,
    corpora_differ,
)
