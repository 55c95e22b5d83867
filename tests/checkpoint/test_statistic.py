"""Statistics of a step's values against torch's, over chunks, dtypes and values that are not finite."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megads.checkpoint import save as save_module
from megads.checkpoint.describe import main
from megads.checkpoint.reader import StepReader, open_step
from megads.checkpoint.save import save
from megads.checkpoint.statistic import histogram, statistic
from megads.errors import CheckpointError
from megads.parallel.control import Control
from tests.checkpoint.samples import whole


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[StepReader, dict[str, torch.Tensor]]:
    """A step of many small chunks, and what was saved."""
    monkeypatch.setattr(save_module, "MAX_CHUNK_BYTES", 64)
    draw = torch.Generator().manual_seed(1)
    state = {
        "model/layers.10.mlp.up.weight": torch.randn(20, 9, generator=draw),
        "model/layers.2.mlp.up.weight": torch.randn(7, 5, generator=draw).bfloat16(),
        "model/bad": torch.tensor([1.0, math.nan, -3.0, math.inf, 0.0, -math.inf]),
        "model/f": torch.ones(3).to(torch.float8_e4m3fn),
    }
    return open_step(save(tmp_path, 1, pieces=whole(state), objects={}, control=Control(0, 1))), state


@pytest.mark.parametrize("name", ["model/layers.10.mlp.up.weight", "model/layers.2.mlp.up.weight"])
def test_numbers_equal_torch(saved: tuple[StepReader, dict[str, torch.Tensor]], name: str) -> None:
    reader, state = saved
    wide, found = state[name].double(), statistic(reader, name)
    assert found is not None and found.num_elements == wide.numel() and found.num_bad == 0
    pairs = (
        (found.norm, wide.norm()),
        (found.mean, wide.mean()),
        (found.deviation, wide.std(correction=0)),
        (found.smallest, wide.min()),
        (found.largest, wide.max()),
    )
    for ours, theirs in pairs:
        assert ours == pytest.approx(theirs.item(), rel=1e-12, abs=1e-12)


def test_what_is_not_finite_is_counted_apart(saved: tuple[StepReader, dict[str, torch.Tensor]]) -> None:
    found = statistic(saved[0], "model/bad")
    assert found is not None
    assert (found.num_elements, found.num_bad, found.num_zeros) == (6, 3, 1)
    assert found.norm == pytest.approx(math.sqrt(10)) and (found.smallest, found.largest) == (-3.0, 1.0)
    assert statistic(saved[0], "model/f") is None


def test_a_histogram_holds_every_finite_element(saved: tuple[StepReader, dict[str, torch.Tensor]]) -> None:
    lines = histogram(saved[0], "model/layers.10.mlp.up.weight").splitlines()
    assert lines[0].endswith("180 elements, 0 not finite")
    assert sum(int(line.split()[-1]) for line in lines[1:]) == 180
    assert max(line.count("#") for line in lines) == 40
    assert "no finite values" in histogram(saved[0], "model/f")


def test_the_tool_prints_them(
    saved: tuple[StepReader, dict[str, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(saved[0].path)
    assert main([path, "--stats"]) == 0
    text = capsys.readouterr().out
    assert text.index("layers.2.mlp") < text.index("layers.10.mlp") and "not finite" in text
    assert "layers.*.mlp" in text  # parameters by module
    assert main([path, "--histogram", "model/bad"]) == 0
    assert "3 not finite" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"no tensor model/bat(.|\n)*model/bad"):
        main([path, "--histogram", "model/bat"])


def test_a_config_is_compared_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, control = {"model/w": torch.ones(2)}, Control(0, 1)
    texts = ("optim:\n  lr: 0.1\nrun:\n  seed: 1\n", "optim:\n  lr: 0.2\nrun:\n  seed: 1\n")
    paths = [
        str(save(tmp_path / str(n), 1, pieces=whole(state), objects={"config": text}, control=control))
        for n, text in enumerate(texts)
    ]
    assert main([paths[0], "--diff", paths[1]]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["object config: - optim.lr: 0.1", "object config: + optim.lr: 0.2"]
