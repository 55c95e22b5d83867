"""`--layout tensor=2,pipeline=2`: a layout to try, as a config of its own.

    config file + the user's overrides + degrees back to 1 + the words of the layout -> Config, data-parallel degree

Features that are no degree stay as the config has them (sequence parallelism, recompute, context kind, engine, ZeRO
stage) unless the layout says otherwise; schedule, stages and pieces only where there is a pipeline or tensor-parallel
ranks. fp64 is tried unless the layout names a precision: it is the sharp test. How the config is made small is in
`shrink.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from megads.config.load import load
from megads.config.parallel import ParallelConfig
from megads.config.root import Config
from megads.errors import ConfigError

Precision = Literal["fp64", "fp32", "bf16", "fp16"]

DEGREES = ("tensor", "context", "pipeline", "expert")
OTHER_KEYS = (
    ("engine", "optim.engine"),
    ("zero_stage", "optim.zero_stage"),
    ("precision", "optim.precision"),
    ("micro", "batch.micro"),
)
SPLIT = re.compile(r",(?![^\[]*\])")  # commas outside of brackets


@dataclass(frozen=True, slots=True)
class Trial:
    """One layout to try.

    Attributes:
        name: as the user wrote it.
        config: all of it.
        data: data-parallel degree.
        has_micro: whether the layout itself says `micro`.
    """

    name: str
    config: Config
    data: int = 1
    has_micro: bool = False

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        parallel = self.config.parallel
        return parallel.tensor * parallel.context * parallel.pipeline * self.data


def read_trial(path: str, layout: str, *, overrides: Sequence[str] = ()) -> Trial:
    """The trial that a layout's text means.

    Args:
        path: config file.
        layout: `key=value,...`: keys of section `parallel` without their section, `data` (degree), `engine`,
            `zero_stage`, `micro`, `precision`.
        overrides: `key=value` for the config, before the layout's.

    Raises:
        ConfigError: an unknown key or a wrong value, as in `config/load.py`.
    """
    short = {field.name: f"parallel.{field.name}" for field in fields(ParallelConfig)} | dict(OTHER_KEYS)
    given: dict[str, str] = {}
    for word in filter(None, SPLIT.split(layout)):
        key, equals, value = word.strip().partition("=")
        if not equals or key not in (*short, "data"):
            near = difflib.get_close_matches(key, (*short, "data"), n=1)
            raise ConfigError(
                f"--layout {layout}: {word}",
                found=f"no key {key}" if equals else "no value",
                allowed=f"KEY=VALUE with KEY of {', '.join((*short, 'data'))}",
                do=f"did you mean {near[0]}?" if near and equals else None,
            )
        given[key] = value
    data = given.pop("data", "1")
    if not data.isdecimal() or int(data) < 1:
        raise ConfigError(
            f"--layout {layout}: data", found=data, allowed="a number of data-parallel replicas, >= 1"
        )
    resets = [f"parallel.{degree}=1" for degree in DEGREES] + ["parallel.expert_tensor=null"]
    if given.get("pipeline", "1") == "1":
        resets += ["parallel.virtual_stages=1", "parallel.schedule=one_f_one_b"]
    if "stage_layers" not in given:
        resets += ["parallel.stage_layers=null"]  # those of the config are for its own stages
    if given.get("tensor", "1") == "1":
        resets += ["parallel.sequence_pieces=1"]
    words = [f"{short[key]}={value}" for key, value in given.items()]
    config = load(path, [*overrides, *resets, *words])
    if "precision" not in given:
        config = with_precision(config, "fp32" if config.optim.engine == "deepspeed" else "fp64")
    return Trial(layout or "one process", config, int(data), "micro" in given)


def own_trial(path: str, overrides: Sequence[str] = ()) -> Trial:
    """The layout that the config itself has, with as few data-parallel ranks as its ZeRO stage and experts need."""
    config = load(path, overrides)
    parallel, optim = config.parallel, config.optim
    experts = parallel.expert * (parallel.expert_tensor or parallel.tensor)
    data = max(2 if optim.zero_stage else 1, -(-experts // (parallel.tensor * parallel.context)))
    config = with_precision(config, "fp32" if optim.engine == "deepspeed" else "fp64")
    return Trial("the config's own layout", config, data)


def with_precision(config: Config, precision: Precision) -> Config:
    """The same config in another arithmetic."""
    return replace(config, optim=replace(config.optim, precision=precision))


def one_process(trial: Trial, *, precision: Precision) -> Trial:
    """The trial without any layout: what it is compared with."""
    config = with_precision(trial.config, precision)
    optim = replace(config.optim, engine="native", zero_stage=0, deepspeed={})
    batch = replace(config.batch, micro=config.batch.global_size)
    return Trial("one process", replace(config, optim=optim, batch=batch, parallel=ParallelConfig()))
