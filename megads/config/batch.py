"""Config section `batch`: how many samples a step takes, and how many at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from megads.config.section import section


@section
class BatchConfig:
    """How many samples an optimizer step takes, and how many a rank computes at once."""

    global_size: Annotated[PositiveInt, Field(alias="global")]
    """Samples of one optimizer step, over all ranks (written `batch.global`)."""
    micro: PositiveInt = 1
    """Samples of one micro-batch on one data-parallel rank; only speed and memory depend on it."""
