"""Config section `log`: what is printed and measured while training."""

from __future__ import annotations

from pydantic import PositiveInt

from megads.config.section import section


@section
class LogConfig:
    """What is printed and measured while training. `metrics.jsonl` always has every step."""

    every: PositiveInt = 1
    """Print one line each time this many steps are done."""
    validate_every: PositiveInt | None = None
    """Measure the loss on `data.valid` each time this many steps are done, and at the end; null: only at the end."""
    validate_samples: PositiveInt = 64
    """Samples of each held-out corpus that a validation reads."""
    tensorboard: bool = False
    """Write loss, learning rate, gradient norm, throughput, MFU, memory and sample text to `run.dir`/tensorboard."""
    sample_every: PositiveInt | None = None
    """Continue `log.sample_prompts` each time this many steps are done, and at the end; null: never."""
    sample_prompts: tuple[str, ...] = ("The",)
    """Texts that are continued, to log and TensorBoard."""
    sample_tokens: PositiveInt = 40
    """Tokens that are added to each prompt."""
