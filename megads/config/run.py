"""Config section `run`: where a run lives and how long it goes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from megads.config.section import Text, section


@section
class RunConfig:
    """Where a run lives, how long it goes, and the seed of everything random in it."""

    dir: Text = "runs/default"
    """Directory of the run: resolved config, metrics, history and checkpoints. Every host must see the same one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of initial weights, dropout and data order. The same seed gives the same run under every layout."""
    steps: PositiveInt
    """Number of optimizer steps of the whole run, counted from its first start."""
    stop_after: PositiveInt | None = None
    """Save and end after this step although the run has more (for schedulers and tests); null: go on to `run.steps`."""
    deterministic: bool = False
    """Refuse nondeterministic GPU algorithms, for bit-for-bit resume; slower on GPUs, no effect on the CPU."""
    timeout: PositiveInt = 300
    """Seconds after which a collective that another rank did not join ends the job."""
