"""TensorBoard: the metrics of metrics.jsonl as curves over steps, and sample text. Written by one rank.

The tags are those of `TAGS`; what has none keeps its own name (`valid/NAME/loss`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megads.errors import ConfigError

TAGS: Mapping[str, str] = MappingProxyType(
    {
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "loss_scale": "train/loss_scale",
        "tokens": "train/tokens",
        "seconds": "perf/seconds_per_step",
        "tokens_per_second": "perf/tokens_per_second",
        "model_tflops": "perf/model_tflops_per_rank",
        "mfu": "perf/mfu",
        "memory_bytes": "memory/peak_bytes",
    }
)


class Board:
    """An event file in `directory`.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard needs the package tensorboard",
                found=str(error),
                do="pip install tensorboard, or log.tensorboard=false (metrics.jsonl has the same numbers)",
            ) from error
        self._writer = SummaryWriter(str(directory))

    def scalars(self, record: Mapping[str, float]) -> None:
        """One step's record, with its key `step`."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(TAGS.get(name, name), value, int(record["step"]))

    def text(self, name: str, text: str, *, step: int) -> None:
        """A sample."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
