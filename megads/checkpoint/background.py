"""Saving behind training: a snapshot in host memory now, the committed step later.

    training      step 100 | snapshot | step 101 | step 102 | ...        it waits for the copy alone
    background                        | write, sync, commit, prune |     a thread with its own control channel

What is saved, and the order of storage calls, is `save.py`'s and `commit.py`'s: a step saved in the background has the
same bytes. One save is under way at a time: a second one waits for the first. Lives here: the snapshot, the thread, and
what becomes of a failure. Host memory: one copy of this rank's share, kept from the first save on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megads.checkpoint.commit import Agreement
from megads.checkpoint.retention import prune
from megads.checkpoint.save import save
from megads.checkpoint.store import Store
from megads.errors import SaveError
from megads.parallel.parameter import Piece

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SavePlan:
    """Where steps go and what becomes of old ones.

    Attributes:
        directory: holds the steps.
        writers_per_node: most ranks of a host that write at once.
        keep, keep_every: which committed steps stay, as `retention.prune`.
        in_background: whether training goes on while a step is written.
        stops_on_failure: whether storage that failed ends the run; else it is a warning, and the next save tries anew.
    """

    directory: Path
    writers_per_node: int = 8
    keep: int | None = None
    keep_every: int | None = None
    in_background: bool = False
    stops_on_failure: bool = True


class Saver:
    """Saves the steps of one run. All ranks make the same calls.

    Args:
        control: over all ranks; a save in the background speaks over it at any time, so then it is nobody else's.
    """

    def __init__(self, plan: SavePlan, *, control: Agreement, store: Store | None = None) -> None:
        self._plan = plan
        self._control = control
        self._store = store or Store()
        self._buffers: dict[tuple[str, object], Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._under_way: Future[None] | None = None

    def save(self, step: int, *, pieces: Sequence[Piece], objects: Mapping[str, Any]) -> None:
        """Save a step; in the background, return once `pieces` may change again.

        Raises:
            SaveError: this save, or the one before it that ran in the background, failed and the plan says to stop.
            CheckpointError: the pieces do not fit together, or the step is there already.
        """
        self.finish()
        start = time.perf_counter()
        if self._plan.in_background:
            pieces = self._snapshot(pieces)
        waited = time.perf_counter() - start
        self._under_way = self._thread.submit(self._write, step, pieces, objects, start=start, waited=waited)
        if not self._plan.in_background:
            self.finish()

    def check(self) -> None:
        """Raise what a save in the background failed with, if it has; never waits."""
        if self._under_way is not None and self._under_way.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the save that is under way; raises what it failed with, as `save`."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        try:
            under_way.result()
        except SaveError as error:
            if self._plan.stops_on_failure:
                raise
            _log.warning("%s; training goes on without this step", error)

    def _write(
        self, step: int, pieces: Sequence[Piece], objects: Mapping[str, Any], *, start: float, waited: float
    ) -> None:
        """Write, commit and prune."""
        plan = self._plan
        path = save(
            plan.directory,
            step,
            pieces=pieces,
            objects=objects,
            control=self._control,
            writers_per_node=plan.writers_per_node,
            store=self._store,
        )
        stall = f", of which training waited {waited:.2f} s" if plan.in_background else ""
        _log.info("saved %s in %.2f s%s", path, time.perf_counter() - start, stall)
        if self._control.rank == 0:
            with contextlib.suppress(FileNotFoundError):  # removed by hand meanwhile: nothing to prune
                prune(plan.directory, plan.keep, keep_every=plan.keep_every, store=self._store)

    def _snapshot(self, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
        """The pieces with their values in host memory of their own."""
        copies = []
        for piece in pieces:
            source = piece.tensor.detach()
            key = (piece.name, piece.box)
            if key not in self._buffers:
                self._buffers[key] = torch.empty(
                    source.shape, dtype=source.dtype, pin_memory=source.device.type == "cuda"
                )
            copies.append(
                replace(piece, tensor=self._buffers[key].copy_(source, non_blocking=source.is_cuda))
            )
        if any(piece.tensor.is_cuda for piece in pieces):
            torch.cuda.current_stream().synchronize()
        return tuple(copies)
