"""The history of a run: which data every step reads, as rows that only ever grow.

`run.dir/history.json` is for people and tools; the copy in each checkpoint is what a resumed run goes on from.
What a row means is defined in `data/blend.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megads.data.segment import Segment, segment_at
from megads.data.segment import tokens_by as tokens_by  # of the same family as tokens_of
from megads.errors import CheckpointError, DataError


def to_json(history: Sequence[Segment]) -> list[dict[str, Any]]:
    """The history as JSON values."""
    return [segment.to_dict() for segment in history]


def from_objects(objects: Mapping[str, Any]) -> tuple[Segment, ...]:
    """The history that a checkpoint holds.

    Raises:
        CheckpointError: it holds none.
    """
    rows = objects.get("history")
    if not isinstance(rows, list) or not rows:
        raise CheckpointError(
            "the checkpoint has no data history", found=rows, allowed="a list with a row for each change"
        )
    return tuple(Segment.from_dict(row) for row in rows)


def read(path: Path) -> tuple[Segment, ...] | None:
    """What `write` wrote; None: there is no such file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not readable",
            found=error,
            allowed="the list that training writes",
            do="remove it: checkpoints hold the history, except for a rollback since the last of them",
        ) from error
    return from_objects({"history": rows})


def write(path: Path, history: Sequence[Segment]) -> None:
    """Replace the file by the history; a reader sees the old or the new one."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(to_json(history), indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def tokens_of(history: Sequence[Segment], step: int) -> int:
    """Tokens that `step` reads, over all ranks."""
    segment = segment_at(history, step)
    return segment.batch_size * segment.sequence_length
