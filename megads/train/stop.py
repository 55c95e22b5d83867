"""Asked to stop by a signal: finish the step under way, save it, leave with exit code 75.

    one rank  SIGTERM / SIGUSR1 / SIGHUP -> a flag
    step n    the flags travel with the loss in the step's last all-reduce            no message more, no wait more
    step n+1  is under way when the host reads step n: every rank sees the same sum, so n + 1 is the last step of all
              -> save n + 1 -> exit code 75 on every rank

Ctrl-C (SIGINT) is not here: it ends the job at once, and the run goes on from its last checkpoint.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self

SAVED = 75  # exit code of a rank that saved and stopped because of a signal (EX_TEMPFAIL: start me again)

# SLURM and every launcher send SIGTERM, SLURM's --signal what it is told, a closing terminal SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """While open, the signals of `SIGNALS` do nothing but raise a flag, however often they come.

    A signal that this process was told to ignore (nohup) stays ignored. After a stop they are ignored until the
    process ends: launchers send SIGTERM to ranks whose peers are gone, and it must not spoil the exit code.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._is_agreed = False
        self._previous: list[tuple[signal.Signals, signal._HANDLER]] = []

    @property
    def is_raised(self) -> bool:
        """Whether this rank was asked to stop."""
        return self._received is not None

    @property
    def is_agreed(self) -> bool:
        """Whether all ranks know by now that one was asked: the step under way is the last."""
        return self._is_agreed

    def count(self, num_raised: float) -> None:
        """Take in how many ranks had been asked, a number that is the same on all of them."""
        self._is_agreed |= num_raised > 0

    @property
    def cause(self) -> str:
        """Name of the first signal, or that another rank got it."""
        return "a signal to another rank" if self._received is None else self._received.name

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous.append((number, signal.signal(number, self._raise)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous:
            signal.signal(number, signal.SIG_IGN if self._is_agreed else previous)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number)
