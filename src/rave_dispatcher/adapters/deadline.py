"""A bound on the time of work that never waits, such as an expression on what a sender wrote."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class CpuDeadline:
    """Ends a block of the main thread that computes for longer than `seconds`.

    `re` keeps the interpreter to itself while it matches, so that no other thread and no timer of
    the event loop could end it; but it looks for signals. The timer counts the processor's time,
    not the clock's: a machine that was suspended or is busy has not computed.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._armed = seconds, False
        signal.signal(signal.SIGVTALRM, self._over)
        # it may reach another thread, in the middle of SQLite's system calls
        signal.siginterrupt(signal.SIGVTALRM, False)

    def _over(self, _number: int, _frame: FrameType | None) -> None:
        if self._armed:
            self._armed = False
            raise TimeoutError

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Raises TimeoutError within the block once its time is over."""
        assert threading.current_thread() is threading.main_thread()
        self._armed = True
        signal.setitimer(signal.ITIMER_VIRTUAL, self._seconds)
        try:
            yield
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
