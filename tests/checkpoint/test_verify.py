"""Damage table C01-C14: each damage x each file of a step is named by verify, by load and by resume."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megads.checkpoint.load import load, resume
from megads.checkpoint.manifest import DamageError
from megads.checkpoint.save import save
from megads.checkpoint.verify import verify
from megads.errors import CheckpointError
from megads.parallel.control import Control
from tests.checkpoint.samples import empty_like, same, small_state, whole
from tests.checkpoint.threads import run_threads

ALONE = Control(0, 1)
FILES = ("chunks-00000.bin", "chunks-00001.bin", "manifest.json")


def patched(change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        change(data)
        file.write_bytes(data)

    return damage


def flip(data: bytearray, index: int, bit: int = 0) -> None:
    data[index] ^= 1 << bit


def zero_page(data: bytearray) -> None:
    page = slice(len(data) // 3, len(data) // 3 + 4096)
    data[page] = bytes(len(data[page]))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def exchange(file: Path) -> None:
    other = file.with_name("chunks-00001.bin" if file.name != "chunks-00001.bin" else "chunks-00000.bin")
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)


def of_another_step(file: Path) -> None:
    shutil.copyfile(file.parent.parent / "step-00000001" / file.name, file)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "C01 one bit flipped": patched(lambda d: flip(d, random.Random(len(d)).randrange(len(d)), 5)),
    "C02 lowest bit of the middle byte": patched(lambda d: flip(d, len(d) // 2)),
    "C03 first byte": patched(lambda d: flip(d, 0, 7)),
    "C03 last byte": patched(lambda d: flip(d, len(d) - 1, 7)),
    "C04 empty": patched(lambda d: d.clear()),
    "C05 cut in half": patched(lambda d: d.__delitem__(slice(len(d) // 2, None))),
    "C06 one byte short": patched(lambda d: d.pop()),
    "C07 512 bytes too long": patched(lambda d: d.extend(bytes(512))),
    "C08 a page of zeros": patched(zero_page),
    "C09 missing": Path.unlink,
    "C10 two files exchanged": exchange,
    "C11 the file of another step": of_another_step,
    "C12 a link to itself": replaced(lambda f: f.symlink_to(f)),
    "C12 a link to an equal file": replaced(
        lambda f: f.symlink_to(f.parent.parent / "step-00000001" / f.name)
    ),
    "C13 a directory": replaced(Path.mkdir),
    "C14 a named pipe": replaced(os.mkfifo),
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        pieces = whole(small_state(step))
        run_threads(
            2, lambda c, s=step, p=pieces: save(directory, s, pieces=p[c.rank :: 2], objects={}, control=c)
        )
    return directory


@pytest.mark.timeout(30)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_of_every_file_is_named(pristine: Path, tmp_path: Path, name: str, file: str) -> None:
    directory = tmp_path / "checkpoints"
    shutil.copytree(pristine, directory)
    step = directory / "step-00000002"
    DAMAGES[name](step / file)

    problems = verify(step)
    assert any(file in p for p in problems), problems
    if file != "manifest.json":
        assert any(tensor in p for p in problems for tensor in small_state()), problems

    wanted = empty_like(small_state())
    with pytest.raises(DamageError) as caught:
        load(step, whole(wanted))
    assert str(step) in str(caught.value)
    if "exchanged" not in name:
        assert file in str(caught.value)

    for error in run_threads(2, lambda c: resume("auto", directory, pieces=whole(wanted), control=c)):
        assert isinstance(error, DamageError)
        assert f"checkpoint.load={directory / 'step-00000001'}" in str(error)
    resumed = resume("auto", directory, pieces=whole(wanted), control=ALONE, on_damage="previous")
    assert resumed.reader is not None
    assert resumed.reader.step == 1
    assert str(step) in resumed.sentence
    assert same(wanted, small_state(1))


def test_an_intact_step_has_no_problem(pristine: Path) -> None:
    assert verify(pristine / "step-00000002") == []


def test_a_stray_file_is_named(pristine: Path, tmp_path: Path) -> None:
    shutil.copytree(pristine / "step-00000002", tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "extra.bin").write_bytes(b"x")
    assert verify(tmp_path / "step-00000002") == [f"{tmp_path}/step-00000002/extra.bin: not in the manifest"]


def test_every_damaged_place_is_named(pristine: Path, tmp_path: Path) -> None:
    step = tmp_path / "step-00000002"
    shutil.copytree(pristine / "step-00000002", step)
    patched(lambda d: (flip(d, 0), flip(d, len(d) - 1)))(step / FILES[0])
    patched(lambda d: flip(d, 3))(step / FILES[1])
    problems = verify(step)
    assert [FILES[0] in p for p in problems] == [True, True, False]
    assert [FILES[1] in p for p in problems] == [False, False, True]


def test_no_step_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing there"):
        verify(tmp_path / "nothing")
