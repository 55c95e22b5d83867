"""Control messages between ranks: small JSON values, a barrier.

They travel over one gloo group on the CPU, beside the data, so that agreeing on something never waits for a GPU. In one
process without torch.distributed every call is the identity. Tensors and gradients never pass here.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megads.errors import RankError

BACKGROUND_TIMEOUT = timedelta(hours=1)  # ranks write at their own speed, and nobody waits for them


class Control:
    """Object agreement over all ranks.

    Args:
        rank, size: this rank and the number of ranks.
        handle: a gloo process group over all ranks; None exactly if `size` is 1.
    """

    def __init__(self, rank: int, size: int, handle: dist.ProcessGroup | None = None) -> None:
        self.rank = rank
        self.size = size
        self._handle = handle

    def duplicate(self) -> Control:
        """Another channel over the same ranks, for a thread that speaks beside this one. All ranks call it."""
        if self.size == 1:
            return Control(0, 1)
        return Control(self.rank, self.size, dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT))

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order."""
        if self.size == 1:
            return [json.loads(json.dumps(value))]
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = payload.numel()
        dist.all_reduce(lengths, group=self._handle)
        padded = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        padded[: payload.numel()] = payload
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded, group=self._handle)
        return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths.tolist(), strict=True)]

    def gather(self, value: Any) -> list[Any] | None:
        """Every rank's JSON value on rank 0; None elsewhere."""
        values = self.all_gather(value)
        return values if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's JSON value on every rank."""
        return self.all_gather(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        """Return when every rank has called it."""
        if self.size > 1:
            dist.barrier(group=self._handle)

    def agree(self, failure: str | None) -> None:
        """Go on only if no rank reports a failure; else raise on every rank the first one's message.

        Raises:
            RankError: with the failing rank's number and message.
        """
        for rank, message in enumerate(self.all_gather(failure)):
            if message is not None:
                raise RankError(f"rank {rank}: {message}")
