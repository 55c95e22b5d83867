"""Config section `checkpoint`: when to save, what to keep, what to load."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megads.config.section import Text, section


@section
class CheckpointConfig:
    """When to save, how many steps to keep, and what to load."""

    every: PositiveInt | None = None
    """Save each time this many steps are done, and at the end; null: only at the end."""
    keep: PositiveInt | None = None
    """Newest committed steps that are kept; older ones are deleted after a commit; null: all."""
    keep_every: PositiveInt | None = None
    """Steps that are multiples of this are never deleted; null: only `keep` decides."""
    background: bool = False
    """Save behind training: it waits for a copy to host memory, not for the disk. Costs host memory for one copy."""
    on_save_failure: Literal["stop", "go_on"] = "stop"
    """What to do if storage fails in a save: end the run, or warn and try again at the next save."""
    load: Text = "auto"
    """auto: the newest committed step of `run.dir`, else a fresh start. never: a fresh start, refused if steps are
    there. must: as auto, but refused if nothing is there. Any other text is the path of a run or step directory."""
    on_damage: Literal["error", "previous"] = "error"
    """What to do if the newest committed step is damaged: end with its name, or load the newest intact one, aloud."""
    writers_per_node: PositiveInt = 8
    """Most files that the ranks of one host write at once."""
