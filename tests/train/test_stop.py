"""`train/stop.py`: which signals raise the flag, and what is left of the handlers afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from megads.train.stop import SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers of before, whatever a test leaves."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_the_flag_and_another_changes_nothing(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.is_raised
        assert stop.cause == "a signal to another rank"
        os.kill(os.getpid(), number)
        assert stop.is_raised
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.cause, stop.is_agreed) == (number.name, False)


def test_it_is_agreed_once_any_rank_was_asked() -> None:
    stop = StopRequest()
    stop.count(0.0)
    assert not stop.is_agreed
    for num_raised in (2.0, 0.0):
        stop.count(num_raised)
        assert stop.is_agreed


def test_handlers_come_back_unless_the_process_is_leaving() -> None:
    with StopRequest():
        pass
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_DFL}
    with StopRequest() as stop:
        stop.count(1)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_raised
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
