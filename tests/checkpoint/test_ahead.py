"""One item ahead: same items, same order, same errors; made while the one before is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from megads.checkpoint.ahead import ahead


def test_items_come_in_order_and_the_next_is_made_meanwhile() -> None:
    made = [threading.Event() for _ in range(5)]

    def items() -> Iterator[int]:
        for number, event in enumerate(made):
            event.set()
            yield number

    found = []
    with ahead(items()) as numbers:
        for number in numbers:
            found.append(number)
            assert all(event.wait(5) for event in made[: number + 2])
            assert not any(event.is_set() for event in made[number + 2 :]), "one ahead, not more"
    assert found == [0, 1, 2, 3, 4]
    with ahead(iter(())) as nothing:
        assert list(nothing) == []


def test_what_making_raises_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 0
        raise OSError("disk")

    found = []
    with pytest.raises(OSError, match="disk"), ahead(items()) as numbers:
        found.extend(numbers)
    assert found == [0]


def test_leaving_early_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="used"), ahead(iter(range(10))) as numbers:
        for number in numbers:
            raise ValueError(f"used {number}")
    assert threading.active_count() == before
