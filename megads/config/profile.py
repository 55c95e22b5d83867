"""Config section `profile`: what speed is compared with."""

from __future__ import annotations

from pydantic import PositiveFloat

from megads.config.section import section


@section
class ProfileConfig:
    """What the measured speed is compared with."""

    peak_tflops: PositiveFloat | None = None
    """Peak TFLOP/s of one rank, the denominator of MFU; null: the data sheet of a known GPU, or a matrix product
    timed at the start on a CPU."""
