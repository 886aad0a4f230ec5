"""Events as they come in: each once, in the order in which the dispatcher stored them.

The API lists the newest first, by pages that stay as they are while events are added. So what
is new is everything down to the newest event that was shown before.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from ravectl.dispatcher import Api, UnreachableError
from ravectl.errors import RavectlError
from ravectl.reconnect import Backoff, Lost

POLL_SECONDS = 2.0
PAGE = 20  # rows carry their payload, and mostly there is nothing new
ONCE_SECONDS = 45.0  # one connection, less than an Api's deadline; then secrets are read anew
REMEMBERED = 1000  # shown events that are known again: if retention took the last, an older one
MAX_BEHIND = 100_000  # events that came in between two looks

Row = dict[str, Any]


class Feed:
    """Knows what was shown; pure."""

    def __init__(self) -> None:
        self._shown: deque[str] = deque(maxlen=REMEMBERED)

    def first(self, rows: Iterable[Row]) -> list[Row]:
        """The newest events at the start, the newest first in, the newest last out."""
        return self._taken(list(rows))

    def new(self, rows: Iterable[Row]) -> list[Row]:
        """Of all events, the newest first, those that came since; no more is read than needed."""
        known = set(self._shown)
        fresh = []
        for row in rows:
            if row["event_uuid"] in known:
                break
            fresh.append(row)
        return self._taken(fresh)

    def _taken(self, rows: list[Row]) -> list[Row]:
        rows.reverse()
        self._shown.extend(row["event_uuid"] for row in rows)
        return rows


def follow(
    connect: Callable[[], Api],
    query: Mapping[str, str | None],
    last: int,
    put: Callable[[Row], None],
    lost: Callable[[Lost], None],
) -> NoReturn:
    """Show the `last` events and then each that comes, until Ctrl-C.

    `connect` gives a new connection: at the start, and when one has broken. The first must
    succeed. Raises RavectlError when the dispatcher refuses.
    """
    feed, started, backoff = Feed(), False, Backoff()
    while True:
        try:
            with connect() as api:
                until = time.monotonic() + ONCE_SECONDS
                while time.monotonic() < until:
                    most = MAX_BEHIND if started else last
                    rows = api.items("/events", query, most, PAGE)
                    for row in feed.new(rows) if started else feed.first(rows):
                        put(row)
                    started = True
                    backoff.worked()
                    time.sleep(POLL_SECONDS)
        except UnreachableError as e:
            if not started:
                raise
            why = backoff.failed(e.message)
            lost(why)
            time.sleep(why.seconds)
        except (KeyError, TypeError):
            raise RavectlError(
                "the dispatcher's answer is not a list of events",
                "see what it did: ravectl logs dispatcher",
            ) from None
