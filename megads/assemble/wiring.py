"""From a config to the objects of a run: the only room that knows all of them.

Config --layout--> Mesh --describe--> DecoderSpec --partition--> blocks of this rank's stages
                                              --> engine (gradients, optimizer), executors (train, evaluate), loader
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megads.config.root import Config
from megads.model.catalog import describe
from megads.model.decoder import DecoderSpec, make_blocks
from megads.optim.zero import NativeEngine
from megads.parallel.layout import Layout
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Scope, ShardedParameter, fill, parameter_table
from megads.pipeline.action import Schedule
from megads.pipeline.executor import Executor, forwards
from megads.pipeline.lower import lower
from megads.pipeline.partition import partition
from megads.pipeline.schedules import build
from megads.pipeline.stage import Stage
from megads.pipeline.transport import TensorSpec, Transport

DTYPES = (("fp32", torch.float32), ("fp64", torch.float64))


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout that the config means for this many ranks; data parallel is what is left.

    Raises:
        LayoutError: the degrees do not divide the ranks.
    """
    return Layout.fit(world_size, tensor=config.parallel.tensor, pipeline=config.parallel.pipeline)


@dataclass(frozen=True, slots=True)
class Model:
    """This rank's part of the model.

    Attributes:
        spec: the whole model.
        stages: stage number -> its blocks.
        dtype: of weights and activations.
    """

    spec: DecoderSpec
    stages: dict[int, torch.nn.ModuleList]
    dtype: torch.dtype

    @property
    def parameters(self) -> tuple[ShardedParameter, ...]:
        """This rank's parameters, each once, in order of declaration."""
        return parameter_table(self.stages.values())

    def train(self) -> None:
        """Dropout on."""
        for blocks in self.stages.values():
            blocks.train()

    def eval(self) -> None:
        """Dropout off."""
        for blocks in self.stages.values():
            blocks.eval()


def build_model(config: Config, mesh: Mesh, *, vocab: int) -> Model:
    """This rank's stages with their initial weights, the same bits under every layout.

    Args:
        vocab: token ids of the tokenizer.
    """
    spec = describe(config.model, vocab=vocab, sequence_length=config.data.sequence_length)
    dtype = dict(DTYPES)[config.optim.precision]
    ranges = partition(spec.block_costs, mesh.layout.num_stages)
    pp_rank = mesh.group("pp").rank
    mine = {pp_rank: range(*ranges[pp_rank])}
    model = Model(spec, make_blocks(Scope(mesh, dtype, config.run.seed), spec, stages=mine), dtype)
    for parameter in model.parameters:
        fill(parameter, seed=config.run.seed)
    return model


def build_engine(config: Config, model: Model, *, mesh: Mesh) -> NativeEngine:
    """The optimizer engine over this rank's parameters."""
    return NativeEngine(model.stages, mesh, config=config.optim)


def rows_of(config: Config, mesh: Mesh) -> int:
    """Samples that one data-parallel rank computes in one step."""
    return config.batch.global_size // mesh.layout.data


@dataclass(frozen=True, slots=True)
class Executors:
    """The same stages under the training schedule, and under its forward half."""

    train: Executor
    evaluate: Executor


def build_executors(config: Config, model: Model, *, mesh: Mesh) -> Executors:
    """Executors of one training batch and of an evaluation batch of the same number of rows."""
    schedule = build(
        config.parallel.schedule,
        num_stages=mesh.layout.num_stages,
        num_micro_batches=rows_of(config, mesh) // config.batch.micro,
    )
    pipeline = mesh.group("pp")
    stages = {number: Stage(number, list(blocks)) for number, blocks in model.stages.items()}
    transport = Transport(pipeline, mesh.device)

    def payload(rows: int, seq: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec((seq, rows, model.spec.hidden), model.dtype),)

    def executor(chosen: Schedule) -> Executor:
        return Executor(lower(chosen), pipeline.rank, stages=stages, transport=transport, payload=payload)

    return Executors(executor(schedule), executor(forwards(schedule)))


def resolved(config: Config, spec: DecoderSpec) -> Config:
    """The config with the family's defaults written out, as it is saved with the run."""
    model = replace(
        config.model,
        kv_heads=spec.kv_heads,
        ffn=spec.ffn,
        vocab=spec.vocab,
        max_positions=spec.max_positions,
        tied=spec.tied,
        norm_eps=spec.norm_eps,
    )
    data = replace(config.data, page=config.data.page or config.data.sequence_length)
    return replace(config, model=model, data=data)
