"""`python -m megads verify CONFIG --layout tensor=2,pipeline=2 [--layout ...] [key=value ...]`.

    config -> trials -> shrink -> cross-checks -> one process in fp64 -> each layout on forked CPU ranks -> compare, say

Proves on this host's CPU, in seconds, that a layout changes nothing: the same initial weights, losses, gradients, norm
and updated weights as one process. Needs no corpus and no tokenizer. Exit code 0: every layout is equal; 1: one is not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megads import log
from megads.assemble import rules
from megads.errors import ConfigError
from megads.verify.compare import BOUNDS, Bounds, bounds_of, compare
from megads.verify.diagnose import diagnose
from megads.verify.measure import Watch, measure
from megads.verify.outcome import Outcome
from megads.verify.ranks import RanksError
from megads.verify.report import Report, show
from megads.verify.round_trip import RoundTrip, round_trips
from megads.verify.shrink import shrink
from megads.verify.trial import Trial, one_process, own_trial, read_trial, with_precision

MAX_RANKS = 64  # processes on one host


@dataclass(frozen=True, slots=True)
class _Options:
    steps: int
    saves: bool


def main(argv: Sequence[str]) -> int:
    """Verify the layouts of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="megads verify",
        description="Prove on the CPU that a layout changes nothing, gradient by gradient.",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "--layout",
        action="append",
        metavar="KEY=VALUE,...",
        help="keys of `parallel`, and data, engine, zero_stage, micro, precision; default: the config's own layout",
    )
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument(
        "--save-steps", action="store_true", help="also save under each layout and load in the others"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(argv)
    if options.steps < 1:
        raise ConfigError("--steps", found=options.steps, allowed=">= 1")
    log.setup(1)  # warnings alone
    trials = _trials(options.config, options.layout or [], options.overrides)
    reference = measure(
        one_process(trials[0], precision="fp64").config, 1, steps=options.steps, watch=Watch()
    )
    is_equal = True
    for trial in trials:
        report = _verify(trial, trials, reference, _Options(options.steps, options.save_steps))
        show(report)
        is_equal &= report.is_equal
    print(_sizes(trials[0]))
    return 0 if is_equal else 1


def _trials(path: str, layouts: Sequence[str], overrides: Sequence[str]) -> tuple[Trial, ...]:
    """What the command line asks for, small, and checked as a training run would be.

    Raises:
        ConfigError: wrong keys, or keys that do not fit each other.
    """
    if layouts:
        trials = shrink([read_trial(path, layout, overrides=overrides) for layout in layouts])
    else:
        trials = shrink([own_trial(path, overrides)])
    for trial in trials:
        if trial.world_size > MAX_RANKS:
            raise ConfigError(
                f"layout {trial.name}",
                found=f"{trial.world_size} ranks",
                allowed=f"at most {MAX_RANKS} on one host",
            )
        rules.check(trial.config, trial.world_size)
    return trials


def _sizes(trial: Trial) -> str:
    model, config = trial.config.model, trial.config
    experts = "" if model.experts is None else f", {model.experts} experts"
    return (
        f"{model.family} shrunk to {model.layers} layers, hidden {model.hidden}, {model.heads} heads "
        f"({model.kv_heads or model.heads} key/value){experts}, vocabulary {model.vocab}; "
        f"{config.batch.global_size} rows of {config.data.sequence_length} tokens"
    )


def _verify(trial: Trial, trials: Sequence[Trial], reference: Outcome, options: _Options) -> Report:
    """Try one layout."""
    start = time.monotonic()
    precision = trial.config.optim.precision
    report = Report(trial.name, precision, trial.world_size, 0.0)
    try:
        bounds = _bounds(trial, reference, steps=options.steps)
        watch = Watch(reference, modules=precision in BOUNDS)
        outcome = measure(trial.config, trial.world_size, steps=options.steps, watch=watch)
        comparison = compare(outcome, reference, bounds=bounds)
        report = replace(report, comparison=comparison)
        if not comparison.is_equal:
            finding = diagnose(comparison, trial.config, world_size=trial.world_size)
            report = replace(report, finding=finding)
        elif options.saves:
            report = replace(report, round_trips=_round_trips(trial, trials, steps=options.steps))
    except RanksError as error:
        report = replace(report, failure=str(error))
    return replace(report, seconds=time.monotonic() - start)


def _bounds(trial: Trial, reference: Outcome, *, steps: int) -> Bounds:
    """What may differ in the precision of the trial."""
    precision = trial.config.optim.precision
    if precision in BOUNDS:
        return BOUNDS[precision]
    alone = one_process(trial, precision=precision)
    config = replace(alone.config, batch=trial.config.batch)
    outcome = measure(config, 1, steps=steps)
    return bounds_of(compare(outcome, reference, bounds=BOUNDS["fp64"]))


def _round_trips(trial: Trial, trials: Sequence[Trial], *, steps: int) -> tuple[RoundTrip, ...]:
    """Save under the layout, load in one process and in every other layout."""
    precision = trial.config.optim.precision
    others = [other for other in trials if other is not trial] or [trial]
    targets = [replace(other, config=with_precision(other.config, precision)) for other in others]
    return round_trips(trial, [one_process(trial, precision=precision), *targets], steps=steps)
