"""On a GPU: overlapped pairs on streams of their own, and activations in the host's memory, change no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.layers import offload
from megads.parallel.mesh import build_mesh
from tests.parity.harness import VOCAB, Case, Model, make_batch, make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def run(
    family: str, case: Case, *, device: str = "cuda", precision: str = "fp64"
) -> list[tuple[float, float]]:
    """Losses and gradient norms of three steps."""
    config = make_config(Model(family, dropout=0.1, layers=6), case, precision=precision)
    mesh = build_mesh(layout_of(config, 1), 0, device=torch.device(device))
    model = build_model(config, mesh, vocab=VOCAB)
    engine = build_engine(config, model, mesh=mesh)
    executor = build_executors(config, model, mesh=mesh).train
    model.train()
    found = []
    for step in (1, 2, 3):
        batch = make_batch(step).to(mesh.device)
        result = train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
        found.append((result.loss.item(), result.report.grad_norm.item()))
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[float, float]]]:
    """What one process makes of it on the CPU, by family."""
    return {family: run(family, Case(micro=4), device="cpu") for family in ("gpt", "llama")}


def check(found: list[tuple[float, float]], expected: list[tuple[float, float]], bound: float) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted, rel=bound)


@pytest.mark.parametrize("recompute", ["none", "full", ("norm", "activation")], ids=str)
@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("schedule", ["zbv", "dualpipe_v"])
def test_split_and_overlapped_backwards(
    schedule: str, family: str, recompute: Any, expected: dict[str, list[tuple[float, float]]]
) -> None:
    case = Case(micro=4, schedule=schedule, chunks=2, recompute=recompute, loss_chunk=16)
    for _ in range(2):  # a race shows now and then
        check(run(family, case), expected[family], 1e-11)


@pytest.mark.parametrize("recompute", ["none", "full", ("norm",)], ids=str)
@pytest.mark.parametrize("schedule", ["gpipe", "dualpipe_v"])
def test_offload(
    schedule: str,
    recompute: Any,
    expected: dict[str, list[tuple[float, float]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offload, "MIN_BYTES", 0)
    chunks = 2 if schedule == "dualpipe_v" else 1
    for _ in range(2):
        case = Case(micro=4, schedule=schedule, chunks=chunks, recompute=recompute, offload=True)
        check(run("llama", case), expected["llama"], 1e-11)


def test_offload_frees_the_device() -> None:
    """Of twelve layers at most a few keep anything on the device after a forward."""

    def kept(offloads: bool) -> int:
        model = Model("llama", layers=12, overrides={"init_std": 0.02})
        config = make_config(model, Case(micro=28, offload=offloads), precision="fp32")
        mesh = build_mesh(layout_of(config, 1), 0, device=torch.device("cuda"))
        blocks = build_model(config, mesh, vocab=VOCAB).stages[0]
        batch, payload = make_batch(1).to(mesh.device), blocks[0]((), make_batch(1).to(mesh.device)).payload
        wide = tuple(t.detach().repeat(64, 1, 1).requires_grad_() for t in payload)
        rows = type(batch)(
            tokens=batch.tokens.repeat(1, 64),
            labels=batch.labels.repeat(1, 64),
            mask=batch.mask.repeat(1, 64),
            positions=batch.positions.repeat(1, 64),
            document_ids=None,
            samples=batch.samples,
            step=1,
        )
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for block in list(blocks)[1:-1]:
            wide = block(wide, rows).payload
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before

    assert kept(True) < 0.3 * kept(False)
