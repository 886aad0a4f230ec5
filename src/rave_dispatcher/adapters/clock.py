"""Time and randomness of the machine."""

from __future__ import annotations

import os
import random
import time

from rave_dispatcher.application.ports import Clock

SLEEP_MOST_MS = 3 * 86_400_000  # from Friday evening to Monday morning


class SystemClock:
    """The wall's clock, and one that begins at its time and then never jumps.

    CLOCK_BOOTTIME goes on while the machine sleeps, as a lease should.
    """

    def __init__(self) -> None:
        self._offset_ms = time.time_ns() // 1_000_000 - self._boot_ms()

    @staticmethod
    def _boot_ms() -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def wall_ms(self) -> int:
        """Milliseconds of the epoch, as the machine believes."""
        return time.time_ns() // 1_000_000

    def steady_ms(self) -> int:
        """Milliseconds of the epoch, as they would be had nobody set the clock since the start."""
        return self._offset_ms + self._boot_ms()


class BelievedClock:
    """The wall's time for what deletes: somebody who sets it ahead must not have all deleted.

    A machine's clock stands still while its host sleeps, and is then set ahead: so much at once is
    believed. What is further ahead is not until the next start.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._ahead = self._slept = 0

    def now_ms(self) -> int:
        """Milliseconds of the epoch; to be asked each few hours, or more often."""
        wall, steady = self._clock.wall_ms(), self._clock.steady_ms()
        jump, self._ahead = wall - steady - self._ahead, wall - steady
        if 0 < jump <= SLEEP_MOST_MS:
            self._slept += jump
        return min(wall, steady + self._slept)


class SystemChance:
    """The kernel's randomness for what must not be guessed, any other for delays."""

    def __init__(self) -> None:
        self._pool = b""

    def token(self, size: int) -> bytes:
        """Bytes that nobody can guess. Fetched in bulk: a system call for each costs more."""
        if len(self._pool) < size:
            self._pool = os.urandom(max(4096, size))
        taken, self._pool = self._pool[:size], self._pool[size:]
        return taken

    def fraction(self) -> float:
        """A number in [0, 1)."""
        return random.random()  # noqa: S311 - jitter
