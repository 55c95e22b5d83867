"""The whole config: one section a consumer."""

from __future__ import annotations

from dataclasses import field

from megads.config.batch import BatchConfig
from megads.config.checkpoint import CheckpointConfig
from megads.config.data import DataConfig
from megads.config.log import LogConfig
from megads.config.model import ModelConfig
from megads.config.optim import OptimConfig
from megads.config.parallel import ParallelConfig
from megads.config.profile import ProfileConfig
from megads.config.run import RunConfig
from megads.config.section import section


@section
class Config:
    """Everything a run is told, as it stands in a YAML file."""

    run: RunConfig
    model: ModelConfig
    batch: BatchConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
