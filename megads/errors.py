"""The error tree: everything megads says no to, in the user's words.

Each error states what is wrong, what was found, what is allowed and what to do, and carries the exit
code of the process that ends with it (2: a wrong input; 1: anything else). Formatting lives here; the
decision to exit lives in the verbs.
"""

from __future__ import annotations


class MegadsError(Exception):
    """Base of all errors that megads raises on purpose.

    Args:
        what: the key, file or quantity and what is wrong with it, as one sentence.
        found: the value that was met.
        allowed: the values that would have been right.
        do: the next step for the user.
    """

    exit_code = 2

    def __init__(
        self, what: str, *, found: object = None, allowed: object = None, do: str | None = None
    ) -> None:
        lines = [what]
        if found is not None:
            lines.append(f"  found:   {found}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed}")
        if do is not None:
            lines.append(f"  do:      {do}")
        super().__init__("\n".join(lines))


class ConfigError(MegadsError):
    """A key, value or combination of keys that cannot be trained."""


class LayoutError(MegadsError):
    """A parallel layout that does not fit the ranks, or a parameter that the layout cannot cut."""


class ScheduleError(MegadsError):
    """A pipeline schedule that is not well formed or cannot be run."""


class DataError(MegadsError):
    """A corpus, tokenizer or document that cannot be used."""


class CheckpointError(MegadsError):
    """A checkpoint that is absent, damaged, of another model, or that could not be written."""


class NumericsError(MegadsError):
    """A value that stopped being finite while training."""

    exit_code = 1


class SaveError(CheckpointError):
    """A checkpoint that could not be written while training (disk full, I/O error)."""

    exit_code = 1


class RankError(MegadsError):
    """Another rank failed or did not answer; the failing rank's own message says why."""

    exit_code = 1
