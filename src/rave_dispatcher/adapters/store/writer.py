"""The one writer of the store: a thread that commits what came meanwhile as one group.

One fsync makes all of a group durable, so that the disk's latency is paid once for many
events. Nothing is answered before the commit of its group.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from rave_dispatcher.adapters.store import connection as opening
from rave_dispatcher.application.errors import StorageFullError, UnavailableError

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], Any]

MAX_GROUP = 512
QUEUED_MOST = 20_000  # beyond this the disk does not keep up, and to wait longer helps nobody


class _Item:
    __slots__ = ("alone", "error", "future", "grows", "result", "work")

    def __init__(
        self, work: Work, future: asyncio.Future[Any] | None, grows: bool, alone: bool
    ) -> None:
        self.work, self.future, self.grows, self.alone = work, future, grows, alone
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
        self.groups = 0
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    def submit(
        self, work: Callable[[sqlite3.Connection], T], *, grows: bool, alone: bool = False
    ) -> asyncio.Future[T]:
        """Have work done; the future is done when it is durable.

        `grows`: it needs space. `alone`: it runs outside of any transaction.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        if self._closed or self._queue.qsize() > QUEUED_MOST:
            future.set_exception(UnavailableError("the event store has too much to do"))
        elif self.corrupt:
            future.set_exception(UnavailableError("the event store is damaged: see the log"))
        else:
            self._queue.put(_Item(work, future, grows, alone))
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
            self.groups += 1
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
            item.result = item.work(self._connection)
        except sqlite3.Error as e:
            item.error = self._explain(e)
        except Exception as e:
            item.error = e

    def _commit(self, group: list[_Item]) -> None:
        tight = opening.free_bytes(self._path) < self._reserve
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            for item in group:
                if tight and item.grows:
                    item.error = StorageFullError(
                        "there is hardly any space left for events: deliver this again later"
                    )
                else:
                    self._do(item)
            self._connection.execute("COMMIT")
        except sqlite3.Error as e:
            error = self._explain(e)
            for item in group:
                item.error = error
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")

    def _do(self, item: _Item) -> None:
        """One piece of work in the group's transaction; its failure undoes only itself."""
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


def _deliver(group: list[_Item]) -> None:
    for item in group:
        if item.future is None or item.future.done():
            continue
        if item.error is not None:
            item.future.set_exception(item.error)
        else:
            item.future.set_result(item.result)
