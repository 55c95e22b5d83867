"""An op and its implementations: which one runs is decided here, told once in the log, and can be forced in tests.

An `Op` is an immutable table. Implementations are tried in order; the first whose predicate accepts the arguments runs.
The last one is the reference, which accepts everything that the op is defined for. Under torch.compile the choice is
made, told and forced while tracing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from megads.errors import ConfigError

_FORCED: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("forced op implementations", default=())


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute an op: `accepts(*args, **kwargs)` says whether `run` may be called with them.

    `backward` is there where the op has its own: an op that ran forward one way must not be differentiated another.
    """

    name: str
    run: Callable[..., Any]
    accepts: Callable[..., bool]
    backward: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """An op: its implementations in order of preference."""

    name: str
    implementations: tuple[Implementation, ...]

    def pick(self, *args: Any, **kwargs: Any) -> Implementation:
        """The implementation that runs for these arguments.

        Raises:
            ConfigError: none accepts them, or the forced one does not.
        """
        forced = _forced(self.name)
        for implementation in self.implementations:
            if (forced is None or implementation.name == forced) and implementation.accepts(*args, **kwargs):
                _tell(self.name, implementation.name)
                return implementation
        raise ConfigError(
            f"no implementation of {self.name} accepts these arguments",
            found=f"forced {forced}" if forced else "none forced",
            allowed=", ".join(i.name for i in self.implementations),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pick(*args, **kwargs).run(*args, **kwargs)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _forced(op: str) -> str | None:
    return dict(_FORCED.get()).get(op)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tell(op: str, implementation: str) -> None:
    _tell_once(op, implementation)


@functools.cache
def _tell_once(op: str, implementation: str) -> None:
    logging.getLogger("megads.ops").info("op %s: %s", op, implementation)


@contextmanager
def force(op: str, implementation: str) -> Iterator[None]:
    """Inside, `op` runs as `implementation` or not at all."""
    token = _FORCED.set((*_FORCED.get(), (op, implementation)))
    try:
        yield
    finally:
        _FORCED.reset(token)
