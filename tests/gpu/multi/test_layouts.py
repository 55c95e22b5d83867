"""Layouts on all GPUs of this host over NCCL: each equals one float64 process (the matrix is in `job.py`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
NUM_GPUS = next((n for n in (8, 4, 2) if n <= torch.cuda.device_count()), 1)


@pytest.mark.gpu
@pytest.mark.timeout(580)
@pytest.mark.skipif(NUM_GPUS < 2, reason="needs 2, 4 or 8 GPUs")
def test_every_layout_equals_one_process() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_GPUS}"]
    done = subprocess.run([*command, "-m", "tests.gpu.multi.job"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal" in done.stdout
    assert "DIFFERENT" not in done.stdout
