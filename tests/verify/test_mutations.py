"""`verify` sees every deliberate fault and says where: five of them, another five each day, or all with --all."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.verify.mutations import MODELS, MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
NUM_A_DAY = 5

CONFIG = """\
run: {steps: 10}
model: {family: llama, layers: 4, hidden: 256, heads: 8, kv_heads: 4}
batch: {global: 32}
data: {train: none, tokenizer: none, sequence_length: 512}
optim: {lr: 1e-3, clip: 0.5}
"""


def of_today() -> frozenset[str]:
    """The faults whose turn it is; every one has it at least once in len(MUTATIONS) / NUM_A_DAY days."""
    first = datetime.date.today().toordinal() * NUM_A_DAY
    return frozenset(MUTATIONS[(first + n) % len(MUTATIONS)].name for n in range(NUM_A_DAY))


def verify(package: Path, config: Path, *, layout: str, model: str) -> subprocess.CompletedProcess[str]:
    """The command line, with the package that lies in the folder `package`."""
    words = [sys.executable, "-m", "megads", "verify", str(config), "--layout", layout, "--steps", "2"]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*words, *MODELS[model].split()],
        cwd=package,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def break_copy(mutation: Mutation, folder: Path) -> None:
    """A copy of the package with the fault in it."""
    shutil.copytree(ROOT / "megads", folder / "megads", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    path = folder / "megads" / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, "the code has changed: the row breaks nothing"
    path.write_text(text.replace(mutation.old, mutation.new))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_the_text_that_is_broken_stands_there_once(mutation: Mutation) -> None:
    assert (ROOT / "megads" / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old


MARKED = [
    pytest.param(m, id=m.name, marks=() if m.name in of_today() else pytest.mark.slow) for m in MUTATIONS
]


@pytest.mark.parametrize("mutation", MARKED)
def test_the_fault_is_seen_and_named(mutation: Mutation, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    break_copy(mutation, tmp_path)
    done = verify(tmp_path, tmp_path / "config.yaml", layout=mutation.layout, model=mutation.model)
    first = "\n".join(done.stdout.splitlines()[:3])
    assert done.returncode == 1, done.stdout + done.stderr
    missing = [words for words in mutation.words if words not in first]
    assert not missing, f"{missing} not in\n{first}"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.slow
def test_without_a_fault_the_same_layouts_are_equal(model: str, tmp_path: Path) -> None:
    """The control: what the rows above are told apart from."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    for layout in sorted({m.layout for m in MUTATIONS if m.model == model}):
        done = verify(ROOT, tmp_path / "config.yaml", layout=layout, model=model)
        assert done.returncode == 0, done.stdout + done.stderr
