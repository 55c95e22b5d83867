"""Several ranks as threads of one process: the control messages of a job without its processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from megads.parallel.control import Control


class ThreadControl(Control):
    """Control of one rank; all of a job share `slots` and `meeting`."""

    def __init__(self, rank: int, slots: list[Any], meeting: threading.Barrier) -> None:
        super().__init__(rank, len(slots))
        self._slots = slots
        self._meeting = meeting

    def all_gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = json.dumps(value)
        self._meeting.wait()
        values = [json.loads(text) for text in self._slots]
        self._meeting.wait()
        return values

    def barrier(self) -> None:
        self._meeting.wait()


def run_threads(size: int, function: Callable[[Control], Any]) -> list[Any]:
    """What `function` returned or raised, by rank. One that dies by no Exception takes the others with it."""
    if size == 1:
        try:
            return [function(Control(0, 1))]
        except BaseException as error:
            return [error]
    meeting = threading.Barrier(size, timeout=20)
    slots: list[Any] = [None] * size
    results: list[Any] = [None] * size

    def body(rank: int) -> None:
        try:
            results[rank] = function(ThreadControl(rank, slots, meeting))
        except Exception as error:
            results[rank] = error
        except BaseException as error:
            results[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
