"""What recompute frees, and that reductions start inside the backward: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.optim.zero import NativeEngine
from megads.parallel.layout import Layout
from megads.parallel.mesh import build_mesh
from tests.parity.harness import GLOBAL_BATCH, VOCAB, Case, Model, make_batch, make_config
from tests.ranks import run_ranks


def kept_bytes(recompute: Any) -> int:
    """Bytes that autograd keeps of one forward, weights aside."""
    config = make_config(Model("llama"), Case(micro=28, recompute=recompute), precision="fp32")
    mesh = build_mesh(Layout(), 0)
    model = build_model(config, mesh, vocab=VOCAB)
    weights = {parameter.data_ptr() for parameter in model.parameters}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    payload: tuple[torch.Tensor, ...] = ()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        for block in model.stages[0]:
            payload = block(payload, make_batch(1)).payload
    return sum(kept.values())


def test_recompute_keeps_less() -> None:
    nothing, parts, whole = kept_bytes("none"), kept_bytes(("mlp",)), kept_bytes("full")
    assert whole < 0.5 * nothing
    assert whole < parts < nothing


@pytest.mark.parametrize(
    "case", [Case(data=2, micro=2, bucket=3000), Case(pipeline=2, data=2, zero=1, micro=2)], ids=str
)
def test_buckets_are_reduced_inside_the_last_backward(case: Case) -> None:
    config = make_config(Model("llama"), case, precision="fp32")

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        model = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, model, mesh=mesh)
        assert isinstance(engine, NativeEngine)
        executor = build_executors(config, model, mesh=mesh).train
        rows = GLOBAL_BATCH // mesh.layout.data
        batch = make_batch(1).rows(mesh.group("dp").rank * rows, (mesh.group("dp").rank + 1) * rows)
        train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
        return engine.num_early_reductions

    assert min(run_ranks(work, case.world_size)) > 0
