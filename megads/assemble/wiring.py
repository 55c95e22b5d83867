"""From a config to the objects of a run: the only room that knows all of them.

Config --layout--> Mesh --describe--> DecoderSpec --partition--> blocks of this rank's stages
                                              --> engine (gradients, optimizer), executors (train, evaluate), loader
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megads.assemble.schedule import placement, schedule_of
from megads.config.optim import OptimConfig
from megads.config.root import Config
from megads.layers.recompute import Memory
from megads.model.catalog import complete, describe
from megads.model.decoder import make_blocks
from megads.model.spec import DecoderSpec
from megads.objective.language import ObjectiveSpec
from megads.optim.deepspeed_engine import DeepSpeedEngine
from megads.optim.ema import AveragingEngine, SharedEngine
from megads.optim.engine import Engine
from megads.optim.precision import initial_dtype
from megads.optim.zero import NativeEngine
from megads.parallel.layout import Layout
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import Piece, Scope, ShardedParameter, fill, parameter_table
from megads.parallel.tally import TallyTable, tallied_in
from megads.parallel.weight_queue import WeightQueue
from megads.pipeline.action import Overlap, Schedule
from megads.pipeline.executor import Executor, forwards
from megads.pipeline.lower import lower
from megads.pipeline.partition import Ranges, partition, partition_by_layers
from megads.pipeline.stage import Stage
from megads.pipeline.transport import TensorSpec, Transport
from megads.pipeline.zero_bubble import vee


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout that the config means for this many ranks; data parallel is what is left.

    Raises:
        LayoutError: the degrees do not divide the ranks.
    """
    parallel = config.parallel
    layout = Layout.fit(
        world_size,
        tensor=parallel.tensor,
        context=parallel.context,
        pipeline=parallel.pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        virtual_stages=parallel.virtual_stages,
        placement=placement(parallel),
    )
    return replace(layout, shard=config.optim.shard_size)


@dataclass(frozen=True, slots=True)
class Model:
    """This rank's part of the model.

    Attributes:
        spec: the whole model.
        stages: stage number -> its blocks.
        is_sequence_parallel: whether payloads between stages are cut along the sequence.
        queue: where its layers put their weight gradients.
    """

    spec: DecoderSpec
    stages: dict[int, torch.nn.ModuleList]
    is_sequence_parallel: bool
    queue: WeightQueue

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self.parameters[0].dtype

    @property
    def parameters(self) -> tuple[ShardedParameter, ...]:
        """This rank's parameters, each once, in order of declaration."""
        return parameter_table(self.stages.values())

    @property
    def kept(self) -> tuple[Piece, ...]:
        """State without a gradient that this rank's layers keep in checkpoints."""
        return tuple(piece for module in tallied_in(self.stages.values()) for piece in module.kept())

    def train(self) -> None:
        """Dropout on."""
        for blocks in self.stages.values():
            blocks.train()

    def eval(self) -> None:
        """Dropout off."""
        for blocks in self.stages.values():
            blocks.eval()


def stage_ranges(config: Config, spec: DecoderSpec, *, layout: Layout) -> Ranges:
    """The blocks of each stage: as the user lists them, or by cost."""
    if config.parallel.stage_layers is not None:
        return partition_by_layers(config.parallel.stage_layers)
    is_vee = layout.placement == vee(layout.pipeline)
    return partition(spec.block_costs, layout.num_stages, is_vee=is_vee)


def build_model(config: Config, mesh: Mesh, *, vocab: int) -> Model:
    """This rank's stages with their initial weights, the same bits under every layout, in float32 (float64 for fp64).

    An engine turns the weights into the dtype that computes.

    Args:
        vocab: token ids of the tokenizer.
    """
    described = describe(config.model, vocab=vocab, sequence_length=config.data.sequence_length)
    spec = replace(described, objective=objective_of(config.optim))
    scope = Scope(
        mesh,
        initial_dtype(config.optim.precision),
        config.run.seed,
        sequence_parallel=config.parallel.sequence,
        context_kind=config.parallel.context_kind,
        sequence_pieces=config.parallel.sequence_pieces,
        width=spec.width,
    )
    ranges = stage_ranges(config, spec, layout=mesh.layout)
    mine = {stage: range(*ranges[stage]) for stage in mesh.layout.stages_of(mesh.group("pp").rank)}
    memory = Memory(
        config.parallel.recompute,
        num_layers=config.parallel.recompute_layers,
        offload=config.parallel.offload,
        loss_chunk=config.parallel.loss_chunk,
    )
    blocks = make_blocks(scope, spec, stages=mine, memory=memory)
    model = Model(spec, blocks, config.parallel.sequence, scope.queue)
    for parameter in model.parameters:
        fill(parameter, seed=config.run.seed)
    return model


def objective_of(optim: OptimConfig) -> ObjectiveSpec:
    """What is trained on, of the `optim` section."""
    return ObjectiveSpec(optim.label_smoothing, optim.label_smoothing_kind, optim.z_loss)


def build_engine(config: Config, model: Model, *, mesh: Mesh) -> Engine:
    """The optimizer engine over this rank's parameters, with the averages that `optim.ema` asks for."""
    engine = _build_engine(config, model, mesh=mesh)
    return AveragingEngine(engine, config.optim.ema) if config.optim.ema else engine


def _build_engine(config: Config, model: Model, *, mesh: Mesh) -> SharedEngine:
    moe = model.spec.moe
    tallies = TallyTable(
        tallied_in(model.stages.values()),
        mesh,
        rows=len(model.spec.expert_layers),
        columns=0 if moe is None else moe.num_columns,
    )
    if config.optim.engine == "deepspeed":
        return DeepSpeedEngine(model.stages, mesh, config=config.optim, tallies=tallies)
    return NativeEngine(model.stages, mesh, config=config.optim, tallies=tallies)


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
    num_micro_batches = rows_of(config, mesh) // config.batch.micro
    schedule = schedule_of(config.parallel, num_micro_batches=num_micro_batches)
    pipeline = mesh.group("pp")
    is_gathered = config.optim.engine == "deepspeed" and config.optim.zero_stage == 3
    in_steps = is_gathered or any(isinstance(cell, Overlap) for cell in schedule.rows[pipeline.rank])
    stages = {
        number: Stage(number, list(blocks), queue=model.queue, in_steps=in_steps)
        for number, blocks in model.stages.items()
    }
    transport = Transport(pipeline, mesh.device)

    cut = mesh.group("tp").size if model.is_sequence_parallel else 1
    dtype = model.dtype

    def payload(rows: int, seq: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec((seq // cut, rows, model.spec.hidden), dtype),)

    def executor(chosen: Schedule) -> Executor:
        lowered = chosen if chosen.is_lowered else lower(chosen)
        return Executor(
            lowered,
            pipeline.rank,
            stages=stages,
            transport=transport,
            payload=payload,
            terms=model.spec.terms,
        )

    return Executors(executor(schedule), executor(forwards(schedule)))


def resolved(config: Config, spec: DecoderSpec) -> Config:
    """The config with the family's defaults written out, as it is saved with the run."""
    length = config.data.sequence_length
    model = complete(config.model, vocab=spec.vocab, sequence_length=length)
    data = replace(config.data, page=config.data.page or config.data.sequence_length)
    return replace(config, model=model, data=data)
