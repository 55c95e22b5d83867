"""Which experts the reference chose, and its choice in place of a rank's own where the choice was a near-tie.

A router's choice is not continuous: two scores that differ by less than rounding may be ordered otherwise in float32,
and then a token goes elsewhere and everything after it differs, rightly. So the choices of the reference are kept with
their margins; another precision takes them over where the margin is below `NEAR`, and how many it would have made
otherwise is counted. In float64 nothing is taken over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megads.assemble.wiring import Model
from megads.layers.router import Choice, TokenPlaces
from megads.verify.trace import block_name

NEAR = 1e-5  # margin of scores

Key = tuple[int, str]  # step, module


@dataclass(frozen=True, slots=True)
class Routes:
    """Choices of one process.

    Attributes:
        experts: [sample, seq, K] by step and module.
        is_near: [sample, seq], whether a score nearer than `NEAR` would have changed the choice.
    """

    experts: dict[Key, NDArray[np.int64]] = field(default_factory=dict)
    is_near: dict[Key, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(slots=True)
class RouteKeeper:
    """Hooks on a model's routers.

    Args:
        shape: [samples, seq] of the global batch.
        against: the reference; None: this run is it.

    Attributes:
        step: the step under way, from 1.
        num_replayed: choices of this rank that were another near-tie's and were replaced.
        num_choices: of this rank's tokens in all.
    """

    model: Model
    shape: tuple[int, int]
    against: Routes | None = None
    step: int = 1
    routes: Routes = field(default_factory=Routes)
    num_replayed: int = 0
    num_choices: int = 0
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Self:
        for blocks in self.model.stages.values():
            for block in blocks:
                for name, module in block.named_modules():
                    if isinstance(module, Choice):
                        hook = partial(self._see, f"{block_name(block)}.{name}")
                        self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, module: Choice, args: tuple[Any, ...], chosen: Tensor) -> Tensor | None:
        """Keep what was chosen, or give what is chosen instead."""
        scores, places = args
        key, place = (self.step, name), _place(places)
        if self.against is None:
            self._keep(key, place, chosen, module.margins(scores))
            return None
        theirs, is_near = (
            torch.from_numpy(array[key][place]).to(chosen.device)
            for array in (self.against.experts, self.against.is_near)
        )
        is_other = is_near & (theirs != chosen).any(-1)
        self.num_choices += len(chosen)
        self.num_replayed += int(is_other.sum())
        return torch.where(is_other[:, None], theirs, chosen)

    def _keep(self, key: Key, place: tuple[Any, ...], chosen: Tensor, margins: Tensor) -> None:
        experts = self.routes.experts.setdefault(key, np.zeros((*self.shape, chosen.shape[-1]), np.int64))
        is_near = self.routes.is_near.setdefault(key, np.zeros(self.shape, np.bool_))
        experts[place] = chosen.cpu().numpy()
        is_near[place] = (margins < NEAR).cpu().numpy()


def _place(places: TokenPlaces) -> tuple[Any, ...]:
    """Of a router's tokens in [sample, seq]."""
    return places.samples.cpu().numpy(), places.columns.cpu().numpy()
