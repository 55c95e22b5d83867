"""What `tools/inspect_checkpoint.py` prints and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megads.checkpoint.describe import main
from megads.checkpoint.save import save
from megads.errors import CheckpointError
from megads.parallel.control import Control
from tests.checkpoint.samples import random_cut, small_state, whole

ROOT = Path(__file__).resolve().parents[2]
ALONE = Control(0, 1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        objects = {"history": [{"step": 0}], "config": {"seed": step}}
        save(tmp_path / "checkpoints", step, pieces=whole(small_state(1)), objects=objects, control=ALONE)
    return tmp_path


def test_summary_and_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["step", "2"] in rows
    assert ["model", "2", "29", "106"] in rows
    assert ["optim/exp_avg", "1", "24", "192"] in rows
    assert ["optim/exp_avg/w", "6x4", "float64", "24", "192", "1"] in rows
    assert ["optim/count", "scalar", "int64", "1", "8", "1"] in rows
    assert ["config", '{"seed":', "2}"] in rows


def test_diff_names_what_differs_whatever_the_cut(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import random

    state = small_state(1)
    state["model/w"][2, 1] += 0.5
    state["model/b"][0] = float("nan")
    state["optim/count"] = torch.tensor(1, dtype=torch.int32)
    state["model/extra"] = torch.zeros(1)
    cut = random_cut(state, 1, random.Random(0))[0]
    save(tmp_path / "other", 2, pieces=cut, objects={"history": [{"step": 0}]}, control=ALONE)
    assert main([str(run), "--diff", str(tmp_path / "other")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        'object config: {"seed": 2} and null',
        "model/b: 1 of 5 elements differ, by at most 0",
        f"model/extra: only in {tmp_path}/other/step-00000002",
        "model/w: 1 of 24 elements differ, by at most 0.5",
        "optim/count: int64 scalar and int32 scalar",
    ]
    first, second = run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002"
    assert main([str(first), "--diff", str(second)]) == 1
    assert capsys.readouterr().out == 'step: 1 and 2\nobject config: {"seed": 1} and {"seed": 2}\n'
    assert main([str(first), "--diff", str(first)]) == 0
    assert capsys.readouterr().out == "no difference\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8])
def test_diff_is_right_in_every_dtype(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, values in (("a", [1, 2, 3]), ("b", [1, 7, 0])):
        pieces = whole({"t": torch.tensor(values, dtype=dtype)})
        save(tmp_path / name, 1, pieces=pieces, objects={}, control=ALONE)
    assert main([str(tmp_path / "a"), "--diff", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().out == "t: 2 of 3 elements differ, by at most 5\n"


def test_verify_names_damage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--verify"]) == 0
    assert "verified: 306 bytes" in capsys.readouterr().out
    file = run / "checkpoints" / "step-00000002" / "chunks-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert main([str(run), "--verify"]) == 2
    text = capsys.readouterr().out
    assert f"DAMAGED  {file}: damaged at bytes 96..106, tensor model/b" in text


def test_wrong_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing there"):
        main([str(tmp_path / "nothing")])
    with pytest.raises(CheckpointError, match="no step in it"):
        main([str(tmp_path)])


def test_the_tool_needs_no_torch(run: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    tool = [sys.executable, str(ROOT / "tools" / "inspect_checkpoint.py")]
    env = {"PYTHONPATH": str(tmp_path)}
    good = subprocess.run(
        [*tool, str(run), "--verify"], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert (good.returncode, good.stderr) == (0, "")
    bad = subprocess.run([*tool, str(tmp_path / "no")], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert bad.returncode == 2
    assert bad.stderr.startswith(f"{tmp_path}/no: no checkpoint\n")
