"""Load pieces of logical tensors from a committed step, whatever layout saved it.

Each rank asks for its boxes and reads the chunks that meet them, each once; what is copied is what was
hashed. Ranks that want the same chunks may share the reading (`share.py`). Which step to load is decided in
`choice.py`; `resume` puts the two together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from megads.checkpoint.choice import Choice, OnDamage, choose
from megads.checkpoint.commit import Agreement
from megads.checkpoint.manifest import Chunk, DamageError, TensorEntry
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.retention import set_aside_newer
from megads.checkpoint.save import dtype_name
from megads.checkpoint.share import ALONE, Reading, read_shared
from megads.checkpoint.store import Store, describe_failure
from megads.errors import CheckpointError
from megads.parallel.control import Control
from megads.parallel.parameter import Piece
from megads.parallel.shard import Box

_SHOWN = 8  # names listed in one message


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How a checkpoint may differ from what is wanted of it.

    Attributes:
        unread: name prefixes of tensors that may stay unread, e.g. ("optim/",) to load the model alone.
        missing: name patterns of tensors that it may not have; what they would fill stays as it is.
        resized: names of tensors that may have other sizes along dim 0; the rows that both have are loaded.
    """

    unread: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    resized: frozenset[str] = frozenset()

    def may_miss(self, name: str) -> bool:
        """Whether tensor `name` may be missing."""
        return any(fnmatchcase(name, pattern) for pattern in self.missing)


EXACT = Tolerance()
STATE = ("optim/*", "router/*", "ema_*")
"""Names of what a step may lack whose objects have no `optim`: a model that comes from elsewhere, without a trainer."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was loaded.

    Attributes:
        reader: the step, with its number and objects; None: a fresh start.
        sentence: which step and why, for the user.
    """

    reader: StepReader | None
    sentence: str


def load(
    step_directory: str | Path,
    pieces: Sequence[Piece],
    *,
    control: Agreement | None = None,
    reading: Reading = ALONE,
    tolerance: Tolerance = EXACT,
    store: Store | None = None,
) -> StepReader:
    """Fill `pieces` in place; returns the step's reader. All ranks of `control` call it.

    Args:
        pieces: what this rank wants; boxes may overlap between ranks.
        control: over all ranks that load together; None: this process alone.
        reading: how chunks are read and checked.
        tolerance: what may differ between the checkpoint and `pieces`.

    Raises:
        DamageError: on all ranks: a file is not what was saved; names file, bytes and tensor.
        CheckpointError: on all ranks: no step there, or one of another model: what differs.
    """
    control = control or Control(0, 1)
    failure: CheckpointError | None = None
    reader = None
    try:
        reader = open_step(step_directory, store=store)
    except CheckpointError as error:
        failure = error
    _agree(control, failure)
    assert reader is not None
    if "optim" not in reader.objects:
        tolerance = replace(tolerance, missing=(*tolerance.missing, *STATE))
    failure = _difference(reader, pieces, control=control, tolerance=tolerance)
    _agree(control, failure)
    try:
        if control.rank == 0:
            _check_files(reader)
    except CheckpointError as error:
        failure = error
    _agree(control, failure)
    try:
        _fill(reader, [piece for piece in pieces if piece.name in reader.manifest.tensors], reading)
    except CheckpointError as error:
        failure = error
    _agree(control, failure)
    return reader


def read_box(reader: StepReader, name: str, *, box: Box) -> torch.Tensor:
    """The values of a box of one logical tensor, by this process alone.

    Raises:
        DamageError: they are not what was saved.
    """
    entry = reader.manifest.tensors[name]
    tensor = torch.empty(box.shape, dtype=getattr(torch, entry.dtype))
    _fill(reader, [Piece(name, entry.shape, box, tensor)], ALONE)
    return tensor


def resume(
    wanted: str,
    directory: str | Path,
    *,
    pieces: Sequence[Piece],
    control: Agreement,
    on_damage: OnDamage = "error",
    reading: Reading = ALONE,
    tolerance: Tolerance = EXACT,
    store: Store | None = None,
) -> Resumed:
    """Choose a step by `checkpoint.load` and load it, or say that it is a fresh start. All ranks call it.

    Where an older step of `directory` itself is loaded, the newer ones are set aside under another name, so
    that a later resume cannot take them for the newest.

    Args:
        wanted: `auto`, `never`, `must` or a path.
        directory: the run's own `checkpoints`.
        on_damage: `previous`: go on to the next older step if one is damaged.
        reading, tolerance: as `load`.

    Raises:
        DamageError, CheckpointError: on all ranks, as `choose` and `load`.
    """
    directory, store = Path(directory), store or Store()
    damaged: dict[str, str] = {}
    while True:
        choice = _choose_together(
            wanted, directory, on_damage=on_damage, damaged=damaged, control=control, store=store
        )
        if choice.path is None:
            return Resumed(None, choice.sentence)
        try:
            reader = load(
                choice.path, pieces, control=control, reading=reading, tolerance=tolerance, store=store
            )
        except DamageError as error:
            damaged[str(choice.path)] = str(error)
            continue
        failure = None
        if control.rank == 0 and choice.is_own:
            failure = _set_aside(directory, reader.step, store)
        _agree(control, failure)
        return Resumed(reader, choice.sentence)


def _choose_together(
    wanted: str,
    directory: Path,
    *,
    on_damage: OnDamage,
    damaged: dict[str, str],
    control: Agreement,
    store: Store,
) -> Choice:
    """Rank 0's choice, on all ranks."""
    failure: CheckpointError | None = None
    choice = None
    if control.rank == 0:
        try:
            choice = choose(wanted, directory, on_damage=on_damage, damaged=damaged, store=store)
        except CheckpointError as error:
            failure = error
        except OSError as error:
            failure = CheckpointError(f"no step can be chosen: {describe_failure(error)}")
    _agree(control, failure)
    path, is_own, sentence = control.broadcast(
        None if choice is None else [choice.path and str(choice.path), choice.is_own, choice.sentence]
    )
    return Choice(path and Path(path), is_own, sentence)


def _set_aside(directory: Path, step: int, store: Store) -> CheckpointError | None:
    try:
        set_aside_newer(directory, step, store=store)
    except OSError as error:
        return CheckpointError(f"newer steps cannot be set aside: {describe_failure(error)}")
    return None


def _agree(control: Agreement, failure: CheckpointError | None) -> None:
    """Go on only if no rank has failed; the first failure is raised on all ranks, as the same kind."""
    told = None if failure is None else [isinstance(failure, DamageError), str(failure)]
    for rank, report in enumerate(control.all_gather(told)):
        if report is not None:
            is_damage, message = report
            text = message if control.size == 1 else f"rank {rank}: {message}"
            raise (DamageError if is_damage else CheckpointError)(text) from failure


def _difference(
    reader: StepReader, pieces: Sequence[Piece], *, control: Agreement, tolerance: Tolerance
) -> CheckpointError | None:
    """What makes this the checkpoint of another model; also whether all ranks read the same manifest."""
    mine = {
        "digest": reader.digest,
        "names": {p.name: [list(p.shape), dtype_name(p.tensor.dtype)] for p in pieces},
    }
    wanted: dict[str, Any] = {}
    for rank, report in enumerate(control.all_gather(mine)):
        if report["digest"] != reader.digest:
            return CheckpointError(
                f"{reader.path}: rank {rank} reads another manifest than rank {control.rank}",
                allowed="one directory, shared by all hosts",
            )
        wanted |= report["names"]
    saved = reader.manifest.tensors
    missing = sorted(name for name in wanted if name not in saved and not tolerance.may_miss(name))
    extra = sorted(name for name in saved if name not in wanted and not name.startswith(tolerance.unread))
    changed = [
        f"{name} ({_head(saved[name])}, wanted {dtype} {_shape(shape)})"
        for name, (shape, dtype) in sorted(wanted.items())
        if name in saved
        and not _fits(name, saved[name], shape=shape, dtype=dtype, is_resized=name in tolerance.resized)
    ]
    groups = [("not in the checkpoint", missing), ("only in the checkpoint", extra), ("different", changed)]
    lines = [f"{len(names)} {title}: {_listed(names)}" for title, names in groups if names]
    if not lines:
        return None
    return CheckpointError(
        f"{reader.path}: a checkpoint of another model",
        found="\n           ".join(lines),
        allowed=f"the {len(wanted)} tensors of this config, each with its shape and dtype",
        do="use the config it was trained with (config.yaml of its run)",
    )


def _fits(name: str, entry: TensorEntry, *, shape: Sequence[int], dtype: str, is_resized: bool) -> bool:
    """Whether a saved tensor can fill one of this shape and dtype; a moment is widened or rounded on its way."""
    first = 1 if is_resized else 0
    same_rank = len(entry.shape) == len(shape)
    is_moment = name.startswith("optim/") and {entry.dtype, dtype} == {"float32", "bfloat16"}
    return (
        same_rank
        and (entry.dtype == dtype or is_moment)
        and tuple(entry.shape[first:]) == tuple(shape[first:])
    )


def _head(entry: TensorEntry) -> str:
    return f"{entry.dtype} {_shape(entry.shape)}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _check_files(reader: StepReader) -> None:
    """Every file of the step is there with its size, also those that no piece needs."""
    for name in reader.manifest.files:
        problem = reader.file_problem(name)
        if problem is not None:
            raise DamageError(problem)


def _fill(reader: StepReader, pieces: Sequence[Piece], reading: Reading) -> None:
    """Read each chunk that meets a piece once, in file order, and copy."""
    by_name: defaultdict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_name[piece.name].append(piece)
    needed: list[tuple[Chunk, str]] = [
        (chunk, name)
        for name, wanted in by_name.items()
        for chunk in reader.manifest.tensors[name].chunks
        if any(chunk.box.intersect(piece.box) is not None for piece in wanted)
    ]
    needed.sort(key=lambda item: (item[0].file, item[0].offset))
    with closing(read_shared(reader, needed, reading=reading)) as parts:
        for part in parts:
            dtype = getattr(torch, reader.manifest.tensors[part.name].dtype)
            values = part.data.view(dtype).view(part.chunk.box.shape)
            for piece in by_name[part.name]:
                _copy_common(piece, part.chunk.box, values)


def _copy_common(piece: Piece, box: Box, values: torch.Tensor) -> None:
    """Copy what a piece and a box of values have in common into the piece."""
    common = piece.box.intersect(box)
    if common is None:
        return
    target = piece.tensor.detach()[_inside(common, piece.box)]
    target.copy_(values[_inside(common, box)])


def _inside(part: Box, whole: Box) -> tuple[slice, ...]:
    return part.shift(tuple(-a for a in whole.start)).slices
