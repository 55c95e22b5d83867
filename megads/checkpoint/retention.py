"""Which steps a directory holds, and the removal of old ones. Which one to load: `choice.py`. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megads.checkpoint.commit import is_uncommitted, remove_step
from megads.checkpoint.manifest import MANIFEST_NAME, DamageError
from megads.checkpoint.reader import STEP_NAME, StepReader, open_step
from megads.checkpoint.store import Store, describe_failure
from megads.errors import CheckpointError

_log = logging.getLogger(__name__)


def step_paths(directory: Path, *, store: Store) -> list[Path]:
    """Everything that has a step's name, damaged or not, newest first; none if the directory is missing. What an
    unfinished save left is none.

    Raises:
        CheckpointError: it is no directory.
        OSError: it cannot be listed.
    """
    kind = store.kind(directory)
    if kind == "missing":
        return []
    if kind != "directory":
        raise CheckpointError(f"{directory}: not a directory", found=kind, allowed="a directory of steps")
    names = [name for name in store.entries(directory) if STEP_NAME.fullmatch(name)]
    paths = [directory / name for name in sorted(names, key=lambda name: (len(name), name), reverse=True)]
    return [path for path in paths if not is_uncommitted(path, store)]


def committed_steps(directory: str | Path, *, store: Store | None = None) -> list[Path]:
    """The steps whose manifest is right, newest first."""
    store = store or Store()
    return [path for path in step_paths(Path(directory), store=store) if _is_committed(path, store)]


def _is_committed(path: Path, store: Store) -> bool:
    try:
        return damage(path, store=store) is None
    except CheckpointError:
        return False


def damage(path: Path, *, store: Store) -> str | None:
    """What is visibly wrong with a step: its manifest, or a file's kind or size. Reads no tensor."""
    try:
        reader = open_step(path, store=store)
    except DamageError as error:
        return str(error)
    return next(iter(file_problems(reader)), None)


def file_problems(reader: StepReader) -> Sequence[str]:
    """Files of the wrong kind or size."""
    return [problem for name in reader.manifest.files if (problem := reader.file_problem(name)) is not None]


def prune(
    directory: str | Path, keep: int | None, *, keep_every: int | None = None, store: Store | None = None
) -> list[Path]:
    """Remove all but the `keep` newest committed steps; returns those removed. For one rank, after a commit.

    Steps that are multiples of `keep_every` stay for ever. Damaged steps neither count nor are removed. A step
    first loses its name, so that a half-removed one is never loaded. A failure is a warning. None: all are kept.
    """
    if keep is None:
        return []
    store = store or Store()
    removed: list[Path] = []
    try:
        old = committed_steps(directory, store=store)[max(keep, 1) :]
        doomed = [path for path in reversed(old) if not _stays(path, keep_every)]
    except OSError as error:
        _log.warning("old steps are not removed: %s", describe_failure(error))
        return removed
    for path in doomed:
        try:
            remove_step(path, store)
            removed.append(path)
        except OSError as error:
            _log.warning("old step %s is not removed: %s", path, describe_failure(error))
    return removed


def _stays(path: Path, keep_every: int | None) -> bool:
    return keep_every is not None and int(path.name.removeprefix("step-")) % keep_every == 0


def set_aside_newer(directory: Path, step: int, *, store: Store) -> list[Path]:
    """Rename the steps after `step` to `set-aside-step-NNNNNNNN`, so that none is taken for the newest.

    Returns the new paths.

    Raises:
        OSError: a rename failed.
    """
    moved = []
    for path in step_paths(directory, store=store):
        if int(path.name.removeprefix("step-")) <= step:
            continue
        target, number = directory / f"set-aside-{path.name}", 1
        while store.kind(target) != "missing":
            target, number = directory / f"set-aside-{path.name}.{number}", number + 1
        store.rename(path, target)
        _log.warning("%s is newer than the step that is loaded: set aside as %s", path, target.name)
        moved.append(target)
    return moved


def steps_at(path: Path, *, store: Store) -> list[Path]:
    """The steps a user means by `path`, newest first: itself, those in it, or those in its `checkpoints`."""
    if STEP_NAME.fullmatch(path.name) or store.kind(path / MANIFEST_NAME) != "missing":
        return [path]
    return step_paths(path / "checkpoints", store=store) or step_paths(path, store=store)
