"""One item ahead: the next is made in a thread while the one before is used. Reading, hashing and writing overlap so.

thread     read 0 | read 1 | read 2 |
consumer          | hash 0 | hash 1 | hash 2
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class _End:
    """Stands for the end of an iterator, which a future cannot carry as StopIteration."""


@contextmanager
def ahead(items: Iterator[T]) -> Iterator[Iterator[T]]:
    """Gives the same items in the same order; what making one raises is raised where it would be handed out.

    A context, because the thread must end where its consumer leaves: a generator that joins a thread when it is
    collected may be collected inside another thread's start, and both then wait for ever.
    """
    with ThreadPoolExecutor(1) as thread:
        yield _pull(items, thread)


def _pull(items: Iterator[T], thread: Executor) -> Iterator[T]:
    coming = thread.submit(next, items, _End())
    while True:
        item = coming.result()
        if isinstance(item, _End):
            return
        coming = thread.submit(next, items, _End())
        yield item
