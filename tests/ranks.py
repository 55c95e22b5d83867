"""Real gloo ranks for tests: the package's own (`megads/verify/ranks.py`), for functions that return anything."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from megads.errors import ConfigError
from megads.parallel.control import Control
from megads.verify.ranks import RanksError, fork_ranks


def run_ranks(function: Callable[[int, int], Any], size: int, *, timeout: float = 60.0) -> list[Any]:
    """Run `function(rank, size)` on `size` connected ranks; returns their values in rank order.

    Raises:
        AssertionError: a rank failed or the time is over; the message has the earliest reason and every rank's stack.
    """

    def work(control: Control) -> bytes:
        return pickle.dumps(function(control.rank, control.size))

    try:
        return [pickle.loads(value) for value in fork_ranks(work, size, stall=timeout, timeout=timeout)]
    except (RanksError, ConfigError) as error:
        raise AssertionError(f"{error}\n{getattr(error, 'log', '')}") from error
