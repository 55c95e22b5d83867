"""A small DeepSeek-V3 (latent attention, experts, multi-token prediction) learns on 8 ranks and keeps experts busy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megads.log import read_metrics
from tests.distributed.job import ROOT, command, make_corpus, make_tokenizer

TEXT = ROOT.parent / "shared" / "data"
STEPS, LAST = 300, 100  # in all, and those over which loads are looked at
VOCAB = 9000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and corpora of several languages."""
    if not TEXT.is_dir():
        pytest.skip("needs the corpora beside the checkout")
    path = tmp_path_factory.mktemp("deepseek")
    make_tokenizer(path / "tokenizer.model", TEXT / "train", size=VOCAB)
    for name in ("train", "valid"):
        make_corpus(path / name, path / "tokenizer.model", [TEXT / name])
    return path


def unigram_bits(prefix: Path) -> float:
    """Bits per byte of a corpus by the frequencies of its own tokens: no model without context does better."""
    counts = np.bincount(np.fromfile(prefix.with_suffix(".bin"), dtype=np.uint16)).astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    text_bytes = json.loads(prefix.with_suffix(".json").read_text())["text_bytes"]
    return float(-(shares * np.log2(shares)).sum() * counts.sum() / text_bytes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_learns_more_than_frequencies_and_balances(place: Path) -> None:
    keys = (
        "data.train=train",
        "data.valid=valid",
        "data.tokenizer=tokenizer.model",
        f"run.stop_after={STEPS}",
    )
    config = str(ROOT / "configs/quickstart-deepseek.yaml")
    line = [
        sys.executable,
        "-m",
        "megads",
        "launch",
        "--nproc",
        "8",
        "--",
        "train",
        config,
        "run.dir=run",
        *keys,
    ]
    done = subprocess.run(
        line,
        cwd=place,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = command(place, "evaluate", "run", "--data", "valid", "--json")
    assert told.code == 0, told.errors
    found, bound = json.loads(told.said)["bits_per_byte"], unigram_bits(place / "valid")
    print(f"{found:.3f} bits per byte; {bound:.3f} by frequencies")
    assert found < 0.8 * bound
    records = read_metrics(place / "run" / "metrics.jsonl")[-LAST:]
    loads = [key for key in records[0] if key.endswith(("/load_max", "/load_min"))]
    assert {key.split("/")[0] for key in loads} == {
        "layers.1",
        "layers.2",
        "layers.3",
        "layers.4",
    }  # 4: ahead
    for key in loads:
        mean = sum(record[key] for record in records) / LAST
        assert 0.5 <= mean <= 2.0, (key, mean)
