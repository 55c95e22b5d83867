"""Config section `batch`: how many samples a step takes, and how many at once."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MinLen
from pydantic import Field, NonNegativeInt, PositiveInt

from megads.config.section import section


@section
class RampConfig:
    """One point of a batch-size ramp."""

    tokens: NonNegativeInt
    """Tokens that were read before a step, over all ranks."""
    global_size: Annotated[PositiveInt, Field(alias="global")]
    """Samples of a step from there on (written `global`)."""


@section
class BatchConfig:
    """How many samples an optimizer step takes, and how many a rank computes at once."""

    global_size: Annotated[PositiveInt, Field(alias="global")]
    """Samples of one optimizer step, over all ranks (written `batch.global`)."""
    micro: PositiveInt = 1
    """Samples of one micro-batch on one data-parallel rank; only speed and memory depend on it."""
    ramp: Annotated[tuple[RampConfig, ...], MinLen(1)] | None = None
    """Smaller batches at first: points {tokens, global}, the first at 0 tokens, the last with `batch.global`; null:
    none."""
    ramp_unit: PositiveInt | None = None
    """Between two points of the ramp the batch grows on a line, rounded down to a multiple of this (DeepSeek-V3,
    section 4.2: 3072 to 15360 over the first 469 B tokens); null: it keeps the samples of the point before."""
