"""kill -9 under load, again and again: what was acknowledged must be in the store."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.dispatcher import load


@dataclass
class Killed:
    """What came of it."""

    kills: int = 0
    broken: int = 0
    acknowledged: set[str] = field(default_factory=set)
    starts: list[float] = field(default_factory=list)  # seconds until the first answer


def kill_repeatedly(
    start: Callable[[], None], kill: Callable[[], None], port: int, requests: load.Requests,
    kills: int, chance: random.Random, most: int = 400,
) -> Killed:  # fmt: skip
    """Start, load, kill at a random moment, `kills` times. `most` requests for each start."""
    found = Killed()
    for _ in range(kills):
        began = time.monotonic()
        start()
        asyncio.run(wait(port))
        found.starts.append(time.monotonic() - began)
        killer = threading.Timer(chance.uniform(0.02, 0.25), kill)
        killer.start()
        outcome = asyncio.run(load.closed_loop(port, requests, load.new_ids(), 0.4, 16, most=most))
        killer.join()
        found.kills += 1
        found.broken += outcome.broken
        found.acknowledged |= set(outcome.acknowledged)
    return found


async def wait(port: int, seconds: float = 30) -> None:
    """Until a server answers anything."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            connection = await load.connect(port)
            try:
                # the socket listens before the store is open: only an answer tells
                async with asyncio.timeout(5):
                    await connection.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                return
            finally:
                connection.close()
        if time.monotonic() > end:
            raise TimeoutError("the server did not start")
        await asyncio.sleep(0.01)


def stored_ids(store: Path) -> set[str]:
    """The delivery ids that are in a store."""
    with contextlib.closing(sqlite3.connect(store)) as connection:
        return {row[0] for row in connection.execute("SELECT delivery_id FROM events")}


def processed_twice(store: Path) -> tuple[int, int, int]:
    """How many events became more than one task; how many events and tasks there are."""
    with contextlib.closing(sqlite3.connect(store)) as connection:
        (events,) = connection.execute("SELECT count(*) FROM events").fetchone()
        tasks, distinct = connection.execute(
            "SELECT count(*), count(DISTINCT event_uuid) FROM tasks"
        ).fetchone()
    return tasks - distinct, events, tasks


def unprocessed(store: Path) -> int:
    """How many events the rules have not seen."""
    with contextlib.closing(sqlite3.connect(store)) as connection:
        sql = "SELECT count(*) FROM events WHERE processed = 0"
        return int(connection.execute(sql).fetchone()[0])
