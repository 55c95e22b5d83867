"""Choices of experts, recorded in one run and replayed in another where they were made by next to nothing.

A choice is known by step, layer, sample and column, so a reference in one process serves every layout. The hooks are
torch's own forward hooks on `layers.router.Choice`; nothing in the layers knows of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megads.layers.router import Choice, Router, TokenPlaces

NEAR = 1e-5  # margins below it are near-ties: rounding may decide them


@dataclass
class Choices:
    """(step, layer) -> (sample, column) -> experts."""

    found: dict[tuple[int, int], dict[tuple[int, int], list[int]]] = field(default_factory=dict)
    num_tokens: int = 0
    num_near: int = 0  # tokens whose choice was replayed

    def record(self, modules: Iterable[torch.nn.Module]) -> None:
        """From now on remember what the routers of a model choose."""
        for router in _routers(modules):

            def hook(_: Choice, args: Any, chosen: Tensor, row: int = router.row) -> None:
                places: TokenPlaces = args[1]
                table = self.found.setdefault((places.step, row), {})
                keys = zip(places.samples.tolist(), places.columns.tolist(), strict=True)
                table.update(zip(keys, chosen.tolist(), strict=True))

            router.choice.register_forward_hook(hook)

    def replay(self, modules: Iterable[torch.nn.Module]) -> None:
        """From now on replace what the routers of a model choose by what was recorded, where margins are small."""
        for router in _routers(modules):

            def hook(choice: Choice, args: Any, chosen: Tensor, row: int = router.row) -> Tensor:
                scores, places = args
                table = self.found[places.step, row]
                keys = zip(places.samples.tolist(), places.columns.tolist(), strict=True)
                known = torch.tensor([table[key] for key in keys], dtype=torch.int64).view_as(chosen)
                is_near = choice.margins(scores) < NEAR
                self.num_tokens += len(chosen)
                self.num_near += int(is_near.sum())
                return torch.where(is_near[:, None], known, chosen)

            router.choice.register_forward_hook(hook)


def _routers(modules: Iterable[torch.nn.Module]) -> list[Router]:
    return [m for module in modules for m in module.modules() if isinstance(m, Router)]
