"""Run a tiny model under a layout on real ranks and bring back what must not depend on the layout.

The weights, moments and so the gradients of step 1 come out as the pieces that a checkpoint would get, so a
piece that is missing, doubled or misplaced is seen here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megads.assemble.step import train_step
from megads.assemble.wiring import build_engine, build_executors, build_model, layout_of
from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.parallel import ParallelConfig
from megads.config.root import Config
from megads.config.run import RunConfig
from megads.data.sequence import Batch
from megads.parallel.mesh import Mesh, build_mesh
from megads.parallel.parameter import Piece
from tests.ranks import run_ranks

GLOBAL_BATCH = 28  # 7 micro-batches under every data-parallel degree
SEQ = 10
VOCAB = 53  # prime: no tensor-parallel degree divides it
BETA1 = 0.9


@dataclass(frozen=True)
class Case:
    """A layout and what else may not change the result."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    context_kind: str = "ring"
    expert: int = 1
    expert_tensor: int | None = None
    schedule: str = "one_f_one_b"
    zero: int = 0
    engine: str = "native"
    micro: int = 1
    bucket: int = 25_000_000
    sequence: bool = False
    chunks: int = 1
    recompute: Any = "none"
    recompute_layers: int | None = None
    offload: bool = False
    loss_chunk: int | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.context * self.pipeline * self.data

    def __str__(self) -> str:
        changed = [
            f"{f.name}{getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return "-".join(changed) or "one"


@dataclass(frozen=True)
class Outcome:
    """What came out: global tensors by name, losses and gradient norms by step."""

    initial: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]  # of step 1, after clipping
    final: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]


@dataclass(frozen=True)
class Model:
    """Which model is run."""

    family: str = "gpt"
    tied: bool | None = None
    dropout: float = 0.0
    layers: int = 3  # not divisible by the stages
    seq: int = SEQ
    documents: bool = False  # attention stays inside of them, positions restart
    overrides: dict[str, Any] = field(default_factory=dict)


def make_config(model: Model, case: Case, *, precision: str) -> Config:
    llama = model.family == "llama"
    return Config(
        run=RunConfig(steps=100, seed=7),
        model=ModelConfig(
            family=model.family,
            layers=model.layers,
            hidden=64,
            heads=8,
            kv_heads=4 if llama else None,
            ffn=48,
            tied=model.tied,
            dropout=model.dropout,
            attention_dropout=model.dropout,
            **model.overrides,
        ),
        batch=BatchConfig(global_size=GLOBAL_BATCH, micro=case.micro),
        data=DataConfig(train="unused", tokenizer="unused", sequence_length=model.seq),
        optim=OptimConfig(
            lr=1e-3,
            betas=(BETA1, 0.95),
            clip=0.5,
            precision=precision,
            zero_stage=case.zero,
            engine=case.engine,
            bucket_elements=case.bucket,
        ),
        parallel=ParallelConfig(
            tensor=case.tensor,
            context=case.context,
            context_kind=case.context_kind,
            expert=case.expert,
            expert_tensor=case.expert_tensor,
            pipeline=case.pipeline,
            schedule=case.schedule,
            sequence=case.sequence,
            virtual_stages=case.chunks,
            recompute=case.recompute,
            recompute_layers=case.recompute_layers,
            offload=case.offload,
            loss_chunk=case.loss_chunk,
        ),
    )


def make_batch(step: int, *, seq: int = SEQ, documents: bool = False) -> Batch:
    """The global batch of a step: skewed tokens, masks whose sizes differ between samples by a factor of 20."""
    generator = torch.Generator().manual_seed(100 + step)
    draw = torch.rand(GLOBAL_BATCH, seq + 1, generator=generator)
    tokens = (VOCAB * draw**3).long()
    shares = torch.linspace(0.05, 1.0, GLOBAL_BATCH)[:, None]
    mask = torch.rand(GLOBAL_BATCH, seq, generator=generator) < shares
    places = torch.arange(seq).expand(GLOBAL_BATCH, seq)
    begins = (torch.rand(GLOBAL_BATCH, seq, generator=generator) < 0.15) & (places > 0)
    if documents:
        places = places - torch.where(begins, places, 0).cummax(dim=1).values
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        mask=mask,
        positions=places,
        document_ids=begins.cumsum(dim=1) if documents else None,
        samples=torch.arange(GLOBAL_BATCH),
        step=step,
    )


def _copies(pieces: tuple[Piece, ...]) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    return [(p.name, p.shape, p.box.slices, p.tensor.clone()) for p in pieces]


def assemble(parts: list[Any]) -> dict[str, torch.Tensor]:
    """Global tensors from every rank's pieces; fails unless each element is there exactly once."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, shape, slices, values in part:
            whole.setdefault(name, torch.zeros(shape, dtype=values.dtype))[slices] = values
            seen.setdefault(name, torch.zeros(shape, dtype=torch.int8))[slices] += 1
    wrong = [name for name, count in seen.items() if not bool((count == 1).all())]
    assert not wrong, f"elements missing or written twice: {wrong}"
    return whole


def run_case(
    model: Model,
    case: Case,
    *,
    precision: str,
    steps: int = 5,
    before: Callable[[Mesh], None] | None = None,
) -> Outcome:
    """Train `steps` steps under the layout; `before` may break something in each rank first (mutation tests)."""
    config = make_config(model, case, precision=precision)

    def work(rank: int, size: int) -> Any:
        mesh = build_mesh(layout_of(config, size), rank)
        if before is not None:
            before(mesh)
        trainee = build_model(config, mesh, vocab=VOCAB)
        engine = build_engine(config, trainee, mesh=mesh)
        executor = build_executors(config, trainee, mesh=mesh).train
        initial = _copies(engine.state())
        rows = GLOBAL_BATCH // mesh.layout.data
        dp_rank = mesh.group("dp").rank
        losses, norms, first = [], [], []
        for step in range(1, steps + 1):
            batch = make_batch(step, seq=model.seq, documents=model.documents).rows(dp_rank * rows, (dp_rank + 1) * rows)
            result = train_step(batch, executor=executor, engine=engine, mesh=mesh, lr=1e-3)
            losses.append(result.loss.item())
            norms.append(result.report.grad_norm.item())
            if step == 1:
                first = _copies(engine.state())
        return initial, first, _copies(engine.state()), losses, norms

    results = run_ranks(work, case.world_size)
    assert all(r[3] == results[0][3] and r[4] == results[0][4] for r in results), (
        "ranks disagree about the loss"
    )
    initial, first, final = (assemble([r[i] for r in results]) for i in range(3))
    gradients = {
        name.removeprefix("optim/exp_avg/"): values / (1.0 - BETA1)
        for name, values in first.items()
        if name.startswith("optim/exp_avg/")
    }
    return Outcome(
        {n: v for n, v in initial.items() if n.startswith("model/")},
        gradients,
        {n: v for n, v in final.items() if n.startswith("model/")},
        results[0][3],
        results[0][4],
    )


def gradient_error(got: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """For each fused part |dg| / max(|g|, 1e-4 x global norm), in float64."""
    assert got.keys() == reference.keys()
    total = sum(float(g.double().square().sum()) for g in reference.values()) ** 0.5
    errors = {}
    for name, expected in reference.items():
        num_parts = {"qkv": 3, "gate_up": 2}.get(name.split(".")[-2], 1)
        if num_parts == 3:
            kv = (expected.shape[0] - 64) // 2
            spans = [slice(0, 64), slice(64, 64 + kv), slice(64 + kv, None)]
        else:
            size = expected.shape[0] // num_parts
            spans = [slice(i * size, (i + 1) * size) for i in range(num_parts)]
        for number, span in enumerate(spans):
            g = expected[span].double()
            difference = (got[name][span].double() - g).norm().item()
            errors[f"{name}#{number}"] = difference / max(g.norm().item(), 1e-4 * total)
    return errors
