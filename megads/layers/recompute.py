"""What is kept for the backward: everything, or less at the price of computing some of it again.

    kept by a Llama layer, in tensors of [seq, batch, hidden]; f = ffn / hidden, all heads with keys of their own
    none               9 + 3 f     inputs of all products and norms, q k v, attention's result as it came
    norm               7 + 3 f     the norms' outputs are made again from their inputs
    activation         9 + 2 f     the activation's output is made again
    attention          3 + 3 f     that branch runs again, with its norm and its products
    mlp                8           the other one
    attention, mlp     2
    full               1           the whole layer runs again (Chen et al. 2016)

A whole run again is a `recomputed` call: a function's input is kept and the function runs once more in the backward.
A cheap part is an `Origin`: the linear layer behind it keeps the origin of its input in place of the input and makes it
again where its weight gradient needs it, in W if the backward is split.

Dropout masks are functions of indices and collectives are issued in program order on every rank, so a second run makes
the same values; no generator state is kept. Where what is kept lies is the matter of `offload.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

Recompute = Literal["none", "full"] | tuple[Literal["attention", "mlp", "norm", "activation"], ...]
"""Nothing, whole layers, or named parts of each layer."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a stage keeps for its backward, and where.

    Attributes:
        recompute: what is computed again.
        num_layers: in how many of a stage's layers, its first ones; None: in all.
        offload: whether what layers keep waits in the host's memory.
        loss_chunk: tokens whose logits exist at a time; None: those of the whole micro-batch.
    """

    recompute: Recompute = "none"
    num_layers: int | None = None
    offload: bool = False
    loss_chunk: int | None = None

    def of_layer(self, index: int) -> Memory:
        """That of the stage's layer number `index`, from 0."""
        is_beyond = self.num_layers is not None and index >= self.num_layers
        return replace(self, recompute="none") if is_beyond else self

    @property
    def recomputes_all(self) -> bool:
        """Whether whole layers run again."""
        return self.recompute == "full"

    def recomputes(self, part: str) -> bool:
        """Whether a named part of a layer runs again on its own."""
        return not isinstance(self.recompute, str) and part in self.recompute


KEEP_ALL = Memory()


@dataclass(frozen=True, slots=True)
class Origin:
    """How to make a tensor again: `function(source)`, the same bits each time, of something that is kept anyway."""

    function: Callable[[Tensor], Tensor]
    source: Tensor


def recomputed(function: Callable[..., T], *args: Any) -> T:
    """function(*args), of which only the arguments are kept for the backward."""
    result: T = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return result
