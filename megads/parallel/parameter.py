"""Parameters: declared once with a `ShardSpec`, listed as a table, filled the same under every layout.

How a tensor is cut is arithmetic and lives in `shard.py`; groups live in `mesh.py`; random streams in `rng.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megads.parallel.shard import Box, Shape


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
