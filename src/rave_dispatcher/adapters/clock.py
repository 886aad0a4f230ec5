"""Time and randomness of the machine."""

from __future__ import annotations

import os
import random
import time


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
