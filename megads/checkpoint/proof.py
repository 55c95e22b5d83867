"""Proof of a conversion: what was written is read back, compared bit for bit with what it was made of, and hashed.

    conversion.json    {"format": "megads-conversion", "version": 1, "from": .., "to": .., "step": .., "notes": [..],
                        "tensors": {name: {"shape": [..], "dtype": "float32", "blake3": "<64 hex digits>"}},
                        "comparison": null | {"logits": {..}, "layers": {..}}}

A hash is that of the tensor's values as they were read back: row-major, little-endian. `comparison` is made by
assemble/compare.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint.foreign import Values
from megads.checkpoint.manifest import hash_bytes
from megads.errors import CheckpointError
from megads.parallel.shard import Shape

PROOF_NAME = "conversion.json"


@dataclass(frozen=True, slots=True)
class Proof:
    """A tensor that was read back: shape, dtype (torch's name without `torch.`), hash of its bytes."""

    shape: Shape
    dtype: str
    blake3: str
    size: int

    def to_json(self) -> dict[str, Any]:
        """As in conversion.json."""
        return {"shape": list(self.shape), "dtype": self.dtype, "blake3": self.blake3}


def prove(pairs: Iterable[tuple[str, Values, Values]]) -> dict[str, Proof]:
    """Compare tensors bit for bit and hash them. Memory: two tensors and what reading one takes.

    Args:
        pairs: name, what it should be, what was written.

    Raises:
        CheckpointError: naming the first tensor that differs.
    """
    return {name: _prove(name, expected, found) for name, expected, found in pairs}


def pairs_of(
    expected: Mapping[str, Values], found: Mapping[str, Values]
) -> Iterable[tuple[str, Values, Values]]:
    """The tensors of two mappings, for `prove`.

    Raises:
        CheckpointError: other names.
    """
    if expected.keys() != found.keys():
        strange = sorted(expected.keys() ^ found.keys())
        raise CheckpointError("other tensors were written than were read", found=", ".join(strange[:8]))
    return ((name, values, found[name]) for name, values in expected.items())


def _prove(name: str, expected: Values, found: Values) -> Proof:
    written, wanted = bits(found.whole()), bits(expected.whole())
    if expected.dtype != found.dtype or expected.shape != found.shape or not torch.equal(written, wanted):
        raise CheckpointError(
            f"{name}: its bytes on the disk are not those that were read",
            found=f"{found.dtype} {found.shape}",
            allowed=f"every bit as in the source, {expected.dtype} {expected.shape}",
        )
    digest = hash_bytes(written.numpy().data)
    return Proof(found.shape, str(found.dtype).removeprefix("torch."), digest, found.size)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, row-major."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
