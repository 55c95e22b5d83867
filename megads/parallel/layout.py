"""The rank grid as arithmetic: which rank holds which coordinates, and which ranks form a group.

Nothing here needs torch or a process. Axis order, fastest first: tensor, context, data, pipeline, so that
tensor-parallel ranks are neighbours on a node. tensor=2, data=2, pipeline=2:

              pipeline 0          pipeline 1
              tensor 0  1         tensor 0  1
    data 0        [ 0   1 ]           [ 4   5 ]
    data 1        [ 2   3 ]           [ 6   7 ]

Experts use the same ranks of a stage in another grid: expert_tensor fastest, then expert, then what is
left ("edp"). With expert_tensor = tensor the expert axis splits context x data.

Axes (`AXES`), each a partition of all ranks:
    tp cp dp pp   the four of the grid           dp_cp   ranks that hold the same dense parameters
    ep etp edp    the experts' grid              ends    those of the first and the last stage (tied parameters)
    model         all ranks of one replica (norms are summed over it)        stage   those with the same stages
    world         everybody
    dp_cp_shard   those of dp_cp that share one copy of the optimizer state  dp_cp_replica   those with the same share
    edp_shard     the same of edp                                            edp_replica

With shard=2 the eight ranks of a dp_cp group are four shard groups of neighbours, [0 1] [2 3] [4 5] [6 7], and two
replica groups, [0 2 4 6] [1 3 5 7]. Neighbours in dp_cp are a block of shard x tensor ranks of the stage; experts are
sharded inside the same blocks, as far as one holds the same experts more than once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from megads.errors import LayoutError

AXES = (
    *("tp", "cp", "dp", "pp", "dp_cp", "ep", "etp", "edp", "ends", "model", "stage", "world"),
    *("dp_cp_shard", "dp_cp_replica", "edp_shard", "edp_replica"),
)


def sequence_unit(*, context: int, tensor: int) -> int:
    """Every sequence length must be a multiple of this many tokens, so that ranks can share a row evenly.

    Rank r of P has the chunks r and 2P-1-r of 2P equal ones; sequence parallelism cuts what a rank has once more.

    Args:
        context: context-parallel degree.
        tensor: tensor-parallel degree with sequence parallelism; without, 1.
    """
    return context * lcm(2, tensor) if context > 1 else tensor


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Place of one rank in the grid (`tensor`, `context`, `data`, `pipeline`) and in the experts' grid."""

    tensor: int
    context: int
    data: int
    pipeline: int
    expert_tensor: int
    expert: int
    expert_data: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism.

    Args:
        tensor, context, pipeline, data: degrees whose product is the number of ranks.
        expert: expert-parallel degree; expert x expert_tensor must divide tensor x context x data.
        virtual_stages: pipeline stages a rank holds (interleaving); it adds no rank.
        expert_tensor: tensor degree of the experts; None: the same as `tensor`.
        placement: the pipeline rank of each stage (a schedule says so, `pipeline/schedules.py`); None: stages are
            dealt in turn, stage s to rank s % pipeline.
        shard: of the ranks that hold the same dense parameters, how many share one copy of the optimizer state; None:
            all.

    Raises:
        LayoutError: a degree below 1, an expert grid or shards that do not fit, or a placement of other stages.
    """

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    virtual_stages: int = 1
    expert_tensor: int | None = None
    placement: tuple[int, ...] | None = None
    shard: int | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "context", "pipeline", "data", "expert", "virtual_stages"):
            if getattr(self, name) < 1:
                raise LayoutError(
                    f"layout.{name} is a number of ranks or stages",
                    found=getattr(self, name),
                    allowed=">= 1",
                )
        if self.stage_size % (self.expert * self.etp_size):
            raise LayoutError(
                "expert x expert_tensor must divide tensor x context x data",
                found=f"{self.expert} x {self.etp_size} with {self.tensor} x {self.context} x {self.data}",
                allowed=f"a divisor of {self.stage_size}",
            )
        block, grid = self.shard_block, self.expert * self.etp_size
        if block < 1 or self.stage_size % block or (block % grid and grid % block):
            raise LayoutError(
                "layout.shard does not divide what it is a part of",
                found=f"{self.shard} of {self.context} x {self.data} ranks, experts in {self.expert} x {self.etp_size}",
                allowed="a divisor of context x data that with tensor fits the experts' grid",
            )
        dealt = sorted(rank for rank in range(self.pipeline) for _ in range(self.virtual_stages))
        if self.placement is not None and sorted(self.placement) != dealt:
            raise LayoutError(
                "layout.placement does not give every pipeline rank its stages",
                found=self.placement,
                allowed=f"{self.virtual_stages} stages on each of the ranks 0..{self.pipeline - 1}",
            )

    @classmethod
    def fit(
        cls,
        world_size: int,
        *,
        tensor: int = 1,
        context: int = 1,
        pipeline: int = 1,
        expert: int = 1,
        virtual_stages: int = 1,
        expert_tensor: int | None = None,
        placement: tuple[int, ...] | None = None,
    ) -> Layout:
        """The layout of `world_size` ranks whose data-parallel degree is what the other degrees leave."""
        used = tensor * context * pipeline
        if used < 1 or world_size % used:
            raise LayoutError(
                "the number of ranks must be a multiple of tensor x context x pipeline",
                found=f"{world_size} ranks with {tensor} x {context} x {pipeline} = {used}",
                allowed=f"a multiple of {used}",
                do="change the degrees under `parallel` or the number of processes",
            )
        return cls(
            tensor=tensor,
            context=context,
            pipeline=pipeline,
            data=world_size // used,
            expert=expert,
            virtual_stages=virtual_stages,
            expert_tensor=expert_tensor,
            placement=placement,
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.stage_size * self.pipeline

    @property
    def stage_size(self) -> int:
        """Number of ranks of one pipeline rank: tensor x context x data."""
        return self.tensor * self.context * self.data

    @property
    def shard_block(self) -> int:
        """Neighbouring ranks of a stage that share one copy of its optimizer state."""
        return self.stage_size if self.shard is None else self.shard * self.tensor

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages: pipeline x virtual_stages."""
        return self.pipeline * self.virtual_stages

    def pipeline_rank_of(self, stage: int) -> int:
        """The pipeline rank that holds `stage`."""
        return stage % self.pipeline if self.placement is None else self.placement[stage]

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages that a pipeline rank holds, ascending."""
        return tuple(s for s in range(self.num_stages) if self.pipeline_rank_of(s) == pipeline_rank)

    @property
    def etp_size(self) -> int:
        """Tensor degree of the experts."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank` in the grid."""
        if not 0 <= rank < self.world_size:
            raise LayoutError("rank is outside the layout", found=rank, allowed=f"0..{self.world_size - 1}")
        pipeline, within = divmod(rank, self.stage_size)
        rest, tensor = divmod(within, self.tensor)
        data, context = divmod(rest, self.context)
        expert_rest, expert_tensor = divmod(within, self.etp_size)
        expert_data, expert = divmod(expert_rest, self.expert)
        return Coordinates(tensor, context, data, pipeline, expert_tensor, expert, expert_data)

    def rank(self, *, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """The rank at these coordinates: the inverse of `coordinates`."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The partition of all ranks along `axis` (one of `AXES`): ranks of a group differ in that axis alone.

        Groups are in order of their first rank, ranks inside a group ascend along the axis.
        """
        if axis not in AXES:
            raise LayoutError("no such axis", found=axis, allowed=", ".join(AXES))
        members: dict[object, list[int]] = {}
        grid = axis.removesuffix("_shard").removesuffix("_replica")
        for rank in range(self.world_size):
            block, place = divmod(rank % self.stage_size, self.shard_block)
            within = {"_shard": block, "_replica": place}.get(axis.removeprefix(grid))
            members.setdefault((self._group_key(grid, self.coordinates(rank)), within), []).append(rank)
        return tuple(tuple(ranks) for ranks in members.values())

    def _group_key(self, axis: str, c: Coordinates) -> object:
        """What ranks of one group have in common."""
        if axis == "ends":
            ends = (self.pipeline_rank_of(0), self.pipeline_rank_of(self.num_stages - 1))
            inner = None if c.pipeline in ends else c.pipeline
            return (c.tensor, c.context, c.data, inner)
        common = {
            "tp": (c.context, c.data, c.pipeline),
            "cp": (c.tensor, c.data, c.pipeline),
            "dp": (c.tensor, c.context, c.pipeline),
            "pp": (c.tensor, c.context, c.data),
            "dp_cp": (c.tensor, c.pipeline),
            "ep": (c.expert_tensor, c.expert_data, c.pipeline),
            "etp": (c.expert, c.expert_data, c.pipeline),
            "edp": (c.expert_tensor, c.expert, c.pipeline),
            "model": (c.context, c.data),
            "stage": (c.pipeline,),
            "world": (),
        }
        return common[axis]
