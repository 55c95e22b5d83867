"""How a config section is made: a frozen dataclass with strict keys.

One decorator, so that every section is frozen, slotted, keyword-only and refuses unknown keys. The
text under each field is its documentation: `python -m megads explain KEY` prints it. Reading files,
overrides and error messages live in `load.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, StringConstraints

T = TypeVar("T")

Text = Annotated[str, StringConstraints(min_length=1)]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[T]) -> type[T]:
    """Make `cls` a config section: frozen, slotted, keyword-only, unknown keys forbidden."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[attr-defined]
    return dataclass(frozen=True, slots=True, kw_only=True)(cls)
