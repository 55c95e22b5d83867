"""Part of the config section `optim`: the dynamic loss scale of fp16."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from megads.config.section import section


@section
class LossScaleConfig:
    """How the factor on the loss moves; names and defaults as of `torch.amp.GradScaler`."""

    initial: PositiveFloat = 65536.0
    """Factor of the first step."""
    growth: Annotated[float, Field(gt=1.0)] = 2.0
    """What it is multiplied by after `interval` good steps in a row."""
    backoff: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """What it is multiplied by after a step with a gradient that is not finite, which is skipped."""
    interval: PositiveInt = 2000
    """Good steps in a row after which it grows."""
