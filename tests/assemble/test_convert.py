"""The flow around every conversion: names shown before, bounded memory, whole or not at all, the right weights."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megads.assemble import compare as comparing
from megads.assemble import export_hf
from megads.assemble.convert import main, open_origin
from megads.assemble.export_deepspeed import export_deepspeed
from megads.assemble.export_megatron import MegatronLayout, export_megatron
from megads.assemble.import_checkpoint import import_checkpoint
from megads.assemble.origin import Hints
from megads.checkpoint import hf
from megads.checkpoint.store import Store
from megads.errors import CheckpointError
from megads.model.catalog import HUGGING_FACE
from tests.assemble.models import Sample, save_step, to_hf

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
WRITERS: dict[str, Any] = {
    "hf": export_hf.export_hf,
    "megads": import_checkpoint,
    "megatron": partial(export_megatron, layout=MegatronLayout(tensor=2)),
    "deepspeed": export_deepspeed,
}


@pytest.mark.parametrize("to", WRITERS)
def test_a_dry_run_names_every_tensor_and_writes_nothing(
    to: str, tmp_path: Path, hf_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_step(tmp_path / "run", Sample("llama", kv_heads=2), hf_tokenizer)
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", to, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^model/{re.escape(n)} +{re.escape(n)} ", said, re.M) for n in weights)
    names = {
        "hf": "q_proj",
        "megatron": "linear_qkv.layer_norm_weight",
        "deepspeed": "k_proj",
        "megads": "qkv",
    }
    assert names[to] in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("to", WRITERS)
def test_an_average_can_be_exported_in_place_of_the_weights(
    to: str, tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "has_transformers", lambda: False)
    weights = save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer, has_moments=True, average="ema_0.999")
    origin = open_origin(tmp_path / "run", Hints())
    WRITERS[to](origin, tmp_path / "out", weights="ema_0.999")
    again = open_origin(tmp_path / "out", Hints(vocab=411))
    found = again.weights("model")
    assert all(torch.equal(found[name].whole(), values / 2) for name, values in weights.items())
    assert "optim" not in again.objects
    assert not any(name.startswith("optim/") for name in again.tensors)
    with pytest.raises(CheckpointError, match=r"holds no weights ema_0\.5\n.*allowed: ema_0\.999, model"):
        WRITERS[to](origin, tmp_path / "other", weights="ema_0.5")


class Dies(Store):
    """Kills the process at its k-th storage call that changes something."""

    def __init__(self, k: int) -> None:
        self.left = k

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, handle: int, data: Any) -> int:
        self._count()
        return super().write(handle, data)

    def sync(self, handle: int) -> None:
        self._count()
        super().sync(handle)

    def make_directory(self, path: Path) -> None:
        self._count()
        super().make_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)


def _convert(to: str, source: Path, target: Path, k: int) -> None:
    hf.has_transformers = lambda: False  # type: ignore[assignment]  # of this process alone
    WRITERS[to](open_origin(source, Hints()), target, store=Dies(k))


@pytest.mark.parametrize("to", WRITERS)
def test_a_killed_conversion_leaves_nothing_that_looks_complete(
    to: str, tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save_step(tmp_path / "run", Sample("gpt", layers=2), hf_tokenizer)
    target = tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    for k in (1, 2, 5, 11, 17):
        process = fork.Process(target=_convert, args=(to, tmp_path / "run", target, k))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, k
        assert not target.exists()
    monkeypatch.setattr(hf, "has_transformers", lambda: False)
    WRITERS[to](open_origin(tmp_path / "run", Hints()), target)
    again = open_origin(target, Hints(vocab=411))
    assert all(torch.equal(again.weights("model")[n].whole(), t) for n, t in weights.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]


def test_nothing_is_written_through_a_link(tmp_path: Path, hf_tokenizer: Path) -> None:
    save_step(tmp_path / "run", Sample("gpt", layers=1), hf_tokenizer)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    assert main([str(tmp_path / "run"), str(tmp_path / "out"), "--to", "megatron"]) == 2
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert main([str(tmp_path / "run"), str(tmp_path / "dangling"), "--to", "megatron"]) == 2
    (tmp_path / ".tmp-new").symlink_to(tmp_path / "elsewhere")
    assert main([str(tmp_path / "run"), str(tmp_path / "new"), "--to", "megatron"]) == 0
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(not hf.has_transformers(), reason="transformers is not installed")
def test_the_first_layer_that_differs_is_named(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = save_step(tmp_path / "run", Sample("llama", layers=4), hf_tokenizer)
    origin = open_origin(tmp_path / "run", Hints())
    good = comparing.compare

    def spoiled(*args: Any, read: Any, **kwargs: Any) -> comparing.Comparison:
        def other(name: str) -> torch.Tensor:
            return read(name) * (2 if name == "layers.2.mlp.down.weight" else 1)

        return good(*args, read=other, **kwargs)

    report = export_hf.export_hf(origin, tmp_path / "right")
    assert report.comparison is not None
    assert list(report.comparison.layers) == ["embedding", "layers.0", "layers.1", "layers.2"]
    assert all(layer.is_rounding for layer in report.comparison.layers.values())
    monkeypatch.setattr(export_hf, "compare", spoiled)
    with pytest.raises(CheckpointError, match=r"the first that differs: layers\.2"):
        export_hf.export_hf(origin, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert "layers.2.mlp.down.weight" in weights


def test_a_config_that_says_something_else_is_refused(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The args of the Megatron run are read back; they must be those of the model."""
    save_step(tmp_path / "run", Sample("gpt"), hf_tokenizer)
    origin = open_origin(tmp_path / "run", Hints())
    from megads.assemble import export_megatron as module

    right = module.args_of
    monkeypatch.setattr(module, "args_of", lambda *a, **k: right(*a, **k) | {"norm_epsilon": 1e-3})
    with pytest.raises(CheckpointError, match="another model"):
        export_megatron(origin, tmp_path / "out", layout=MegatronLayout())
    family = replace(HUGGING_FACE["gpt"], rows=HUGGING_FACE["gpt"].rows[:-4])
    monkeypatch.setattr(export_hf, "HUGGING_FACE", {"gpt": family})
    with pytest.raises(CheckpointError, match="leave out"):
        export_deepspeed(origin, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MEASURE = """
import sys, threading, time
from pathlib import Path
from megads.assemble.convert import main
from megads.checkpoint import hf
hf.has_transformers = lambda: False
import safetensors

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10

peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], private())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
for chain in sys.argv[1:]:
    source, target, to = chain.split()
    before = peak[0] = private()
    if main([source, target, "--to", to, "--vocab", "411"]):
        sys.exit(1)
    print("GREW", to, peak[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone says how memory grows")
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_model(
    tmp_path: Path, hf_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "has_transformers", lambda: False)
    monkeypatch.setattr("tests.assemble.models.HIDDEN", 512)
    save_step(tmp_path / "run", Sample("llama", layers=24), hf_tokenizer)
    to_hf(tmp_path / "run", tmp_path / "hf", dtype=torch.bfloat16)
    origin = open_origin(tmp_path / "run", Hints())
    weights = origin.weights("model").values()
    model, largest = sum(v.size for v in weights), max(v.size for v in weights)
    assert model > 25 * largest
    chain = (
        ("hf", "back", "megads"),
        ("back", "meg", "megatron"),
        ("meg", "uni", "deepspeed"),
        ("uni", "hf2", "hf"),
    )
    arguments = [f"{tmp_path / source} {tmp_path / target} {to}" for source, target, to in chain]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    grew = {to: int(size) for to, size in re.findall(r"GREW (\w+) (\d+)", done.stdout)}
    assert grew.keys() == WRITERS.keys()
    assert max(grew.values()) < 4 * largest + (16 << 20) < model / 2, (grew, largest, model)
    bits = open_origin(tmp_path / "hf2", Hints()).weights("model")
    assert all(
        torch.equal(v.whole(), bits[n].whole())
        for n, v in open_origin(tmp_path / "back", Hints()).weights("model").items()
    )
