"""Config section `checkpoint`: when to save, what to keep, what to load."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

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
    checked_share: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Share of the chunks, drawn at random, whose checksum is compared while a step is loaded; manifest and sizes
    always are. Below 1 a load is faster and damage may pass."""
    start: Text | None = None
    """Weights that a fresh run starts from, with new optimizer state, at step 0: a run, its checkpoints, a step, or an
    imported model. A run that has steps of its own goes on from them."""
    start_missing: tuple[Text, ...] = ()
    """Name patterns (`layers.*.adapter.*`) of weights that `checkpoint.start` may lack: they keep their initial
    values."""
    start_unused: tuple[Text, ...] = ()
    """Name prefixes of weights in `checkpoint.start` that this model has no place for and that are left there."""
    start_other_vocab: bool = False
    """Whether the vocabulary of `checkpoint.start` may have another size: rows that both have are taken, further ones
    keep their initial values."""
    writers_per_node: PositiveInt = 8
    """Most files that the ranks of one host write at once."""
