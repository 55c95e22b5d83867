"""Which engine has what: the cross-checks, asked about every combination, as a table for README.md.

    Choice (one combination) ---> config --rules--> legal?        rows: an engine, a stage, an offload, and the
                                                                        precisions, pipelines and experts it has

A row is a product: all its precisions with all its pipelines and experts. What is no product makes more rows.
`python tools/engine_table.py --write` puts the table into README.md; `tests/parity/test_engines.py` runs its choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby, product
from types import MappingProxyType
from typing import Literal

from pydantic import JsonValue

from megads.assemble.rules import findings
from megads.config.batch import BatchConfig
from megads.config.data import DataConfig
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.parallel import ParallelConfig
from megads.config.root import Config
from megads.config.run import RunConfig

BEGIN, END = "<!-- engines: begin -->", "<!-- engines: end -->"
"""What stands around the table in README.md."""

Engine = Literal["native", "deepspeed"]
Precision = Literal["fp64", "fp32", "bf16", "fp16"]

ENGINES: Mapping[Engine, tuple[str, ...]] = MappingProxyType(
    {"native": ("none", "state"), "deepspeed": ("none", "state", "state and weights")}
)
"""Engine -> what it may keep in the host's memory."""

OFFLOADS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"none": (), "state": ("offload_optimizer",), "state and weights": ("offload_optimizer", "offload_param")}
)
"""The keys of DeepSpeed for it; the native engine's is `optim.offload`."""

PRECISIONS: tuple[Precision, ...] = ("fp64", "fp32", "bf16", "fp16")

PIPELINES: Mapping[str, ParallelConfig] = MappingProxyType(
    {
        "none": ParallelConfig(),
        "whole backwards": ParallelConfig(pipeline=2),
        "interleaved": ParallelConfig(pipeline=2, virtual_stages=2, schedule="interleaved"),
        "split backwards": ParallelConfig(pipeline=2, schedule="zero_bubble_h1"),
    }
)

EXPERTS: Mapping[str, int] = MappingProxyType({"none": 0, "on every rank": 1, "dealt over ranks": 2})
"""How experts lie -> over how many ranks they are dealt; 0: a dense model."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One combination, in the words of the table."""

    engine: Engine
    zero_stage: int
    offload: str
    precision: Precision
    pipeline: str
    experts: str

    @property
    def num_ranks(self) -> int:
        """Two data-parallel replicas of the pipeline."""
        return 2 if self.pipeline == "none" else 4

    @property
    def config(self) -> Config:
        """A small model with it."""
        is_native = self.engine == "native"
        names = () if is_native else OFFLOADS[self.offload]
        sections: dict[str, JsonValue] = {name: {"device": "cpu"} for name in names}
        degree = EXPERTS[self.experts]
        return Config(
            run=RunConfig(steps=100, seed=7),
            model=ModelConfig(
                family="llama", layers=4, hidden=32, heads=4, ffn=48, vocab=53, experts=4 if degree else None
            ),
            batch=BatchConfig(global_size=16, micro=2),
            data=DataConfig(train="unused", tokenizer="unused", sequence_length=8),
            optim=OptimConfig(
                lr=1e-3,
                betas=(0.9, 0.95),
                clip=0.5,
                engine=self.engine,
                zero_stage=self.zero_stage,
                precision=self.precision,
                deepspeed={"zero_optimization": sections} if sections else {},
                offload=is_native and self.offload != "none",
            ),
            parallel=replace(PIPELINES[self.pipeline], expert=max(degree, 1)),
        )

    @property
    def is_legal(self) -> bool:
        """Whether the cross-checks let it through."""
        return not findings(self.config, self.num_ranks)


@dataclass(frozen=True, slots=True)
class Row:
    """Choices that are a product."""

    engine: Engine
    zero_stage: int
    offload: str
    precisions: tuple[Precision, ...]
    pipelines: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All of them."""
        return tuple(
            Choice(self.engine, self.zero_stage, self.offload, *rest)
            for rest in product(self.precisions, self.pipelines, self.experts)
        )


def rows() -> tuple[Row, ...]:
    """The legal choices, in the order of the table."""
    found = []
    for engine, offloads in ENGINES.items():
        for stage, offload in product(range(4), offloads):
            found += _products(engine, stage, offload)
    return tuple(found)


def _products(engine: Engine, stage: int, offload: str) -> list[Row]:
    """The legal choices of an engine at a stage: for pipelines that go with the same the same row."""
    partners = [(pipeline, _partners(engine, stage, offload, pipeline=pipeline)) for pipeline in PIPELINES]
    found = []
    for (precisions, experts), alike in groupby(partners, key=lambda item: item[1]):
        if precisions:
            found.append(Row(engine, stage, offload, precisions, tuple(p for p, _ in alike), experts))
    return found


def _partners(
    engine: Engine, stage: int, offload: str, *, pipeline: str
) -> tuple[tuple[Precision, ...], tuple[str, ...]]:
    """The precisions and the experts that go with a pipeline; every one with every other."""
    legal = [
        (precision, experts)
        for precision, experts in product(PRECISIONS, EXPERTS)
        if Choice(engine, stage, offload, precision, pipeline, experts).is_legal
    ]
    precisions = tuple(p for p in PRECISIONS if any(p == precision for precision, _ in legal))
    kinds = tuple(e for e in EXPERTS if any(e == experts for _, experts in legal))
    assert len(legal) == len(precisions) * len(kinds), f"no product: {engine} {stage} {offload} {pipeline}"
    return precisions, kinds


def markdown() -> str:
    """The table, between its marks."""
    head = ("`optim.engine`", "`zero_stage`", "in host memory", "`precision`", "pipeline", "experts")
    lines = [
        (r.engine, str(r.zero_stage), r.offload, *map(", ".join, (r.precisions, r.pipelines, r.experts)))
        for r in rows()
    ]
    table = [head, ("---",) * len(head), *lines]
    return "\n".join([BEGIN, *("| " + " | ".join(line) + " |" for line in table), END])


def replace_block(text: str) -> str:
    """A text with the table between its marks."""
    before, _, rest = text.partition(BEGIN)
    return before + markdown() + rest.partition(END)[2]
