"""What every module makes and what gradient comes back to it, set beside one process: where a difference begins.

    forward    embedding.word -> layers.0.attention_norm -> layers.0.attention.out -> ... -> layers.2
    backward   gradients of the same outputs, in the opposite direction

Outputs of the width of the residual stream are watched: they are whole on a rank, or a part of the sequence, and their
rows and columns say which part of the reference's array they are. Nothing is sent between ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megads.assemble.wiring import Model
from megads.data.sequence import Batch
from megads.parallel.mesh import Mesh
from megads.parallel.parameter import ShardedParameter

Arrays = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrays [sample, seq, hidden] of one process by module, in the order in which they were made."""

    outputs: Arrays = field(default_factory=dict)
    gradients: Arrays = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Deviation:
    """How one rank's values of a module differ from the reference: sums over elements.

    Attributes:
        difference: of (value - reference)^2.
        reference: of reference^2.
        product: of value x reference; product / reference is the best factor between them.
        square: of value^2.
    """

    difference: float = 0.0
    reference: float = 0.0
    product: float = 0.0
    square: float = 0.0

    def __add__(self, other: Deviation) -> Deviation:
        return Deviation(
            self.difference + other.difference,
            self.reference + other.reference,
            self.product + other.product,
            self.square + other.square,
        )

    @classmethod
    def of(cls, values: NDArray[np.float64], reference: NDArray[np.float64]) -> Deviation:
        """Between two arrays of one shape."""
        return cls(
            float(np.square(values - reference).sum()),
            float(np.square(reference).sum()),
            float((values * reference).sum()),
            float(np.square(values).sum()),
        )

    @property
    def error(self) -> float:
        """Relative, in the Euclidean norm; NaN where the values are."""
        return math.sqrt(self.difference / max(self.reference, 1e-300))

    @property
    def factor(self) -> float | None:
        """k if the values are k times the reference and nothing else; None if they are not."""
        if self.reference == 0.0 or not np.isfinite(self.square):
            return None
        factor = self.product / self.reference
        rest = self.square - factor * self.product
        return factor if rest <= 1e-9 * max(self.square, 1e-300) else None


Deviations = dict[str, Deviation]


@dataclass(slots=True)
class Tracer:
    """Hooks on a model's modules.

    Args:
        hidden: width of the outputs that are watched.
        shape: [samples, seq] of the global batch.
        against: the reference; None: this run is it.
    """

    model: Model
    mesh: Mesh
    shape: tuple[int, int]
    against: Trace | None = None
    trace: Trace = field(default_factory=Trace)
    outputs: Deviations = field(default_factory=dict)
    gradients: Deviations = field(default_factory=dict)
    _batch: Batch | None = None
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Tracer:
        for blocks in self.model.stages.values():
            for block in blocks:
                self._watch(block)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, block: torch.nn.Module) -> None:
        prefix = block_name(block)
        self._handles.append(block.register_forward_pre_hook(self._open))
        for name, module in block.named_modules():
            if name:
                self._handles.append(module.register_forward_hook(partial(self._see, f"{prefix}.{name}")))
        self._handles.append(block.register_forward_hook(partial(self._close, prefix)))

    def _open(self, _: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """A block's forward begins. A recomputed one does not pass here, and is not watched."""
        self._batch = args[1]

    def _see(self, name: str, _: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        value = _hidden_of(output)
        if self._batch is not None and value is not None:
            self._keep(name, value, self._batch)

    def _close(self, name: str, block: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._see(name, block, args, output)
        self._batch = None

    def _keep(self, name: str, value: Tensor, batch: Batch) -> None:
        columns, tp = batch.places, self.mesh.group("tp")
        rows = batch.tokens.shape[0]
        if value.shape[1:] != (rows, self.model.spec.hidden):
            return
        if len(columns) != value.shape[0]:
            if len(columns) != value.shape[0] * tp.size:
                return
            columns = columns.chunk(tp.size)[tp.rank]
        place = np.ix_(batch.samples.cpu().numpy(), columns.cpu().numpy())
        self._take(name, value.detach(), place, is_gradient=False)
        if value.requires_grad:
            value.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._take(name, gradient, place, is_gradient=True)
            )

    def _take(self, name: str, value: Tensor, place: tuple[Any, ...], *, is_gradient: bool) -> None:
        values = value.double().transpose(0, 1).cpu().numpy()  # [rows, columns, hidden]
        if self.against is None:
            arrays = self.trace.gradients if is_gradient else self.trace.outputs
            whole = arrays.setdefault(name, np.zeros((*self.shape, values.shape[-1])))
            whole[place] = values
            return
        reference = (self.against.gradients if is_gradient else self.against.outputs).get(name)
        if reference is not None:
            found = self.gradients if is_gradient else self.outputs
            found[name] = found.get(name, Deviation()) + Deviation.of(values, reference[place])


def _hidden_of(output: Any) -> Tensor | None:
    """The residual stream in what a module or block returned."""
    payload = getattr(output, "payload", None)
    if payload is not None:
        output = payload[0] if payload else None
    output = getattr(output, "hidden", output)
    return output if isinstance(output, Tensor) and output.dim() == 3 else None


def block_name(block: torch.nn.Module) -> str:
    """The logical name of a block, read off its parameters' (a tied copy may have another's)."""
    for name, parameter in block.named_parameters():
        assert isinstance(parameter, ShardedParameter)
        if parameter.logical_name.endswith(f".{name}"):
            return parameter.logical_name.removesuffix(f".{name}")
    return type(block).__name__


def sum_up(parts: list[Deviations]) -> Deviations:
    """The deviations of all ranks, by module."""
    found: Deviations = {}
    for part in parts:
        for name, deviation in part.items():
            found[name] = found.get(name, Deviation()) + deviation
    return found
