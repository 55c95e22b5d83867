"""`python -m megads verify`: what it says and how it ends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megads.errors import ConfigError
from megads.optim.zero import NativeEngine
from megads.verify import measure
from megads.verify.command import main

CONFIG = """\
run: {steps: 10}
model: {family: llama, layers: 4, hidden: 256, heads: 8, kv_heads: 4}
batch: {global: 32}
data: {train: none, tokenizer: none, sequence_length: 512}
optim: {lr: 1e-3, clip: 0.5}
"""
MODULES = ("embedding.word", "layers.0.attention.qkv", "layers.2.mlp.down", "head.norm", "head.output")


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_equal_layouts_end_with_0_and_a_row_a_module(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    layouts = ["--layout", "tensor=2,sequence=true", "--layout", "data=2,zero_stage=1,precision=fp32"]
    assert main([config, *layouts, "--steps", "2"]) == 0
    text = capsys.readouterr().out
    assert "tensor=2,sequence=true: equals one process (2 ranks, fp64, 2 steps" in text
    assert "data=2,zero_stage=1,precision=fp32: equals one process (2 ranks, fp32, 2 steps" in text
    for module in MODULES:
        assert text.count(f"  {module} ") == 2
    assert "differs" not in text
    assert "1e-12" in text and "1e-05" in text


def test_low_precision_has_the_bound_of_one_process(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--layout", "tensor=2,precision=bf16", "--layout", "data=2,precision=fp16"]) == 0
    assert "fp16, 3 steps" in capsys.readouterr().out


def test_a_config_with_plain_sgd(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--layout", "data=2,precision=fp32", "--steps", "2", "optim.name=sgd"]) == 0


def test_a_config_with_muon(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    groups = 'optim.groups=[{match: "*.bias", lr_scale: 2.0}]'
    layouts = ["--layout", "tensor=2,pipeline=2,zero_stage=1", "--layout", "data=2,zero_stage=2,precision=fp32"]
    assert main([config, *layouts, "--steps", "2", "optim.name=muon", groups]) == 0


def test_the_configs_own_layout(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--steps", "1", "parallel.pipeline=2", "optim.zero_stage=1"]) == 0
    assert "the config's own layout: equals one process (4 ranks" in capsys.readouterr().out


def test_a_difference_ends_with_1_and_comes_first(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = measure.synthetic_batch

    def shifted(config: Any, step: int, *, masks: Any) -> Any:
        """Batches that depend on the layout."""
        return batch(config, step + config.parallel.tensor, masks=masks)

    monkeypatch.setattr(measure, "synthetic_batch", shifted)
    assert main([config, "--layout", "tensor=2", "--steps", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tensor=2: differs from one process")
    assert lines[1].startswith("  first:  embedding.word: output in the forward of step 1")
    assert lines[2].startswith("  likely: ")


def test_a_dead_rank_ends_with_1(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = NativeEngine.step

    def die(self: NativeEngine, *, lr: float, guard: Any = None) -> Any:
        if self._mesh.rank == 1:
            os._exit(9)
        return step(self, lr=lr)

    monkeypatch.setattr(NativeEngine, "step", die)
    assert main([config, "--layout", "pipeline=2"]) == 1
    first = "\n".join(capsys.readouterr().out.splitlines()[:3])
    assert "pipeline=2: failed" in first
    assert "rank 1 of 2 failed" in first
    assert "exit code 9" in first


def test_save_steps_loads_in_one_process_and_elsewhere(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    layouts = ["--layout", "tensor=2,pipeline=2", "--layout", "data=2,zero_stage=1"]
    assert main([config, *layouts, "--steps", "1", "--save-steps"]) == 0
    text = capsys.readouterr().out
    for name in ("one process", "tensor=2,pipeline=2", "data=2,zero_stage=1"):
        assert f"saved, loaded by {name}: the same bits, and the same next step" in text


def _forget_the_weights(self: NativeEngine, scalars: Mapping[str, Any]) -> None:
    """Moments and masters are loaded, the weights of the forward are not made of them."""
    for bucket in self._all:
        bucket.move(bucket.values.clone().mul_(1.5))


def test_save_steps_sees_what_a_load_forgets(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NativeEngine, "load_scalars", _forget_the_weights)
    assert main([config, "--layout", "tensor=2", "--steps", "2", "--save-steps"]) == 1
    assert "saved, loaded by one process: state of the optimizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--layout", "tensor=2", "model.heads=3.5"], "model.heads"),
        (["--layout", "tensor=100"], "100 ranks"),
        (["--layout", "expert=2"], "model.experts"),
        (["--layout", "pipeline=2,schedule=dualpipe"], "parallel.schedule"),
        (["--steps", "0"], "--steps"),
    ],
)
def test_a_wrong_input_is_told_before_ranks_exist(config: str, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        main([config, *words])
