"""Benchmarks run to their table without a GPU, in small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("module", "lines"),
    [
        ("norm", ("rms_norm, float32", "64x256", "aten", "reference", "of floor")),
        ("step", ("tiny-gpt bf16", "tiny-llama fp32", "plain", "tokens/s", "MFU causal/full %")),
        ("experts", ("tiny   y grouped_mm", "dW loop", "layer loop", "tok/s", "of peak")),
        ("context", ("256 x 4/2 x 8", "blocks of 4", "of ideal")),
        ("small_gpu", ("plain, no limit", "bf16 moments", "offload, cheap recompute", "1.00x", "gpt2-1.3b-24gb.yaml")),
        ("memory", ("tiny-llama", "norm, activation", "full recompute saves", "the claim: about 65%")),
        ("generate", ("tiny", "tiny-latent", "64+8", "tok/s without", "speed-up", "4/4")),
        ("precision", ("tiny-gpt: 4 rows of 16", "fp32", "bf16", "1.00x", "0.00%", "bar 2.3x")),
    ],
)
def test_a_benchmark_ends_with_its_table(module: str, lines: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", f"tools.bench.{module}", "--device", "cpu", "--tiny"]
    command += ["--dtype", "float32"] if module == "norm" else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("\ncommand:") :]
    assert f"python -m tools.bench.{module} --device cpu --tiny" in table
    assert "torch " in table
    missing = [line for line in lines if line not in table]
    assert not missing, table


def test_the_loader_is_measured_beside_training() -> None:
    command = [sys.executable, "-m", "tools.bench.loader", "configs/quickstart.yaml", "--synthetic", "0.1"]
    command += [
        "--device",
        "cpu",
        "--repeats",
        "2",
        "--steps",
        "1",
        "model.vocab=256",
        "data.packing=best_fit",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.rindex("\ncommand:") :]
    assert "16 samples of 128 tokens a step, best_fit, 1 corpora of 0 M tokens" in table, table
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[4:]}
    assert list(rows)[-4:] == ["gather", "loader", "prefetch", "training"]
    assert float(rows["loader"][2]) > 1 == float(rows["training"][2])


@pytest.mark.slow
def test_several_ranks_end_with_their_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.bench.multi_gpu", "--nproc", "2", "--tiny"]
    command += ["--only", "2", "--save", str(tmp_path / "collectives.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("collective, bus GB/s by MiB", "all_to_all", "DP2 ZeRO-1", "PP2 gpipe", "predicted ms"):
        assert line in done.stdout
    assert "failed" not in done.stdout
    assert (tmp_path / "collectives.json").stat().st_size > 1000
