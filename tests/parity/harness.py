"""Layouts and tiny models for tests of what must not depend on the layout.

Training, batches and the comparison are those of `python -m megads verify` (megads/verify/).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from megads.assemble.wiring import layout_of
from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.parallel import ParallelConfig
from megads.config.root import Config
from megads.config.run import RunConfig
from megads.data.sequence import Batch
from megads.parallel.control import Control
from megads.parallel.mesh import Mesh, build_mesh
from megads.verify import outcome
from megads.verify.batch import synthetic_batch
from megads.verify.compare import BOUNDS, compare
from megads.verify.measure import record
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
    stage_layers: tuple[int, ...] | None = None
    offload: bool = False
    loss_chunk: int | None = None
    pieces: int = 1
    optim: Any = None  # more keys of the section

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
    gradients: dict[str, torch.Tensor]  # of step 1, before clipping
    final: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    measured: outcome.Outcome


@dataclass(frozen=True)
class Model:
    """Which model is run."""

    family: str = "gpt"
    tied: bool | None = None
    dropout: float = 0.0
    layers: int = 3  # not divisible by the stages
    kv_heads: int = 4  # of llama and qwen
    seq: int = SEQ
    documents: bool = False  # attention stays inside of them, positions restart
    overrides: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)  # what the objective is, say


def make_config(model: Model, case: Case, *, precision: str) -> Config:
    has_groups = model.family in ("llama", "qwen2", "qwen3", "qwen3_moe")
    return Config(
        run=RunConfig(steps=100, seed=7),
        model=ModelConfig(
            family=model.family,
            layers=model.layers,
            hidden=64,
            heads=8,
            kv_heads=model.kv_heads if has_groups else None,
            ffn=48,
            vocab=VOCAB,
            tied=model.tied,
            dropout=model.dropout,
            attention_dropout=model.dropout,
            **model.overrides,
        ),
        batch=BatchConfig(global_size=GLOBAL_BATCH, micro=case.micro),
        data=DataConfig(
            train="unused", tokenizer="unused", sequence_length=model.seq, document_mask=model.documents
        ),
        optim=OptimConfig(
            lr=1e-3,
            betas=(BETA1, 0.95),
            clip=0.5,
            precision=precision,
            zero_stage=case.zero,
            engine=case.engine,
            bucket_elements=case.bucket,
            **(case.optim or {}),
            **model.optim,
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
            stage_layers=case.stage_layers,
            offload=case.offload,
            loss_chunk=case.loss_chunk,
            sequence_pieces=case.pieces,
        ),
    )


def make_batch(step: int, *, seq: int = SEQ, documents: bool = False) -> Batch:
    """The global batch of a step: skewed tokens, masks whose sizes differ between samples by a factor of 20."""
    config = make_config(Model(seq=seq, documents=documents), Case(), precision="fp64")
    return synthetic_batch(config, step)


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

    def work(rank: int, size: int) -> outcome.RankResult:
        control = Control(rank, size, torch.distributed.group.WORLD if size > 1 else None)
        if before is not None:
            before(build_mesh(layout_of(config, size), rank))
        return record(config, control, steps=steps)

    found = outcome.merge(run_ranks(work, case.world_size))
    assert not found.disagreements, f"ranks disagree: {found.disagreements}"
    assert not found.misplaced, f"elements missing or written twice: {found.misplaced}"
    initial, gradients, final = (
        {name: torch.from_numpy(values) for name, values in whole.items()}
        for whole in (found.initial, found.gradients, found.final)
    )
    return Outcome(initial, gradients, final, found.losses, found.norms, found)


def gradient_error(got: Outcome, reference: Outcome) -> dict[str, float]:
    """For each fused part |dg| / max(|g|, 1e-4 x global norm), in float64."""
    assert got.gradients.keys() == reference.gradients.keys()
    found = compare(got.measured, reference.measured, bounds=BOUNDS["fp64"])
    return {row.name: row.gradient for row in found.rows if row.parameter in got.gradients}
