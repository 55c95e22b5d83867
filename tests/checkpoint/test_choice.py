"""What `checkpoint.load` and `checkpoint.on_damage` make of the disk: never from scratch in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megads.checkpoint.choice import choose
from megads.checkpoint.load import resume
from megads.checkpoint.manifest import DamageError
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.parallel.control import Control
from tests.checkpoint.samples import empty_like, small_state, whole

ALONE = Control(0, 1)


def fill(directory: Path, *steps: int) -> Path:
    for step in steps:
        save(directory, step, pieces=whole(small_state(step)), objects={}, control=ALONE)
    return directory


def break_manifest(directory: Path, step: int) -> None:
    (directory / f"step-{step:08d}" / "manifest.json").write_text("{}")


def nothing(d: Path) -> None:
    pass


def temporary(d: Path) -> None:
    (d / ".tmp-step-00000009-abcd").mkdir(parents=True)


def steps(d: Path) -> None:
    fill(d, 9, 10, 100)


def damaged(d: Path) -> None:
    fill(d, 9, 10, 100)
    break_manifest(d, 100)


def doubly_damaged(d: Path) -> None:
    damaged(d)
    (d / "step-00000010" / "chunks-00000.bin").unlink()


def all_damaged(d: Path) -> None:
    fill(d, 9)
    break_manifest(d, 9)


def strangers(d: Path) -> None:
    d.mkdir()
    (d / "global_step100").mkdir()


def file_for_step(d: Path) -> None:
    d.mkdir()
    (d / "step-00000100").write_bytes(b"")


def empty_step(d: Path) -> None:
    (d / "step-00000100").mkdir(parents=True)


def file_for_directory(d: Path) -> None:
    d.write_bytes(b"")


@pytest.mark.parametrize(
    ("state", "wanted", "on_damage", "expected", "words"),
    [
        (nothing, "auto", "error", None, "a fresh start: no step in"),
        (nothing, "never", "error", None, "a fresh start, as checkpoint.load=never asks"),
        (nothing, "must", "error", CheckpointError, "no step to load"),
        (
            temporary,
            "auto",
            "error",
            None,
            "skipped: .tmp-step-00000009-abcd, from a save that was not completed",
        ),
        (temporary, "must", "error", CheckpointError, "no step to load"),
        (steps, "auto", "error", 100, "the newest step"),
        (steps, "must", "previous", 100, "the newest step"),
        (steps, "never", "error", CheckpointError, "step-00000100, step-00000010, step-00000009"),
        (damaged, "auto", "error", DamageError, "step-00000010 loads the newest older one"),
        (damaged, "auto", "previous", 10, "newer and damaged: "),
        (damaged, "must", "previous", 10, "step-00000100/manifest.json"),
        (damaged, "never", "previous", CheckpointError, "steps are there"),
        (doubly_damaged, "auto", "error", DamageError, "step-00000009 loads the newest older one"),
        (doubly_damaged, "auto", "previous", 9, "chunks-00000.bin: missing"),
        (all_damaged, "auto", "error", DamageError, "no older step is there"),
        (all_damaged, "auto", "previous", DamageError, "every step is damaged"),
        (strangers, "auto", "error", CheckpointError, "global_step100"),
        (strangers, "never", "error", None, "a fresh start"),
        (file_for_step, "auto", "error", DamageError, "a file that is no directory"),
        (empty_step, "auto", "error", DamageError, "no manifest"),
        (file_for_directory, "auto", "error", CheckpointError, "not a directory"),
    ],
)
def test_policy_table(
    tmp_path: Path,
    state: Callable[[Path], None],
    wanted: str,
    on_damage: str,
    expected: int | type[Exception] | None,
    words: str,
) -> None:
    directory = tmp_path / "checkpoints"
    state(directory)
    if isinstance(expected, type):
        with pytest.raises(expected) as caught:
            choose(wanted, directory, on_damage=on_damage, damaged={}, store=Store())
        assert type(caught.value) is expected
        assert words in str(caught.value), caught.value
        assert caught.value.exit_code == 2
        return
    choice = choose(wanted, directory, on_damage=on_damage, damaged={}, store=Store())
    assert (choice.path and int(choice.path.name[5:])) == expected
    assert words in choice.sentence
    assert choice.is_own


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("other", 20),
        ("other/checkpoints", 20),
        ("other/checkpoints/step-00000010", 10),
        ("other/checkpoints/step-00000030", "nothing there"),
        ("other/checkpoints/step-00000010/chunks-00000.bin", "not a directory"),
        ("nowhere", "nothing there"),
        ("empty", "no step in it"),
    ],
)
def test_paths(tmp_path: Path, path: str, expected: int | str) -> None:
    fill(tmp_path / "other" / "checkpoints", 10, 20)
    (tmp_path / "empty").mkdir()
    own = tmp_path / "own" / "checkpoints"
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=expected):
            choose(str(tmp_path / path), own, on_damage="error", damaged={}, store=Store())
        return
    choice = choose(str(tmp_path / path), own, on_damage="error", damaged={}, store=Store())
    assert choice.path == tmp_path / "other" / "checkpoints" / f"step-{expected:08d}"
    assert not choice.is_own


def test_a_foreign_path_is_refused_where_the_run_has_steps(tmp_path: Path) -> None:
    other, own = fill(tmp_path / "other", 10), fill(tmp_path / "own", 5)
    with pytest.raises(CheckpointError, match=r"has steps of its own[\s\S]*step-00000005"):
        choose(str(other), own, on_damage="error", damaged={}, store=Store())


def test_a_damaged_path_offers_the_older_step_and_is_not_left_in_silence(tmp_path: Path) -> None:
    other = fill(tmp_path / "other", 5, 10, 20)
    break_manifest(other, 10)
    for on_damage in ("error", "previous"):
        with pytest.raises(DamageError, match="step-00000005 loads"):
            choose(
                str(other / "step-00000010"), tmp_path / "own", on_damage=on_damage, damaged={}, store=Store()
            )


def test_going_back_sets_newer_steps_aside(tmp_path: Path) -> None:
    own = fill(tmp_path / "checkpoints", 10, 20, 30)
    (own / "set-aside-step-00000020").mkdir()
    pieces = whole(empty_like(small_state()))
    assert resume(str(own / "step-00000010"), own, pieces=pieces, control=ALONE).reader.step == 10
    names = sorted(p.name for p in own.iterdir())
    assert names == [
        "set-aside-step-00000020",
        "set-aside-step-00000020.1",
        "set-aside-step-00000030",
        "step-00000010",
    ]
    fill(own, 20)
    assert resume("auto", own, pieces=pieces, control=ALONE).reader.step == 20


def test_loading_from_another_run_leaves_it_alone(tmp_path: Path) -> None:
    other = fill(tmp_path / "other", 10, 20)
    pieces = whole(empty_like(small_state()))
    resume(str(other / "step-00000010"), tmp_path / "own", pieces=pieces, control=ALONE)
    assert sorted(p.name for p in other.iterdir()) == ["step-00000010", "step-00000020"]
