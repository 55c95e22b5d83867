"""Cross-checks of the data: pages, positions, corpora, rows, and what changes during a run.

One small pure function a rule; `rules.py` joins the tables.
"""

from __future__ import annotations

from dataclasses import asdict

from megads.assemble.changes import curriculum_of
from megads.assemble.finding import Finding, Rule, divisors, multiples
from megads.config.data import CorpusConfig
from megads.config.root import Config
from megads.data.curriculum import all_lengths
from megads.parallel.layout import sequence_unit
from megads.pipeline.schedules import SCHEDULES


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


def ramp_climbs(config: Config, world_size: int) -> Finding | None:
    ramp, total = config.batch.ramp, config.batch.global_size
    if ramp is None:
        return None
    tokens, sizes = [point.tokens for point in ramp], [point.global_size for point in ramp]
    if tokens[0] == 0 and tokens == sorted(set(tokens)) and sizes == sorted(sizes) and sizes[-1] == total:
        return None
    points = ", ".join(f"{size} from {at} tokens" for at, size in zip(tokens, sizes, strict=True))
    return Finding(
        "batch.ramp",
        f"{points}; batch.global {total}",
        f"points ascending in tokens and samples, the first at 0 tokens, the last of {total} samples",
    )


def ramp_fills_ranks(config: Config, world_size: int) -> Finding | None:
    batch, parallel = config.batch, config.parallel
    replicas, rest = divmod(world_size, parallel.tensor * parallel.context * parallel.pipeline)
    if batch.ramp is None or rest:
        return None
    unit = batch.micro * replicas
    sizes = [point.global_size for point in batch.ramp]
    sizes += [] if batch.ramp_unit is None else [batch.ramp_unit]
    wrong = next((size for size in sizes if size % unit and size != batch.global_size), None)
    if wrong is None:
        return None
    return Finding(
        "batch.ramp",
        f"{wrong}; {wrong} / (batch.micro {batch.micro} x {replicas} data-parallel ranks) = "
        f"{wrong / unit:.4g} micro-batches",
        f"multiples of {unit}: {multiples(wrong, unit)}",
    )


def ramp_unit_has_ramp(config: Config, world_size: int) -> Finding | None:
    if config.batch.ramp_unit is None or config.batch.ramp is not None:
        return None
    return Finding("batch.ramp_unit", f"{config.batch.ramp_unit} with batch.ramp null", "null, or a ramp")


def ramp_has_schedule(config: Config, world_size: int) -> Finding | None:
    schedule = config.parallel.schedule
    if config.batch.ramp is None or schedule in SCHEDULES:
        return None
    return Finding(
        "batch.ramp",
        f"a ramp with parallel.schedule {schedule}, a file for one number of micro-batches",
        "null, or a schedule by name",
    )


def curriculum_is_whole(config: Config, world_size: int) -> Finding | None:
    given = config.data.curriculum
    if given is None:
        return None
    is_list = given.kind == "fixed_discrete"
    of_list, of_line = bool(given.lengths and given.until), bool(given.start and given.steps)
    is_right = of_list if is_list else of_line and not (given.lengths or given.until)
    if is_right and (not is_list or (given.start is None and given.steps is None)):
        return None
    keys = {key: value for key, value in asdict(given).items() if value not in (None, ()) and key != "kind"}
    return Finding(
        "data.curriculum",
        f"{given.kind} with {', '.join(keys)}",
        "lengths and until" if is_list else "start and steps, neither lengths nor until",
    )


def curriculum_grows(config: Config, world_size: int) -> Finding | None:
    given, end = config.data.curriculum, config.data.sequence_length
    if given is None or curriculum_is_whole(config, world_size):
        return None
    if given.kind != "fixed_discrete":
        first = -(-(given.start or end) // given.unit) * given.unit
        if first <= end:
            return None
        return Finding(
            "data.curriculum", f"start {given.start}, data.sequence_length {end}", f"a start of at most {end}"
        )
    lengths, until = given.lengths, given.until
    in_order = list(until) == sorted(set(until)) and [*lengths, end] == sorted([*lengths, end])
    if len(lengths) == len(until) and in_order:
        return None
    return Finding(
        "data.curriculum",
        f"lengths {list(lengths)}, until {list(until)}, data.sequence_length {end}",
        f"as many steps as lengths, steps ascending, lengths ascending to at most {end}",
    )


def curriculum_fills_ranks(config: Config, world_size: int) -> Finding | None:
    parallel = config.parallel
    unit = sequence_unit(context=parallel.context, tensor=parallel.tensor if parallel.sequence else 1)
    if config.data.curriculum is None or unit == 1:
        return None
    if curriculum_is_whole(config, world_size) or curriculum_grows(config, world_size):
        return None
    # the last is data.sequence_length, which has rules of its own
    lengths = all_lengths(curriculum_of(config.data))[:-1]
    wrong = next((length for length in lengths if length % unit), None)
    if wrong is None:
        return None
    return Finding(
        "data.curriculum",
        f"a length of {wrong} tokens for parallel.context {parallel.context}, parallel.tensor {parallel.tensor}"
        f" with parallel.sequence {str(parallel.sequence).lower()}",
        f"lengths that are multiples of {unit}",
        f"data.curriculum.unit={unit}",
    )


def rows_hold_documents(config: Config, world_size: int) -> Finding | None:
    data = config.data
    if data.packing != "best_fit" or (data.document_mask and data.curriculum is None):
        return None
    given = "a curriculum" if data.curriculum is not None else "document_mask false"
    return Finding(
        "data.packing",
        f"best_fit with {given}",
        "cut, or document_mask true and no curriculum: rows hold whole documents beside one another",
    )


def rows_are_pages(config: Config, world_size: int) -> Finding | None:
    data = config.data
    if data.packing != "best_fit" or data.page in (None, data.sequence_length):
        return None
    return Finding(
        "data.page",
        f"{data.page} with data.packing best_fit, whose rows have data.sequence_length {data.sequence_length}",
        f"{data.sequence_length}, or null",
    )


RULES: tuple[Rule, ...] = (
    page_fits_sequence,
    positions_hold_sequence,
    validation_has_data,
    corpora_differ,
    ramp_climbs,
    ramp_fills_ranks,
    ramp_unit_has_ramp,
    ramp_has_schedule,
    curriculum_is_whole,
    curriculum_grows,
    curriculum_fills_ranks,
    rows_hold_documents,
    rows_are_pages,
)
