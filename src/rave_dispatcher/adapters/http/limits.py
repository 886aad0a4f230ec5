"""How much of a client is taken: a token bucket for each."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

CLIENTS = 10_000  # remembered at most: who is forgotten begins with a full bucket


class RateLimiter:
    """`rate` requests per second of each client, `burst` at once."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, float(burst), now
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def admit(self, client: str) -> int | None:
        """None when a request may pass, else the seconds until the next one may."""
        now = self._now()
        tokens, since = self._buckets.pop(client, (self._burst, now))
        tokens = min(tokens + max(now - since, 0) * self._rate, self._burst)
        passes = tokens >= 1
        self._buckets[client] = (tokens - 1 if passes else tokens, now)
        if len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return None if passes else max(math.ceil((1 - tokens) / self._rate), 1)
