"""Text to corpus: the work of tools/preprocess_data.py.

Lives here: the order of the work, for one process, a task of many and the ranks of MPI. Does not live here: the command
line (preprocess_options), finished parts (job, part), the corpus (merge), what is printed (summary). Imports neither
torch nor deepspeed.

    inputs --units--> parts --merge--> corpus

    readers (threads) --batches--> `workers` threads: encode --in input order--> reader writes the part of its unit

The engines release the interpreter while they work, so threads suffice. Units are cut by bytes alone and a part is a
function of its unit: the corpus does not depend on `workers`, on who made which part, or on stops in between.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import megads
from megads.data.corpus import Corpus, Manifest
from megads.data.encode import Encoder
from megads.data.engine_choice import choose_engine
from megads.data.indexed import token_dtype
from megads.data.job import (
    Job,
    check_output,
    deal_units,
    make_parts,
    merge_lock,
    open_folder,
    options_of,
    plan_job,
    remove_folder,
)
from megads.data.merge import Merge, merge_parts, side_prefix
from megads.data.pack import write_pack
from megads.data.part import UnitReader
from megads.data.preprocess_options import Options, parse_arguments
from megads.data.progress import open_progress
from megads.data.record import STDIN, Inputs, Unit
from megads.data.source import find_inputs
from megads.data.summary import Report, print_summary
from megads.data.tokenizer import Tokenizer, open_tokenizer
from megads.data.unit import check_inputs, plan_units, read_unit
from megads.errors import DataError, MegadsError

NUM_SAMPLES = 100
SAMPLE_CHARACTERS = 1000
"""Of the first documents, as many are tried on a fast engine before it is used, each up to this length."""


class Team(Protocol):
    """Processes that make a corpus together and can speak with each other."""

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gather(self, code: int) -> list[int]:
        """The exit codes of all of them so far, once all have come here."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """Everything that is needed to make parts and merge them."""

    options: Options
    job: Job
    tokenizer: Tokenizer
    encoder: Encoder
    reader: UnitReader
    merge: Merge
    start: float
    """When the tool began, s."""
    speaks: bool
    """Whether this process says what it does; of a team, rank 0 alone."""

    @property
    def prefixes(self) -> tuple[str, ...]:
        """PREFIX of the corpus, or of both of a split."""
        return tuple(side_prefix(self.job.prefix, side) for side in self.merge.sides)


def preprocess(options: Options) -> Report:
    """Make the corpus, or with a valid fraction both, in this process.

    Raises:
        DataError: an input, the tokenizer or the text is not usable, or another process is at the same work; nothing
            is left behind under the final names, and finished parts are kept.
    """
    shop = open_workshop(options)
    if report := finished(shop):
        return report
    open_folder(shop.job)
    with merge_lock(shop.job) as is_mine:
        if not is_mine:
            raise DataError(
                f"{shop.job.folder}: another process is making this corpus", do="wait for it, or stop it"
            )
        try:
            make(shop, shop.job.units)
            return merge_all(shop)
        finally:
            _tidy(shop.job)


def preprocess_shard(options: Options, *, number: int, count: int) -> Report | None:
    """Make the parts of one task; the task after which none is missing merges. Returns None for the others."""
    shop = open_workshop(options)
    _refuse_stdin(shop)
    if report := finished(shop):
        return report
    open_folder(shop.job, is_shared=True)
    make(shop, deal_units(shop.job.units, shard=number, num_shards=count))
    if missing := shop.job.missing():
        report = finished(shop)  # another task may have merged and removed the parts
        if report is None:
            print(f"shard {number} is done; {len(missing)} of {len(shop.job.units)} parts are not there yet")
        return report
    with merge_lock(shop.job) as is_mine:
        if is_mine:
            return finished(shop) or merge_all(shop)
    print(f"shard {number} is done; another task merges")
    return None


def preprocess_team(options: Options, team: Team) -> int:
    """Make the corpus with all ranks of a team; rank 0 merges. Returns the exit code of this rank."""
    shops: list[Workshop] = []
    reports: list[Report] = []

    def make_mine() -> None:
        shop = open_workshop(options, speaks=team.rank == 0)
        shops.append(shop)
        _refuse_stdin(shop)
        reports.extend(filter(None, (finished(shop),)))
        if not reports:
            open_folder(shop.job)
            make(shop, deal_units(shop.job.units, shard=team.rank, num_shards=team.size))

    def merge() -> None:
        reports.append(merge_all(shops[0]))

    code = max(team.gather(told(make_mine)))
    if not code and not reports:
        code = max(team.gather(told(merge) if team.rank == 0 else 0))
    if team.rank == 0:
        if shops:
            _tidy(shops[0].job)
        if not code and reports:
            print_summary(options, reports[0])
    return code


def open_workshop(options: Options, *, speaks: bool = True) -> Workshop:
    """Open tokenizer and inputs, cut the units and choose the engine."""
    start = time.monotonic()
    tokenizer = open_tokenizer(options.tokenizer, special_tokens=options.special_tokens)
    eod = tokenizer.eod if options.append_eod else None
    inputs = find_inputs(options.inputs, input_format=options.input_format)
    check_inputs(inputs, options.records)
    units = plan_units(inputs, unit_bytes=options.unit_bytes)
    merge = Merge(
        dtype=token_dtype(tokenizer.vocab_size),
        has_mask=options.records.template is not None,
        dedup=options.dedup,
        shuffle_seed=options.shuffle_seed,
        valid_fraction=options.valid_fraction,
    )
    prefixes = [side_prefix(options.output_prefix, side) for side in merge.sides]
    check_output(prefixes, (options.tokenizer, *inputs.files))
    has_keys = options.dedup or options.valid_fraction is not None
    job = plan_job(
        options.output_prefix,
        inputs,
        units=units,
        options=options_of(
            options.records,
            tokenizer=tokenizer.fingerprint,
            append_eod=eod,
            special_tokens=options.special_tokens,
            on_error="skip" if options.skip_bad else "error",
            **{"dedup or valid_fraction": has_keys},
        ),
        merge_options={
            "dedup": options.dedup,
            "shuffle_seed": options.shuffle_seed,
            "valid_fraction": options.valid_fraction,
        },
    )
    choice = choose_engine(
        tokenizer,
        options.engine,
        special_tokens=options.special_tokens,
        samples=_samples(options, inputs, units=units),
    )
    if speaks:
        print(f"engine: {choice.engine.name} ({choice.why})", file=sys.stderr)
    forbidden = tuple(tokenizer.control_tokens) if options.special_tokens == "error" else ()
    return Workshop(
        options=options,
        job=job,
        tokenizer=tokenizer,
        encoder=Encoder(tokenizer, choice, eod, merge.dtype, has_keys, forbidden),
        reader=UnitReader(inputs, options.records, job.modified, options.skip_bad),
        merge=merge,
        start=start,
        speaks=speaks,
    )


def finished(shop: Workshop) -> Report | None:
    """What an earlier run of the same command made, if it is there whole."""
    try:
        manifests = tuple(Corpus(prefix).manifest for prefix in shop.prefixes)
        made = min(os.stat(f"{prefix}.json").st_mtime_ns for prefix in shop.prefixes)
    except (DataError, OSError):
        return None
    of_this_job = tuple(m for m in manifests if m is not None and m.job == shop.job.identity)
    if len(of_this_job) < len(manifests) or shop.job.is_changed_since(made):
        return None
    if shop.speaks:
        print("the corpus is there already, made by the same command from the same inputs", file=sys.stderr)
    return _report(shop, of_this_job)


def make(shop: Workshop, units: Sequence[Unit]) -> None:
    """Make those parts of `units` that are not there."""
    missing = tuple(unit for unit in units if not shop.job.is_done(unit))
    if len(missing) < len(units) and shop.speaks:
        print(f"going on: {len(units) - len(missing)} of {len(units)} parts are there", file=sys.stderr)
    total, left = sum(unit.size for unit in units), sum(unit.size for unit in missing)
    progress = open_progress("tokenize", total, done=total - left, is_shown=shop.speaks)
    start = time.monotonic()
    done, num_tokens = total - left, 0

    def show(read_bytes: int, tokens: int) -> None:
        nonlocal done, num_tokens
        done, num_tokens = done + read_bytes, num_tokens + tokens
        rate = num_tokens / max(time.monotonic() - start, 1e-9)
        progress.update(done, f"{rate / 1e6:.2f} M tokens/s")

    try:
        make_parts(
            shop.job,
            missing,
            reader=shop.reader,
            encoder=shop.encoder,
            workers=shop.options.workers,
            on_progress=show,
        )
    finally:
        progress.close()


def merge_all(shop: Workshop) -> Report:
    """Make the corpus of all parts, then what stands beside it, and remove the parts."""
    options, tokenizer = shop.options, shop.tokenizer
    progress = open_progress("merge", sum(unit.size for unit in shop.job.units))
    sizes = list(itertools.accumulate(unit.size for unit in shop.job.units))
    facts: dict[str, Any] = {
        "append_eod": options.append_eod,
        "special_tokens": options.special_tokens,
        "tokenizer_kind": tokenizer.kind,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "options": {**shop.job.options, **shop.job.merge_options},
        "version": megads.__version__,
    }
    try:
        manifests = merge_parts(
            shop.job,
            shop.merge,
            facts=facts,
            on_progress=lambda done: progress.update(sizes[done - 1], f"{done} of {len(sizes)} parts"),
        )
    finally:
        progress.close()
    remove_folder(shop.job)
    return _report(shop, manifests)


def told(work: Callable[[], None]) -> int:
    """Do `work`; say what stopped it, and return the exit code."""
    try:
        work()
    except MegadsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        what = f"{error.filename or 'output'}: {error.strerror or error}"
        print(f"{what}\n  do:      repair that; the same command goes on where it was", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the parts that are finished", file=sys.stderr)
        return 130
    return 0


def main(argv: Sequence[str], *, team: Team | None = None) -> int:
    """Run the tool; returns its exit code."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # our threads are the workers
    parsed: list[Options] = []
    if code := told(lambda: parsed.append(parse_arguments(argv))):
        return code
    options = parsed[0]
    if team is not None:
        return preprocess_team(options, team)
    return told(lambda: _run(options))


def _run(options: Options) -> None:
    if options.mpi:
        raise DataError("--mpi: MPI was not started", do="start tools/preprocess_data.py, as its --help says")
    shard = options.shard
    if shard is None:
        report: Report | None = preprocess(options)
    else:
        report = preprocess_shard(options, number=shard.number, count=shard.count)
    if report is not None:
        print_summary(options, report)


def _samples(options: Options, inputs: Inputs, *, units: Sequence[Unit]) -> Iterator[str]:
    """The beginnings of the first documents; none from standard input, which cannot be read twice."""
    if not units or inputs.files[units[0].file] == STDIN or options.engine in ("tokenizers", "sentencepiece"):
        return
    records = replace(options.records, block_bytes=1 << 18)
    for documents in read_unit(inputs, units[0], options=records):
        for text in documents.texts.slice(0, NUM_SAMPLES).to_pylist():
            yield text[:SAMPLE_CHARACTERS]
        return


def _report(shop: Workshop, manifests: tuple[Manifest, ...]) -> Report:
    packs = tuple(write_pack(prefix, length) for prefix in shop.prefixes for length in shop.options.pack)
    return Report(
        prefixes=shop.prefixes,
        manifests=manifests,
        left_out=shop.job.inputs.left_out,
        packs=packs,
        input_bytes=sum(shop.job.inputs.sizes),
        seconds=time.monotonic() - shop.start,
    )


def _refuse_stdin(shop: Workshop) -> None:
    if STDIN in shop.job.inputs.files:
        raise DataError(
            "--input -: standard input cannot be shared among tasks",
            do="leave --shard and --mpi out, or name files",
        )


def _tidy(job: Job) -> None:
    """Leave no folder behind without a finished part that another run can use: none can use standard input's."""
    if job.folder.is_dir() and (STDIN in job.inputs.files or not any(job.folder.glob("*.part"))):
        remove_folder(job)
