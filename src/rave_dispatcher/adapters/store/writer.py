"""The one writer of the store: a thread that commits what came meanwhile as one group.

One fsync makes all of a group durable, so that the disk's latency is paid once for many
events. Nothing is answered before the commit of its group.

Each call into SQLite gives the interpreter's lock away, and may wait half a millisecond to get
it back from a busy event loop. So the events of a group are inserted by few statements of many
rows, not by one each.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rave_dispatcher.adapters.store import connection as opening
from rave_dispatcher.adapters.store.rows import event_row, insert_events_sql
from rave_dispatcher.application.errors import StorageFullError, UnavailableError
from rave_dispatcher.application.ports import Receipt
from rave_dispatcher.domain.events import Event

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]

MAX_GROUP = 512
ROWS_MOST = 64  # of one statement
QUEUED_MOST = 20_000  # beyond this the disk does not keep up, and to wait longer helps nobody


class _Item:
    __slots__ = ("alone", "error", "event", "future", "grows", "result", "work")

    def __init__(
        self,
        work: Work | None,
        future: asyncio.Future[Any] | None,
        grows: bool,
        alone: bool,
        event: Event | None = None,
    ) -> None:
        self.work, self.future, self.grows, self.alone = work, future, grows, alone
        self.event = event
        self.result: Any = None
        self.error: Exception | None = None


class Writer:
    """Runs work on the store's write connection, in groups. `reserve` bytes are kept free for
    what is under way already: with less, what makes the store grow is refused."""

    def __init__(self, path: Path, connection: sqlite3.Connection, reserve: int) -> None:
        self._path, self._connection, self._reserve = path, connection, reserve
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.corrupt: str | None = None
        self.written = 0  # pieces of work, since the start
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(
        self, work: Callable[[sqlite3.Connection], T], *, grows: bool, alone: bool = False
    ) -> asyncio.Future[T]:
        """Have work done; the future is done when it is durable.

        `grows`: it needs space. `alone`: it runs outside of any transaction.
        """
        return self._put(_Item(work, self._loop.create_future(), grows, alone))

    def add_event(self, event: Event) -> asyncio.Future[Receipt]:
        """Keep an event, unless one of its source and delivery id is there."""
        return self._put(_Item(None, self._loop.create_future(), True, False, event))

    def _put(self, item: _Item) -> asyncio.Future[Any]:
        future = item.future
        assert future is not None
        if self._closed or self._queue.qsize() > QUEUED_MOST:
            future.set_exception(UnavailableError("the event store has too much to do"))
        elif self.corrupt:
            future.set_exception(UnavailableError("the event store is damaged: see the log"))
        else:
            self._queue.put(item)
        return future

    def post(self, work: Work) -> None:
        """Have work done that nobody waits for, and that may be dropped."""
        if not self._closed and not self.corrupt and self._queue.qsize() <= QUEUED_MOST:
            self._queue.put(_Item(work, None, True, False))

    def close(self) -> None:
        """Finish what was submitted, then close the connection."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()
            self._connection.close()

    def _run(self) -> None:
        last = False
        while not last:
            group, last = self._take()
            if not group:
                continue
            if group[0].alone:
                self._do_alone(group[0])
            else:
                self._commit(group)
            self.written += len(group)
            with contextlib.suppress(RuntimeError):  # the loop was closed under us
                self._loop.call_soon_threadsafe(_deliver, group)

    def _take(self) -> tuple[list[_Item], bool]:
        """What waits, as one group; and whether it is the last."""
        group: list[_Item] = []
        if self._held is not None:
            group, self._held = [self._held], None
        else:
            first = self._queue.get()
            if first is None:
                return [], True
            group = [first]
        with contextlib.suppress(queue.Empty):
            while not group[0].alone and len(group) < MAX_GROUP:
                item = self._queue.get_nowait()
                if item is None:
                    return group, True
                if item.alone:
                    self._held = item
                    break
                group.append(item)
        return group, False

    _held: _Item | None = None

    def _do_alone(self, item: _Item) -> None:
        try:
            assert item.work is not None
            item.result = item.work(self._connection)
        except sqlite3.Error as e:
            item.error = self._explain(e)
        except Exception as e:
            item.error = e

    def _commit(self, group: list[_Item]) -> None:
        tight = opening.free_bytes(self._path) < self._reserve
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            events = []
            for item in group:
                if tight and item.grows:
                    item.error = StorageFullError(
                        "there is hardly any space left for events: deliver this again later"
                    )
                elif item.event is not None:
                    events.append(item)
                else:
                    self._do(item)
            if events:
                receipts = insert_events(self._connection, [i.event for i in events if i.event])
                for item, receipt in zip(events, receipts, strict=True):
                    item.result = receipt
            self._connection.execute("COMMIT")
        except Exception as e:  # whatever it is, the thread must go on, and nobody wait for ever
            error = self._explain(e) if isinstance(e, sqlite3.Error) else e
            for item in group:
                item.error = error
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def _do(self, item: _Item) -> None:
        """One piece of work in the group's transaction; its failure undoes only itself."""
        assert item.work is not None
        self._connection.execute("SAVEPOINT item")
        try:
            item.result = item.work(self._connection)
        except sqlite3.Error as e:
            if not self._connection.in_transaction or opening.concerns_all(e):
                raise  # the whole group cannot be committed
            self._connection.execute("ROLLBACK TO item")
            item.error = self._explain(e)
        except Exception as e:
            self._connection.execute("ROLLBACK TO item")
            item.error = e
        self._connection.execute("RELEASE item")

    def _explain(self, error: sqlite3.Error) -> Exception:
        if opening.is_corrupt(error):
            self.corrupt = str(error)
        return opening.translate(error)


def insert_events(c: sqlite3.Connection, events: list[Event]) -> list[Receipt]:
    """Keep events that are not there yet; what became of each."""
    done, size = 0, 1
    while size * 2 <= min(len(events), ROWS_MOST):
        size *= 2
    inserted = 0
    # by powers of two, so that there are few statements for SQLite to prepare, once each
    while done < len(events):
        while size > len(events) - done:
            size //= 2
        values = [v for e in events[done : done + size] for v in event_row(e)]
        inserted += c.execute(insert_events_sql(size), values).rowcount
        done += size
    if inserted == len(events):
        return [Receipt(e.event_uuid, e.trace.trace_id, duplicate=False) for e in events]
    return [_receipt(known, e) for known, e in zip(_known(c, events), events, strict=True)]


def _known(c: sqlite3.Connection, events: list[Event]) -> list[tuple[str, str]]:
    """The event that is kept under the identity of each, and its trace."""
    asked = json.dumps([[e.delivery_id, e.source] for e in events])
    # one row that holds all: see above
    answer = c.execute(
        "SELECT json_group_array(json_array(event_uuid, trace_id)) FROM (SELECT e.event_uuid, "
        "e.trace_id FROM json_each(?) AS j CROSS JOIN events AS e ON e.delivery_id = "
        "j.value ->> 0 AND e.source = j.value ->> 1 ORDER BY j.key)",
        (asked,),
    ).fetchone()[0]
    return [(uuid, trace_id) for uuid, trace_id in json.loads(answer)]


def _receipt(known: tuple[str, str], event: Event) -> Receipt:
    return Receipt(*known, duplicate=known[0] != event.event_uuid)


def _deliver(group: list[_Item]) -> None:
    for item in group:
        if item.future is None or item.future.done():
            continue
        if item.error is not None:
            item.future.set_exception(item.error)
        else:
            item.future.set_result(item.result)
