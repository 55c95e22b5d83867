"""Which step a run starts from: `checkpoint.load` and `checkpoint.on_damage` over what is on the disk.

Never from scratch in silence: damage is an error or an older step, said aloud. Only manifests and file sizes
are read here; the tensors are checked while they are loaded, and damage found then comes back here as
`damaged`. No torch.

    load     own steps           none                 newest damaged
    auto     newest              fresh start          error, or the newest intact one if on_damage=previous
    must     newest              error                as auto
    never    error               fresh start          error
    PATH     that step, or the newest one of that run; error if the run has other steps of its own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megads.checkpoint.commit import is_temporary, is_uncommitted
from megads.checkpoint.manifest import DamageError
from megads.checkpoint.retention import damage, step_paths, steps_at
from megads.checkpoint.store import Store
from megads.errors import CheckpointError

OnDamage = Literal["error", "previous"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The step to load.

    Attributes:
        path: its directory; None: a fresh start.
        is_own: whether it belongs to the run's own directory.
        sentence: what was chosen and why, for the user.
    """

    path: Path | None
    is_own: bool
    sentence: str


def choose(
    wanted: str,
    directory: Path,
    *,
    on_damage: OnDamage,
    damaged: Mapping[str, str],
    store: Store,
) -> Choice:
    """The step to load.

    Args:
        wanted: `auto`, `never`, `must` or a path.
        directory: the run's own `checkpoints`.
        damaged: step path -> what a load found wrong with it.

    Raises:
        DamageError: the step is damaged, with the newest older one that is not.
        CheckpointError: a policy that what is there does not allow.
    """
    own = step_paths(directory, store=store)
    if wanted not in ("auto", "must", "never"):
        return _choose_path(Path(wanted), directory, own, on_damage=on_damage, damaged=damaged, store=store)
    if wanted == "never":
        if own:
            raise CheckpointError(
                f"{directory}: checkpoint.load=never, but steps are there",
                found=_names(own),
                allowed="a run directory without steps",
                do="checkpoint.load=auto goes on from the newest; another run.dir starts afresh",
            )
        return Choice(None, is_own=True, sentence="a fresh start, as checkpoint.load=never asks")
    if own:
        return _newest(own, is_own=True, on_damage=on_damage, damaged=damaged, store=store)
    if wanted == "must":
        raise CheckpointError(
            f"{directory}: no step to load",
            found="none",
            allowed="at least one, as checkpoint.load=must asks",
        )
    return _fresh(directory, store)


def _fresh(directory: Path, store: Store) -> Choice:
    """A fresh start, unless the directory holds something that is no step."""
    names = store.entries(directory) if store.kind(directory) == "directory" else []
    unfinished = [n for n in names if is_temporary(n) or is_uncommitted(directory / n, store)]
    strangers = [name for name in names if name not in unfinished and not name.startswith(".")]
    if strangers:
        raise CheckpointError(
            f"{directory}: holds no step, but is not empty",
            found=", ".join(strangers[:8]),
            allowed="steps, or nothing",
            do="give a step by checkpoint.load=PATH, or start afresh by checkpoint.load=never",
        )
    skipped = ", ".join(unfinished)
    rest = f" (skipped: {skipped}, from a save that was not completed)" if skipped else ""
    return Choice(None, is_own=True, sentence=f"a fresh start: no step in {directory}{rest}")


def _choose_path(
    path: Path,
    directory: Path,
    own: Sequence[Path],
    *,
    on_damage: OnDamage,
    damaged: Mapping[str, str],
    store: Store,
) -> Choice:
    """A step, a run's `checkpoints`, or a run's directory."""
    steps = steps_at(path, store=store)
    if not steps:
        raise CheckpointError(
            f"checkpoint.load={path}: no checkpoint there",
            found="nothing there" if store.kind(path) == "missing" else "no step in it",
            allowed="auto, never, must, or the directory of a run, its checkpoints, or a step",
        )
    is_own = steps[0].parent.resolve() == directory.resolve()
    if own and not is_own:
        raise CheckpointError(
            f"checkpoint.load={path}: the run directory has steps of its own",
            found=f"{_names(own)} in {directory}",
            allowed="a path into this run, or a run directory without steps",
            do="checkpoint.load=auto goes on from them; another run.dir starts from the path",
        )
    if len(steps) > 1 or path != steps[0]:
        return _newest(steps, is_own=is_own, on_damage=on_damage, damaged=damaged, store=store)
    problem = damaged.get(str(path)) or damage(path, store=store)
    if problem is not None:
        older = [p for p in step_paths(path.parent, store=store) if int(p.name[5:]) < _number(path)]
        raise _damage_error(path, problem, older, damaged=damaged, store=store)
    return Choice(path, is_own, f"loads {path}, as checkpoint.load asks")


def _newest(
    steps: Sequence[Path],
    *,
    is_own: bool,
    on_damage: OnDamage,
    damaged: Mapping[str, str],
    store: Store,
) -> Choice:
    """The newest step; if it is damaged, an error or the next older one."""
    passed: list[str] = []
    for number, path in enumerate(steps):
        problem = damaged.get(str(path)) or damage(path, store=store)
        if problem is None:
            rest = f"; newer and damaged: {'; '.join(passed)}" if passed else ""
            return Choice(
                path, is_own, f"goes on from {path}, the newest {'intact ' if passed else ''}step{rest}"
            )
        if on_damage == "error":
            raise _damage_error(path, problem, steps[number + 1 :], damaged=damaged, store=store)
        passed.append(_in_one_line(problem))
    raise DamageError(
        f"{steps[0].parent}: every step is damaged",
        found="\n           ".join(passed),
        allowed="an intact step",
    )


def _damage_error(
    path: Path, problem: str, older: Sequence[Path], *, damaged: Mapping[str, str], store: Store
) -> DamageError:
    intact = next((p for p in older if str(p) not in damaged and damage(p, store=store) is None), None)
    return DamageError(
        f"{path} is damaged",
        found=_in_one_line(problem),
        allowed="an undamaged step",
        do=f"checkpoint.load={intact} loads the newest older one that has its manifest and files, "
        "checkpoint.on_damage=previous does so by itself"
        if intact
        else "no older step is there: restore it from a copy, or start afresh in another run.dir",
    )


def _in_one_line(message: str) -> str:
    """An error's message within another's."""
    return "; ".join(" ".join(line.split()) for line in message.splitlines())


def _number(path: Path) -> int:
    """Step number by name; a step under another name counts as newest."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 1 << 62


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + (
        f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    )
