"""Parameters: declared once with a `ShardSpec`, listed as a table, filled the same under every layout.

How a tensor is cut is arithmetic and lives in `shard.py`; groups live in `mesh.py`; random streams in `rng.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from megads.parallel.mesh import Mesh
from megads.parallel.rng import fill_normal_
from megads.parallel.shard import (
    Box,
    Region,
    Shape,
    ShardSpec,
    block_box,
    boxes_of_range,
    local_shape,
    regions,
)
from megads.parallel.weight_queue import WeightQueue
from megads.parallel.width import width_rule

ContextKind = Literal["ring", "ulysses", "all_gather"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor and the memory that holds it: the unit in which all state is saved and loaded.

    Args:
        name: logical name, e.g. `model/layers.0.attention.qkv.weight`.
        shape: global shape of the logical tensor.
        box: which part this is, in global indices.
        tensor: the values, of shape `box.shape`; a view, so that loading can fill it in place.
    """

    name: str
    shape: Shape
    box: Box
    tensor: torch.Tensor


class ShardedParameter(torch.nn.Parameter):
    """A parameter that knows its declaration.

    Attributes:
        logical_name: its name in the whole model, the same under every layout.
        spec: how it is cut.
        regions: what this rank holds of it.
        width: of the model, in widths of its muP base.
        open_gradient: makes its `.grad`, where that is there only while a backward writes it.
    """

    logical_name: str
    spec: ShardSpec
    regions: tuple[Region, ...]
    width: float
    open_gradient: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Scope:
    """Where a module stands while it is built: its logical name, the mesh, the dtype, the run's seed.

    With `sequence_parallel`, activations between tensor-parallel regions are cut along the sequence.

    Modules declare their parameters through it. Parameters that are tied and live in the same process are one object:
    `ties` remembers them while a model is built. Layers put the computing of their weight gradients into `queue`;
    `context_kind` is how attention meets tokens of other context-parallel ranks; `sequence_pieces` in how many pieces
    activations cut along the sequence travel. `width` is the model's, in widths of its muP base (`width.py`).
    """

    mesh: Mesh
    dtype: torch.dtype
    seed: int
    name: str = ""
    sequence_parallel: bool = False
    ties: dict[str, ShardedParameter] = field(default_factory=dict)
    queue: WeightQueue = field(default_factory=WeightQueue)
    context_kind: ContextKind = "ring"
    sequence_pieces: int = 1
    width: float = 1.0

    @property
    def partial(self) -> tuple[str, ...]:
        """Axes over which gradients are partial sums, for parameters that meet activations cut along the sequence."""
        return ("tp",) if self.sequence_parallel else ()

    def child(self, name: str) -> Scope:
        """The scope of a module inside this one."""
        return replace(self, name=f"{self.name}.{name}" if self.name else name)

    def parameter(self, name: str, spec: ShardSpec) -> ShardedParameter:
        """Declare one parameter; its memory is zero until `fill`.

        Raises:
            LayoutError: the mesh does not cut it evenly.
        """
        logical_name = f"{self.name}.{name}"
        if spec.tie is not None and spec.tie in self.ties:
            return self.ties[spec.tie]
        shape = local_shape(spec, self.mesh.sizes, name=logical_name)
        data = torch.zeros(shape, dtype=self.dtype, device=self.mesh.device)
        parameter = ShardedParameter(data)
        parameter.logical_name = logical_name
        parameter.spec = self._scaled(spec)
        parameter.width = self.width
        parameter.regions = regions(spec, self.mesh.sizes, ranks=self.mesh.ranks, name=logical_name)
        if spec.tie is not None:
            self.ties[spec.tie] = parameter
        return parameter

    def _scaled(self, spec: ShardSpec) -> ShardSpec:
        """The declaration with the initial deviation that the model's width wants."""
        if self.width == 1.0 or spec.init.kind != "normal":
            return spec
        std = spec.init.std * self.width ** width_rule(spec).init
        return replace(spec, init=replace(spec.init, std=std))


def parameter_table(modules: Iterable[torch.nn.Module]) -> tuple[ShardedParameter, ...]:
    """All parameters of the modules in order of declaration, each object once."""
    found: dict[int, ShardedParameter] = {}
    for module in modules:
        for parameter in module.parameters():
            if not isinstance(parameter, ShardedParameter):
                raise TypeError(
                    f"{type(module).__name__} holds a parameter that was not declared through a Scope"
                )
            found.setdefault(id(parameter), parameter)
    return tuple(found.values())


def stored_name(parameter: ShardedParameter) -> str:
    """The name under which its values are drawn, saved and loaded: that of the original if it is tied."""
    return parameter.spec.tie or parameter.logical_name


def is_primary(parameter: ShardedParameter, mesh: Mesh) -> bool:
    """Whether this rank's copy is the one that counts in norms and is saved, data-parallel copies aside.

    A parameter that an axis does not cut is held by all its ranks, and counts on the first; a tied copy never counts.
    """
    if parameter.spec.tie not in (None, parameter.logical_name):
        return False
    return all(mesh.group(axis).rank == 0 for axis in parameter.spec.replicas)


@torch.no_grad()
def fill(parameter: ShardedParameter, *, seed: int) -> None:
    """Give a parameter its initial values: the same bits under every layout, device and process count.

    Fused parts are streams of their own, so that q is the same whether or not it is stored with k and v.
    """
    spec = parameter.spec
    parameter.zero_()
    for region in parameter.regions:
        target = parameter[region.local.slices]
        if spec.init.kind == "ones":
            target.fill_(1.0)
        elif spec.init.kind == "normal":
            block = block_box(spec, region.block)
            origin = tuple(-a for a in block.start)
            suffix = f"#{region.block}" if block.shape != spec.shape else ""
            fill_normal_(
                target,
                name=f"{seed}/{stored_name(parameter)}{suffix}",
                shape=block.shape,
                box=region.source.shift(origin),
                std=spec.init.std,
            )


def pieces(
    parameter: ShardedParameter, values: torch.Tensor, *, kind: str, start: int = 0
) -> tuple[Piece, ...]:
    """A flat range of a parameter's local elements as boxes of the logical tensor `kind/name`.

    Args:
        values: flat; element i belongs to local element start + i (row-major) of the parameter.
        kind: what the values are: "model", "optim/exp_avg", ...
    """
    found = []
    name = f"{kind}/{stored_name(parameter)}"
    offset = 0
    for box in boxes_of_range(tuple(parameter.shape), start=start, stop=start + values.numel()):
        view = values[offset : offset + box.size].view(box.shape)
        offset += box.size
        for region in parameter.regions:
            common = box.intersect(region.local)
            if common is not None:
                shift = tuple(g - r for g, r in zip(region.source.start, region.local.start, strict=True))
                inside = common.shift(tuple(-a for a in box.start))
                found.append(Piece(name, parameter.spec.shape, common.shift(shift), view[inside.slices]))
    return tuple(found)


def describe_table(parameters: Iterable[ShardedParameter]) -> str:
    """The table as text, one row a parameter: name, global shape, cuts, initialisation, decay, tie."""
    rows = []
    for p in parameters:
        spec = p.spec
        cuts = " ".join(
            f"{c.axis}@{c.dim}"
            + (f"[{'+'.join(map(str, c.blocks))}]" if c.blocks else "")
            + ("+pad" if c.pad else "")
            for c in spec.cuts
        )
        init = f"normal({spec.init.std:.6g})" if spec.init.kind == "normal" else spec.init.kind
        tie = f"tie={spec.tie}" if spec.tie not in (None, p.logical_name) else ""
        columns = (
            p.logical_name,
            "x".join(map(str, spec.shape)),
            cuts or "-",
            init,
            "decay" if spec.decay else "-",
            tie,
        )
        rows.append("  ".join(columns).rstrip())
    return "\n".join(rows) + "\n"
