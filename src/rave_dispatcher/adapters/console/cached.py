"""Values that are made when somebody asks, and shared by all who ask soon after.

However many pages are open, a part of the console is made once; with none open, never.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_LOG = logging.getLogger("rave.console")


class Cached(Generic[T]):
    """A value that is made anew when it is asked for and older than `fresh` seconds.

    Until `stale` seconds the old one is given while the new one is made, so that nobody waits.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[T]],
        fresh: float,
        stale: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make, self._fresh, self._stale, self._now = make, fresh, stale, now
        self._made: tuple[float, T] | None = None
        self._making: asyncio.Task[T] | None = None

    async def get(self) -> T:
        """The value. Raises what `make` raises, unless there is one that will do."""
        known = self._made
        age = None if known is None else self._now() - known[0]
        if known is not None and age is not None and age < self._fresh:
            return known[1]
        if self._making is None:
            self._making = asyncio.create_task(self._make_it())
            self._making.add_done_callback(self._done)
        if known is not None and age is not None and age < self._stale:
            return known[1]
        # who goes away does not take the value from the others who wait for it
        return await asyncio.shield(self._making)

    async def _make_it(self) -> T:
        value = await self._make()
        self._made = (self._now(), value)
        return value

    def _done(self, task: asyncio.Task[T]) -> None:
        self._making = None
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a part of the console cannot be made", exc_info=error)
