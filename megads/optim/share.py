"""What one rank updates of a bucket, and the pieces of logical tensors that it is.

    bucket    | weight A      | weight B        | weight C   | pad |
    shares    |    rank 0    |    rank 1    |    rank 2    |  rank 3  |     start, master
    owned      the part of a share that this rank saves and counts: over all ranks every element once

Without ZeRO a share is the whole bucket, on every data-parallel rank the same, and each owns a slice of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megads.parallel.gradient import Bucket
from megads.parallel.parameter import Piece, pieces


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a bucket that this rank updates.

    Attributes:
        master: flat, the values that are updated (float32, or float64 for fp64).
        start: the first element of `master`, in the bucket.
        owned: which elements of `master` this rank saves and counts.
    """

    bucket: Bucket
    master: Tensor
    start: int
    owned: slice

    def pieces(self, flat: Tensor, *, kind: str) -> Iterator[Piece]:
        """A flat tensor of the share's elements as pieces of logical tensors `kind/name`: what this rank loads."""
        yield from bucket_pieces(self.bucket, flat, kind=kind, first=self.start)

    def owned_pieces(self, flat: Tensor, *, kind: str) -> Iterator[Piece]:
        """Those of its pieces that this rank saves."""
        if self.bucket.traits.is_primary:
            first = self.start + self.owned.start
            yield from bucket_pieces(self.bucket, flat[self.owned], kind=kind, first=first)


def bucket_pieces(bucket: Bucket, held: Tensor, *, kind: str, first: int) -> Iterator[Piece]:
    """Flat elements [first, first + held.numel()) of a bucket as pieces of logical tensors `kind/name`."""
    last = first + held.numel()
    for place in bucket.places:
        start = max(first, place.start)
        stop = min(last, place.start + place.parameter.numel())
        if start < stop:
            values = held[start - first : stop - first]
            yield from pieces(place.parameter, values, kind=kind, start=start - place.start)
