"""All ranks of a model replica must compute on the same batch: tensor, context and pipeline neighbours compare hashes.

Lives here: the hash of a batch and the comparison. A difference means that ranks see other files or another order; it
would train on without a word.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from megads.data.sequence import Batch
from megads.errors import DataError
from megads.parallel.control import Control
from megads.parallel.layout import Layout


def check_replicas(batch: Batch, *, layout: Layout, control: Control, reads_tokens: bool) -> None:
    """Compare this step's batch, still on the host, with that of the replica's other ranks. All ranks call it.

    Args:
        batch: this data-parallel rank's whole rows.
        reads_tokens: whether tokens and labels are in it.

    Raises:
        DataError: on every rank, naming two ranks that differ and what differs.
    """
    if control.size == 1:
        return
    mine = {"mask, positions and documents": _digest(batch.mask, batch.positions, batch.document_ids)}
    if reads_tokens:
        mine["tokens and labels"] = _digest(batch.tokens, batch.labels)
    seen: dict[tuple[int, str], tuple[int, str]] = {}
    for rank, parts in enumerate(control.all_gather(mine)):
        replica = layout.coordinates(rank).data
        for what, digest in parts.items():
            first, expected = seen.setdefault((replica, what), (rank, digest))
            if digest != expected:
                raise DataError(
                    f"ranks {first} and {rank} are one model replica and read different batches",
                    found=f"{what} of step {batch.step} differ: {expected} on rank {first}, {digest} on rank {rank}",
                    allowed=f"the same batch on all ranks of replica {replica}",
                    do="see that every host reads the same corpora and runs the same code",
                )


def _digest(*tensors: Tensor | None) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
