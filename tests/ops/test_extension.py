"""Loading compiled code: found, absent, damaged; and what its operators say to torch.compile."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from megads.ops import extension
from megads.ops.norm import RMS_NORM

needs_library = pytest.mark.skipif(not extension.LIBRARY.is_file(), reason="csrc is not built")


@pytest.fixture(autouse=True)
def _heard() -> None:
    logging.getLogger("megads").propagate = True


def test_nothing_is_loaded_with_megads() -> None:
    code = "import torch, megads.ops.norm, megads.ops.attention; print(len(torch.ops.loaded_libraries))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"


def test_an_absent_library_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="megads.ops"):
        assert not extension.load(tmp_path / "none.so")
        assert not extension.load(tmp_path / "none.so")
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "build_ext" in caplog.text


@pytest.mark.parametrize("content", [b"", b"\x7fELF nonsense", b"text"])
def test_a_damaged_library_is_a_warning_with_the_reason(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(content)
    assert not extension.load(path)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()


def test_an_apex_without_kernels_is_not_taken() -> None:
    assert not extension.has_apex()


@needs_library
def test_the_library_loads_without_a_gpu() -> None:
    assert extension.has_csrc()
    schema = str(torch.ops.megads.rms_norm_backward.default._schema)
    assert schema.endswith("(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)")


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operators_have_shapes_without_values(dtype: torch.dtype) -> None:
    assert extension.has_csrc()
    with FakeTensorMode(), torch.no_grad():
        x, weight = (
            torch.empty(3, 5, 64, dtype=dtype, device="cuda"),
            torch.empty(64, dtype=dtype, device="cuda"),
        )
        y, rstd = torch.ops.megads.rms_norm_forward(x, weight, 1e-5)
        dx, dweight = torch.ops.megads.rms_norm_backward(y, x, weight, rstd)
    assert (y.shape, y.dtype, dx.shape, dx.dtype) == (x.shape, dtype, x.shape, dtype)
    assert (rstd.shape, rstd.dtype, dweight.shape) == ((15,), torch.float32, (64,))


@needs_library
def test_norm_on_the_operators_has_torchs_gradients_also_compiled() -> None:
    """With stand-ins for the kernels on the CPU: what is saved, the order of gradients, one graph under compile."""
    assert extension.has_csrc()

    def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        rstd = (x.square().mean(-1) + eps).rsqrt()
        return x * rstd[..., None] * weight, rstd.flatten()

    def backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor):
        r, g = rstd.view(*x.shape[:-1], 1), dy * weight
        return r * g - x * r**3 * (g * x).mean(-1, keepdim=True), (dy * x * r).flatten(0, -2).sum(0)

    library = torch.library.Library("megads", "IMPL", "CPU")
    library.impl("rms_norm_forward", forward)
    library.impl("rms_norm_backward", backward)
    run = next(i.run for i in RMS_NORM.implementations if i.name == "csrc")
    x, weight = torch.randn(3, 4, 8).transpose(0, 1).requires_grad_(), torch.randn(8, requires_grad=True)
    flow = torch.randn(4, 3, 8)
    expected = torch.autograd.grad(F.rms_norm(x, (8,), weight, 1e-5), (x, weight), flow)
    for norm in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        gradients = torch.autograd.grad(norm(x, weight, 1e-5), (x, weight), flow)
        for got, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(got, wanted)
    library._destroy()
