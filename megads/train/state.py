"""What a checkpoint holds beside tensors, and what must agree between ranks before step 1."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import megads
from megads.config.load import dump, tree
from megads.config.root import Config
from megads.data.segment import Segment
from megads.errors import ConfigError
from megads.optim.engine import Engine
from megads.parallel.control import Control
from megads.train import history as run_history


def objects(config: Config, history: Sequence[Segment], *, engine: Engine, tokenizer: str) -> dict[str, Any]:
    """The small values of a checkpoint: enough to go on, evaluate or export without the run's directory.

    Args:
        config: resolved.
        tokenizer: its fingerprint.
    """
    return {
        "config": dump(config),
        "history": run_history.to_json(history),
        "optim": dict(engine.scalars()),
        "tokenizer": tokenizer,
        "made_by": {"megads": megads.__version__, "torch": str(torch.__version__)},
    }


def check_ranks_agree(config: Config, fingerprints: Mapping[str, str], *, control: Control) -> None:
    """Refuse to start if a rank has another config, other files or other code than rank 0.

    Raises:
        ConfigError: on every rank, with the first thing that differs, both values and the rank.
    """
    mine = {
        **{f"{name}.{key}": value for name, keys in tree(config).items() for key, value in keys.items()},
        **{f"fingerprint of {name}": value for name, value in fingerprints.items()},
        "version of megads": megads.__version__,
        "version of torch": str(torch.__version__),
        "version of Python": platform.python_version(),
    }
    first, *others = control.all_gather(mine)
    for rank, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                raise ConfigError(
                    f"rank {rank} differs from rank 0: {key}",
                    found=f"{other.get(key)} on rank {rank}",
                    allowed=f"{first.get(key)}, as on rank 0",
                    do="give every host the same config, files and environment",
                )
