"""What keeps the store small, sound and saved: checkpoints, retention, checks, export, backup."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from rave_dispatcher.adapters.store import connection as opening
from rave_dispatcher.adapters.store import schema
from rave_dispatcher.adapters.store.rows import EVENT_COLUMNS, TASK_COLUMNS, event_of, task_of
from rave_dispatcher.adapters.store.writer import Writer
from rave_dispatcher.application.errors import CorruptStoreError

CHECKPOINT_WORK = 4000  # events or steps, some 30 MB of log
RESTART_FRAMES = 25_000  # pages: 100 MB of log
REST_FRAMES = 1000
PASSES = 4
RESTART_MS = 100  # for who is reading; webhooks wait meanwhile
PATIENCE = 10  # looks, a second each, until the next try when somebody read longer
RunInThread = Callable[..., Awaitable[Any]]
EXPORT_BYTES = 2**22  # that are read at once
PRUNE_ROWS = 500  # in one transaction: others get their turn between
VACUUM_PAGES = 2000


class Checkpointer:
    """Copies what is committed into the store's file, beside the commits.

    Not often, for each time the disk has two files to make durable at once; and the log begins
    anew in the same file (RESTART, not TRUNCATE), for a log that grows needs its file system's
    journal with each commit.
    """

    def __init__(self, path: Path, writer: Writer, run_in_thread: RunInThread) -> None:
        self._path, self._writer, self._run = path, writer, run_in_thread
        self._log = path.with_name(path.name + "-wal")
        self._seen = self._copied = 0
        self._patience = 0

    async def look(self) -> None:
        """Called each second: copy when much came, or when all of it has."""
        written, before = self._writer.written, self._seen
        self._seen = written
        waiting = written - self._copied
        # a piece of work may be a step or an event of a megabyte: so the size of the log counts too
        self._patience = max(self._patience - 1, 0)
        large = _size(self._log) > opening.LOG_BYTES * 1.25 and not self._patience
        if waiting < CHECKPOINT_WORK and not (waiting and written == before) and not large:
            return
        self._copied = written
        frames, copied = await self._run(checkpoint, self._path)
        if frames < RESTART_FRAMES or self._patience:
            return
        # a load that never pauses: what came meanwhile is copied too, until little is left, for
        # which the writer then stops once; else the log would never begin anew
        for _ in range(PASSES):
            if frames - copied > REST_FRAMES:
                frames, copied = await self._run(checkpoint, self._path)
        if not await self._writer.submit(_restart, grows=False, alone=True):
            self._patience = PATIENCE


def _restart(c: sqlite3.Connection) -> bool:
    """Have the log begin anew; False when somebody goes on reading it."""
    c.execute(f"PRAGMA busy_timeout = {RESTART_MS}")
    try:
        return not c.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0]
    finally:
        c.execute(f"PRAGMA busy_timeout = {opening.BUSY_MS}")


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def checkpoint(path: Path) -> tuple[int, int]:
    """Copy; how many pages are in the log, and how many of them are copied. Runs in a thread."""
    connection = opening.connect(path)
    try:
        _, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return frames, copied
    finally:
        connection.close()


_PRUNE = (
    # an event goes when nothing is to be done with it any more
    (
        "DELETE FROM events WHERE seq IN (SELECT e.seq FROM events e WHERE e.received_ms < :before "
        "AND e.processed = 1 AND NOT EXISTS (SELECT 1 FROM tasks t WHERE t.task_id = e.task_id AND "
        "t.status IN ('pending', 'running')) ORDER BY e.received_ms LIMIT :rows)"
    ),
    (
        "DELETE FROM task_log WHERE task_id IN (SELECT task_id FROM tasks "
        "WHERE completed_ms < :before ORDER BY completed_ms LIMIT :rows)"
    ),
    (
        "DELETE FROM tasks WHERE seq IN (SELECT seq FROM tasks WHERE completed_ms < :before AND "
        "status IN ('completed', 'failed') ORDER BY completed_ms LIMIT :rows)"
    ),
    (
        "DELETE FROM metrics WHERE seq IN (SELECT seq FROM metrics WHERE timestamp_ms < :before "
        "ORDER BY timestamp_ms LIMIT :rows)"
    ),
    (
        "DELETE FROM spans WHERE (trace_id, span_id) IN (SELECT trace_id, span_id FROM spans "
        "WHERE end_ns < :before * 1000000 ORDER BY end_ns LIMIT :rows)"
    ),
)


def prune_some(c: sqlite3.Connection, before_ms: int) -> int:
    """Delete some of what is older; how many rows it was."""
    values = {"before": before_ms, "rows": PRUNE_ROWS}
    return sum(max(c.execute(sql, values).rowcount, 0) for sql in _PRUNE)


async def prune(writer: Writer, before_ms: int) -> int:
    """Delete all that is older, and give the space back to the disk; how many rows it was."""
    total = 0
    while deleted := await writer.submit(lambda c: prune_some(c, before_ms), grows=False):
        total += deleted
    # in pieces, for webhooks wait meanwhile, and the log holds what is moved
    while await writer.submit(_vacuum_some, grows=False, alone=True):
        pass
    return total


def _vacuum_some(c: sqlite3.Connection) -> bool:
    # a script, for `execute` makes one step of it, which gives one page back
    c.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
    return bool(c.execute("PRAGMA freelist_count").fetchone()[0])


def prune_offline(path: Path, before_ms: int) -> int:
    """The same, by a process of its own; SQLite has it and the service take turns."""
    connection = opening.connect(path)
    total = 0
    try:
        while True:
            connection.execute("BEGIN IMMEDIATE")
            deleted = prune_some(connection, before_ms)
            connection.execute("COMMIT")
            if not deleted:
                break
            total += deleted
        while _vacuum_some(connection):
            pass
    except sqlite3.Error as e:
        raise opening.translate(e) from None
    finally:
        connection.close()
    return total


class Checker:
    """Reads all of the store, which takes its time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._stopped = False

    def run(self) -> str | None:
        """What is wrong with the store, or None; None too when it was stopped. In a thread."""
        connection = self._connection = opening.connect(self._path, read_only=True)
        try:
            return None if self._stopped else opening.check(connection)
        except sqlite3.DatabaseError as e:
            if opening.is_corrupt(e):
                return str(e)
            raise
        finally:
            self._connection = None
            connection.close()

    def stop(self) -> None:
        """Have it end soon: a service that ends would wait for its thread."""
        self._stopped = True
        if (connection := self._connection) is not None:
            with contextlib.suppress(sqlite3.Error):  # it has just ended
                connection.interrupt()


def describe(path: Path) -> dict[str, Any]:
    """The store's settings and whether it is sound, for `ravectl verify`; changes nothing.

    Raises CorruptStoreError for what is no event store, an empty file among it.
    """
    connection = opening.connect(path, read_only=True)
    try:
        if connection.execute("PRAGMA application_id").fetchone()[0] != schema.APPLICATION_ID:
            raise CorruptStoreError(f"{path} is no event store of the dispatcher")
        pragmas = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "user_version", "auto_vacuum")
        }
        return {**pragmas, "integrity_check": opening.check(connection) or "ok"}
    finally:
        connection.close()


def export(path: Path, since_ms: int, skipped: Callable[[str], None]) -> Iterator[str]:
    """Events and tasks as lines of JSON. What of a damaged file cannot be read is skipped, and
    `skipped` is told of it, a line each."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    tables = (("events", EVENT_COLUMNS, _event_line), ("tasks", TASK_COLUMNS, _task_line))
    try:
        for table, columns, line_of in tables:
            for row in _readable(connection, table, columns, skipped):
                try:
                    moment, line = line_of(row)
                    wanted = moment >= since_ms
                except (ValueError, TypeError, AttributeError):
                    skipped(f"{table} {row[0]} cannot be such (its values are damaged)")
                    continue
                if wanted:
                    yield line
    finally:
        connection.close()


def _event_line(row: tuple[Any, ...]) -> tuple[int, str]:
    e = event_of(row)
    return e.received_ms, json.dumps({
        "kind": "event", "event_uuid": e.event_uuid, "source": e.source,
        "delivery_id": e.delivery_id, "event_type": e.event_type, "project": e.project,
        "received_ms": e.received_ms, "payload": e.payload.decode("utf-8", "replace"),
        "signature": e.signature, "trace_id": e.trace.trace_id,
        "processed": e.processed, "task_id": e.task_id,
    })  # fmt: skip


def _task_line(row: tuple[Any, ...]) -> tuple[int, str]:
    t = task_of(row)
    return t.created_ms, json.dumps({
        "kind": "task", "task_id": t.task_id, "event_uuid": t.event_uuid,
        "rule": t.rule, "agent_type": t.agent_type, "project": t.project,
        "status": t.status,
        "prompt": t.prompt, "attempt": t.attempt, "created_ms": t.created_ms,
        "completed_ms": t.completed_ms, "outcome": t.outcome, "detail": t.detail,
        "trace_id": t.trace.trace_id,
    })  # fmt: skip


def _readable(
    c: sqlite3.Connection, table: str, columns: str, skipped: Callable[[str], None]
) -> Iterator[tuple[Any, ...]]:
    """The rows of a table, by number, over the damaged places.

    A part at a time: a reader that stays holds up the log, and who reads us may pause.
    """
    # not "> last": SQLite would look for that one, which may lie in the damage
    sql = f"SELECT {columns} FROM {table} WHERE seq >= ? ORDER BY seq"  # noqa: S608
    last = 0
    while True:
        rows, damage = _some(c, sql, (last + 1,))
        if damage is not None:
            # Python's module is a row ahead, and of the two gives none
            rows += _some(c, f"{sql} LIMIT 1", (rows[-1][0] + 1 if rows else last + 1,))[0]
        yield from rows
        last = rows[-1][0] if rows else last
        if damage is not None:
            at, last = last, _beyond(c, table, last)
            skipped(f"{table} {at + 1} to {last or 'the last'} cannot be read ({damage})")
        if not last or (not rows and damage is None):
            return


def _some(
    c: sqlite3.Connection, sql: str, values: tuple[object, ...]
) -> tuple[list[tuple[Any, ...]], sqlite3.DatabaseError | None]:
    """Some of the rows, one at least when there is one, and what kept the rest from being read."""
    rows: list[tuple[Any, ...]] = []
    size = 0
    cursor = c.cursor()
    try:
        cursor.execute(sql, values)
        while size < EXPORT_BYTES and (row := cursor.fetchone()) is not None:
            rows.append(row)
            size += sum(len(v) for v in row if isinstance(v, str | bytes)) + 100
    except sqlite3.DatabaseError as e:
        if not opening.is_corrupt(e):
            raise
        return rows, e
    finally:
        cursor.close()
    return rows, None


def _beyond(c: sqlite3.Connection, table: str, last: int) -> int:
    """The last number of a damaged place behind `last`; 0 when all that follows is."""

    def is_sound(number: int) -> bool:
        sql = f"SELECT * FROM {table} WHERE seq >= ? ORDER BY seq LIMIT 1"  # noqa: S608
        try:
            c.execute(sql, (number + 1,)).fetchone()
        except sqlite3.DatabaseError as e:
            if not opening.is_corrupt(e):
                raise
            return False
        return True

    step = 1
    while not is_sound(last + step):
        step *= 2
        if step > 2**53:
            return 0
    bad, good = last + step // 2, last + step
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (bad, middle) if is_sound(middle) else (middle, good)
    return good


def backup(path: Path, target: Path) -> None:
    """A sound copy of a store that may be in use; there under its name or not at all."""
    partial = target.with_name(target.name + ".new")
    source = opening.connect(path, read_only=True)
    try:
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
        copy = sqlite3.connect(partial)
        try:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        finally:
            copy.close()
    finally:
        source.close()
    with partial.open("rb+") as f:
        os.fsync(f.fileno())
    partial.rename(target)
