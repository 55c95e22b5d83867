"""Config section `parallel`: the layout. Its arithmetic lives in `megads/parallel/layout.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megads.config.section import section


@section
class ParallelConfig:
    """How the model and the batch are cut over ranks. What is left of the world is data parallel."""

    tensor: PositiveInt = 1
    """Tensor-parallel degree: ranks that share every layer's heads, ffn and vocabulary."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel degree: stages that the layers are dealt to."""
    schedule: Literal["gpipe", "one_f_one_b"] = "one_f_one_b"
    """Pipeline schedule; `python -m megads schedule NAME` draws it."""
