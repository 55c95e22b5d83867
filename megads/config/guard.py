"""Part of the config section `optim`: what becomes of a step whose loss or gradient norm is out of line."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megads.config.section import section


@section
class GuardConfig:
    """Which steps are out of line, and what becomes of the run then. No such step changes a weight."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """stop: the run ends. skip: it goes on with the next batch. rollback: it goes back to its last checkpoint and
    leaves out all batches from there to the step's (PaLM, section 5.1)."""
    sigma: PositiveFloat = 6.0
    """Standard deviations above the mean of the last steps at which a loss or a gradient norm is out of line."""
    window: Annotated[int, Field(ge=4)] = 128
    """Steps, of those that were taken, that mean and deviation are of; until half of them are there, only what is not
    finite is out of line."""
    limit: PositiveInt = 8
    """Steps skipped in a row, or rollbacks of a run, after which the run ends all the same."""
