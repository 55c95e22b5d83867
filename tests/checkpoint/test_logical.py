"""A checkpoint opened as a mapping: every bit as saved, only the chunks that are asked for, no torch before that."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megads.checkpoint
from megads.checkpoint import save as save_module
from megads.checkpoint.manifest import DamageError
from megads.checkpoint.reader import StepReader
from megads.checkpoint.save import save
from megads.errors import CheckpointError
from tests.checkpoint.samples import bits, random_cut, small_state, whole
from tests.checkpoint.threads import run_threads


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_tensor_comes_back_whatever_the_cut(ranks: int, tmp_path: Path) -> None:
    state = small_state(3) | {"model/e": torch.empty(0, 4), "model/f": torch.ones(3).to(torch.float8_e4m3fn)}
    cut = random_cut(state, ranks, random.Random(ranks)) if ranks > 1 else [whole(state)]
    run_threads(
        ranks, lambda c: save(tmp_path, 5, pieces=cut[c.rank], objects={"config": "a: 1\n"}, control=c)
    )
    step = megads.checkpoint.open(tmp_path)
    assert step.step == 5 and step.objects["config"] == "a: 1\n" and step.path.name == "step-00000005"
    assert set(step) == set(state) and len(step) == len(state)
    for name, tensor in state.items():
        assert step.shape(name) == tuple(tensor.shape)
        assert getattr(torch, step.dtype(name)) == tensor.dtype == step[name].dtype
        assert bits(step[name]) == bits(tensor)


def test_rows_read_only_the_chunks_that_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "MAX_CHUNK_BYTES", 64)  # four rows of four float32
    values = torch.arange(64.0).view(16, 4)
    path = save(
        tmp_path, 1, pieces=whole({"model/w": values}), objects={}, control=run_threads(1, lambda c: c)[0]
    )
    read: list[int] = []
    plain = StepReader.read_chunk

    def counted(self: StepReader, chunk: object, *, name: str) -> memoryview:
        read.append(1)
        return plain(self, chunk, name=name)  # type: ignore[arg-type]

    monkeypatch.setattr(StepReader, "read_chunk", counted)
    step = megads.checkpoint.open(path)
    assert torch.equal(step.read("model/w", rows=range(5, 7)), values[5:7]) and len(read) == 1
    assert torch.equal(step.read("model/w", rows=range(3, 9)), values[3:9]) and len(read) == 4
    for rows in (range(17), range(2, 4, 2), range(-1, 2)):
        with pytest.raises(IndexError, match="has no rows"):
            step.read("model/w", rows=rows)


def test_damage_and_absence_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        megads.checkpoint.open(tmp_path / "nothing")
    control = run_threads(1, lambda c: c)[0]
    path = save(tmp_path, 1, pieces=whole(small_state()), objects={}, control=control)
    step = megads.checkpoint.open(path)
    with pytest.raises(KeyError):
        step["model/none"]
    (file,) = path.glob("chunks-*.bin")
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamageError, match="damaged at bytes 0"):
        step["model/w"]


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    control = run_threads(1, lambda c: c)[0]
    save(tmp_path, 1, pieces=whole(small_state()), objects={}, control=control)
    code = (
        "import sys, megads.checkpoint; step = megads.checkpoint.open(sys.argv[1]);"
        "assert step.shape('model/w') == (6, 4); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
