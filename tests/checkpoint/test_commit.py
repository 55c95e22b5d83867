"""A step is there completely or not at all, whenever the process or the power goes.

Every storage operation of a save is a place to die; after each, in each way a file system may survive, the
newest step must load bit for bit: the new one if its save had returned, else the new or the old one.
Protocols that are broken on purpose must be caught by the same search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megads.checkpoint import commit as commit_module
from megads.checkpoint.choice import choose
from megads.checkpoint.load import load
from megads.checkpoint.manifest import MANIFEST_NAME
from megads.checkpoint.save import save
from megads.checkpoint.store import Store, write_file
from megads.errors import CheckpointError
from megads.parallel.control import Control
from tests.checkpoint.samples import empty_like, same, small_state, whole
from tests.checkpoint.stores import SURVIVALS, MemoryStore, PowerCut
from tests.checkpoint.threads import run_threads

DIRECTORY = Path("/run/checkpoints")
OLD, NEW = small_state(1), small_state(2)
ALONE = Control(0, 1)


def save_state(store: Store, step: int, ranks: int) -> bool:
    """Save on `ranks` ranks that write one after the other; whether all returned."""
    pieces = whole({1: OLD, 2: NEW, 3: OLD}[step])

    def one(control: Control) -> Path:
        share = pieces[control.rank :: ranks]
        return save(
            DIRECTORY, step, pieces=share, objects={}, control=control, writers_per_node=1, store=store
        )

    results = run_threads(ranks, one)
    for result in results:
        if isinstance(result, Exception) and not any(isinstance(r, PowerCut) for r in results):
            raise result
    return all(isinstance(result, Path) for result in results)


def loaded_step(store: Store) -> int | None:
    """The step that `auto` loads, its values compared with what was saved; None for a fresh start."""
    choice = choose("auto", DIRECTORY, on_damage="error", damaged={}, store=store)
    if choice.path is None:
        return None
    wanted = empty_like(OLD)
    reader = load(choice.path, whole(wanted), store=store)
    if not same(wanted, {1: OLD, 2: NEW, 3: OLD}[reader.step]):
        raise CheckpointError(f"step {reader.step} has other values than were saved")
    return reader.step


def search(ranks: int, seeds: int = 3, *, renames: bool = True) -> Iterator[str]:
    """What goes wrong, over every place to die and every survival."""
    clean = MemoryStore(renames=renames)
    save_state(clean, 1, ranks)
    first = clean.count
    save_state(clean, 2, ranks)
    for crash_at in range(clean.count + 1):
        store = MemoryStore(renames=renames)
        store.crash_at = crash_at
        returned = 0
        while returned < 2 and save_state(store, returned + 1, ranks):
            returned += 1
        assert (returned >= 1) == (crash_at >= first)
        for survival in SURVIVALS:
            for seed in range(seeds if survival == "random" else 1):
                wrong = after_crash(store.survivors(survival, seed), returned, ranks)
                if wrong is not None:
                    yield f"dead at {crash_at}, survival {survival} {seed}: {wrong}"


def after_crash(store: MemoryStore, returned: int, ranks: int) -> str | None:
    """What is wrong with what is found, where the save of step `returned` was the last to return."""
    try:
        found = loaded_step(store) or 0
        if found not in (returned, returned + 1):
            return f"step {found} is found after {returned} was saved"
        save_state(store, 3, ranks)
        return None if loaded_step(store) == 3 else "the next save is not found"
    except (CheckpointError, OSError) as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("renames", [True, False])
def test_no_crash_loses_or_tears_a_step(ranks: int, renames: bool) -> None:
    assert list(search(ranks, renames=renames)) == []


def no_sync(self: MemoryStore, handle: int) -> None:
    self._change()


def no_directory_sync(only: Callable[[Path], bool]) -> Callable[[MemoryStore, Path], None]:
    honest = MemoryStore.sync_directory

    def sync_directory(self: MemoryStore, path: Path) -> None:
        if only(path):
            self._change()
        else:
            honest(self, path)

    return sync_directory


def rename_first(temporary: Path, target: Path, manifest: bytes, store: Store) -> dict[str, Any]:
    store.rename(temporary, target)
    write_file(store, target / MANIFEST_NAME, blocks=[manifest])
    store.sync_directory(target)
    store.sync_directory(target.parent)
    return {}


def marker_first(temporary: Path, target: Path, manifest: bytes, store: Store) -> dict[str, Any]:
    """Call the step committed before its manifest is there."""
    store.unlink(target.with_name(commit_module.MARKER_PREFIX + target.name))
    store.sync_directory(target.parent)
    write_file(store, target / MANIFEST_NAME, blocks=[manifest])
    store.sync_directory(target)
    return {}


def unmarked(directory: Path, target: Path, store: Store, held: object) -> dict[str, Any]:
    """Write under the final name, and say it only in the end."""
    commit_module.make_directories(store, target)
    return {"temporary": target.name}


def marked_late(temporary: Path, target: Path, manifest: bytes, store: Store) -> dict[str, Any]:
    write_file(store, target / MANIFEST_NAME, blocks=[manifest])
    store.sync_directory(target)
    return {}


BROKEN: dict[str, list[tuple[object, str, Callable[..., Any]]]] = {
    "no fsync of files": [(MemoryStore, "sync", no_sync)],
    "no fsync of the temporary": [
        (MemoryStore, "sync_directory", no_directory_sync(lambda p: p.name.startswith(".tmp")))
    ],
    "no fsync of the parent": [
        (MemoryStore, "sync_directory", no_directory_sync(lambda p: p == DIRECTORY)),
    ],
    "no fsync above the parent": [
        (MemoryStore, "sync_directory", no_directory_sync(lambda p: p in DIRECTORY.parents))
    ],
    "rename before the manifest": [(commit_module, "_commit", rename_first)],
    "no temporary": [(commit_module, "_open", unmarked), (commit_module, "_commit", marked_late)],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for replaced in BROKEN[name]:
        monkeypatch.setattr(*replaced)
    assert next(search(1, seeds=1), None) is not None


def test_a_marker_that_goes_before_the_manifest_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit_module, "_commit", marker_first)
    assert next(search(1, seeds=1, renames=False), None) is not None


def test_a_manifest_before_the_chunks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if rank 0 committed before it heard from the others."""
    honest, delayed = MemoryStore.sync, []

    def late(self: MemoryStore, handle: int) -> None:
        file = self._handles[handle]
        if file.data[:1] == b"{":
            honest(self, handle)
        else:
            self._change()
            delayed.append(file)

    monkeypatch.setattr(MemoryStore, "sync", late)
    assert next(search(2, seeds=1), None) is not None


def test_temporaries_are_removed_by_the_next_save(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000005-abcd" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-step-00000005-abcd" / "deep" / "file").write_bytes(b"x")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"x")
    (tmp_path / ".tmp-link").symlink_to(outside)
    save(tmp_path, 6, pieces=whole(OLD), objects={}, control=ALONE)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000006"]
    assert (outside / "kept").exists()


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    save(tmp_path, 6, pieces=whole(OLD), objects={}, control=ALONE)
    for error in run_threads(
        2, lambda c: save(tmp_path, 6, pieces=whole(NEW)[c.rank :: 2], objects={}, control=c)
    ):
        assert isinstance(error, CheckpointError)
        assert "step 6 not saved" in str(error)
        assert "is there already" in str(error)
    wanted = empty_like(OLD)
    load(tmp_path / "step-00000006", whole(wanted))
    assert same(wanted, OLD)
