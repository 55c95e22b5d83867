"""Batches made ahead of the step that needs them, by one thread.

Lives here: the thread and its bounded queue. Does not live here: what a batch is (loader, sequence).

    thread     make 1   make 2   make 3   wait   make 4 ...      at most `depth` batches that nobody took
    trainer    take 1 ......................... take 2 ...

Reading a file and copying an array let the interpreter go on, so one thread is beside the trainer, not before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from megads.data.sequence import Batch


class Prefetcher:
    """The batches of consecutive steps, in order. A context manager: leaving it ends the thread.

    Args:
        make: step -> batch; what it raises, `take` of that step raises.
        steps: which will be taken, one after another.
        depth: batches that are made ahead; 0: each when it is taken, without a thread.
    """

    def __init__(self, make: Callable[[int], Batch], steps: range, *, depth: int) -> None:
        self._make = make
        self._coming = iter(steps)
        self._depth = depth
        self._under_way: deque[tuple[int, Future[Batch]]] = deque()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="megads-loader") if depth else None

    def __enter__(self) -> Prefetcher:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._under_way.clear()

    def take(self, step: int) -> Batch:
        """The batch of the next step, which must be `step`.

        Raises:
            DataError: as the loader; names corpus, sample and step.
        """
        if self._pool is None:
            expected = next(self._coming)
            batch = self._make(step)
        else:
            expected, future = self._under_way.popleft()
            batch = future.result()
        if expected != step:
            raise ValueError(f"the batch of step {step} was taken where {expected} follows")
        self._fill()
        return batch

    def _fill(self) -> None:
        while self._pool is not None and len(self._under_way) < self._depth:
            step = next(self._coming, None)
            if step is None:
                return
            self._under_way.append((step, self._pool.submit(self._make, step)))
