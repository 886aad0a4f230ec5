"""The event store's port, on SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rave_dispatcher.adapters.store import connection as opening
from rave_dispatcher.adapters.store import recent
from rave_dispatcher.adapters.store.rows import (
    EVENT_COLUMNS,
    INSERT_TASK,
    TASK_COLUMNS,
    UPDATE_TASK,
    cursor_of,
    event_of,
    seq_of,
    task_of,
    task_row,
)
from rave_dispatcher.adapters.store.writer import Writer
from rave_dispatcher.application.errors import DispatcherError, NotFoundError
from rave_dispatcher.application.ports import (
    Decision,
    EventFilter,
    Figures,
    Incoming,
    Page,
    Receipt,
    TaskFilter,
)
from rave_dispatcher.domain.events import Event, Trace
from rave_dispatcher.domain.metrics import Metric
from rave_dispatcher.domain.queue import Waiting
from rave_dispatcher.domain.tasks import Task

T = TypeVar("T")
LOG_PIECE = 64 * 1024
MAX_SPANS = 1000  # of a trace that is shown: senders may name one trace for all they send
# of a list: what senders wrote must not fill the memory; as JSON it is more: ravectl reads 4 MiB
PAGE_BYTES = 3 * 2**20


@dataclass(frozen=True, slots=True)
class SpanRow:
    """A span as it is kept."""

    trace_id: str
    span_id: str
    parent_id: str | None
    name: str
    start_ns: int
    end_ns: int
    ok: bool
    attributes: str  # JSON


class EventStore:
    """Use `open`. One process at a time: the caller holds the lock."""

    def __init__(self, path: Path, writer: Writer) -> None:
        self._path, self._writer = path, writer
        # beside the writer; two, so that a long list holds nothing up
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="store-reader")
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._replayed: set[str] = set()  # events that wait for the rules once more

    @classmethod
    async def open(cls, path: Path, reserve: int) -> EventStore:
        """Open or make the store. Raises CorruptStoreError, which says how to restore it."""
        connection = await asyncio.to_thread(opening.open_store, path)
        return cls(path, Writer(path, connection, reserve))

    @property
    def writer(self) -> Writer:
        """For maintenance and spans."""
        return self._writer

    @property
    def path(self) -> Path:
        """Its file."""
        return self._path

    async def close(self) -> None:
        """Finish what was begun."""
        await asyncio.to_thread(self._readers.shutdown)
        for connection in self._connections:  # SQLite clears its log away when the last one goes
            connection.close()
        await asyncio.to_thread(self._writer.close)

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def guarded() -> T:
            try:
                return work(self._connection())
            except sqlite3.Error as e:
                if opening.is_corrupt(e):
                    self._writer.corrupt = str(e)
                raise opening.translate(e) from None

        return await asyncio.get_running_loop().run_in_executor(self._readers, guarded)

    def _connection(self) -> sqlite3.Connection:
        """This thread's."""
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = opening.connect(self._path, read_only=True)
            self._connections.append(found)
        return found

    # --- events ------------------------------------------------------------------------------

    async def add_event(self, event: Event) -> Receipt:
        """Keep an event, unless one of its source and delivery id is there."""
        return await self._writer.add_event(event)

    async def incoming(self, limit: int) -> list[Incoming]:
        """The oldest events that no rule has seen."""
        rows = await self._read(
            lambda c: c.execute(
                "SELECT seq, event_uuid, source, event_type, project, received_ms, trace_id, "
                "span_id FROM events WHERE processed = 0 ORDER BY seq LIMIT ?",
                (limit,),
            ).fetchall()
        )
        return [
            Incoming(
                seq,
                uuid,
                source,
                kind,
                project,
                received,
                Trace(trace_id, span_id),
                replayed=uuid in self._replayed,
            )
            for seq, uuid, source, kind, project, received, trace_id, span_id in rows
        ]

    async def payload(self, event_uuid: str) -> bytes:
        """What an event carried."""
        sql = "SELECT payload FROM events WHERE event_uuid = ?"
        row = await self._read(lambda c: c.execute(sql, (event_uuid,)).fetchone())
        if row is None:
            raise NotFoundError(f"there is no event {event_uuid}")
        return bytes(row[0])

    async def decide(self, decisions: Sequence[Decision]) -> None:
        """Mark events as processed, and keep the tasks that they became, in one step."""
        await self._writer.submit(lambda c: _decide(c, decisions), grows=False)
        self._replayed -= {d.event_uuid for d in decisions}

    async def event(self, event_uuid: str) -> Event:
        """An event."""
        return await self._read(lambda c: _event(c, event_uuid))

    async def events(self, which: EventFilter, cursor: str | None, limit: int) -> Page[Event]:
        """Events, the newest first."""
        processed = None if which.processed is None else int(which.processed)
        given = {"source": which.source, "event_type": which.event_type, "processed": processed}
        select = f"SELECT {EVENT_COLUMNS} FROM events"  # noqa: S608 - names of our own
        rows, more = await self._page(select, given, cursor, limit)
        return Page([event_of(r) for r in rows], cursor_of(rows[-1][0]) if more else None)

    async def replay_event(self, event_uuid: str) -> Event:
        """Have the rules see an event once more."""

        def work(c: sqlite3.Connection) -> Event:
            c.execute(
                "UPDATE events SET processed = 0, task_id = NULL WHERE event_uuid = ?",
                (event_uuid,),
            )
            return _event(c, event_uuid)

        self._replayed.add(event_uuid)
        try:
            return await self._writer.submit(work, grows=False)
        except DispatcherError:
            self._replayed.discard(event_uuid)
            raise

    # --- tasks -------------------------------------------------------------------------------

    async def add_task(self, task: Task) -> None:
        """Keep a new task."""
        await self._writer.submit(lambda c: c.execute(INSERT_TASK, task_row(task)), grows=True)

    async def task(self, task_id: str) -> Task:
        """A task."""
        return await self._read(lambda c: _task(c, task_id))

    async def tasks(self, which: TaskFilter, cursor: str | None, limit: int) -> Page[Task]:
        """Tasks, the newest first."""
        given = {"status": which.status, "agent_type": which.agent_type, "project": which.project}
        select = f"SELECT {TASK_COLUMNS} FROM tasks"  # noqa: S608 - names of our own
        rows, more = await self._page(select, given, cursor, limit)
        return Page([task_of(r) for r in rows], cursor_of(rows[-1][0]) if more else None)

    async def _page(
        self, select: str, given: Mapping[str, object], cursor: str | None, limit: int
    ) -> tuple[list[tuple[Any, ...]], bool]:
        wanted = {k: v for k, v in given.items() if v is not None}
        # rows are numbered as they come, so a page is stable while others are added
        where = "".join(f" AND {k} = ?" for k in wanted)
        sql = f"{select} WHERE seq < ?{where} ORDER BY seq DESC LIMIT ?"
        values = (seq_of(cursor), *wanted.values(), limit + 1)
        rows = await self._read(lambda c: _at_most(c.execute(sql, values), PAGE_BYTES))
        more = len(rows) > limit or rows[-1:] == [()]
        return [r for r in rows[:limit] if r], more

    async def step(self, task_id: str, change: Callable[[Task], Task]) -> Task:
        """Change a task in one transaction. Passes on what `change` raises."""

        def work(c: sqlite3.Connection) -> Task:
            changed = change(_task(c, task_id))
            c.execute(UPDATE_TASK, (*task_row(changed), task_id))
            return changed

        return await self._writer.submit(work, grows=False)

    async def hasten(self, latest_ms: int) -> None:
        """Have no task wait for its next attempt until later than `latest_ms`."""
        sql = "UPDATE tasks SET not_before_ms = ? WHERE status = 'pending' AND not_before_ms > ?"
        await self._writer.submit(lambda c: c.execute(sql, (latest_ms,) * 2), grows=False)

    async def waiting(self, now_ms: int) -> list[Waiting]:
        """The task that waits longest, of each project and priority."""
        sql = (
            "SELECT t.task_id, t.project, t.priority, t.not_before_ms, t.seq FROM tasks t JOIN "
            "(SELECT min(seq) AS seq FROM tasks WHERE status = 'pending' AND not_before_ms <= ? "
            "GROUP BY project, priority) AS first USING (seq)"
        )
        rows = await self._read(lambda c: c.execute(sql, (now_ms,)).fetchall())
        return [Waiting(*r) for r in rows]

    async def running(self) -> list[Task]:
        """The tasks that are leased."""
        sql = f"SELECT {TASK_COLUMNS} FROM tasks WHERE status = 'running' ORDER BY seq"  # noqa: S608
        return [task_of(r) for r in await self._read(lambda c: c.execute(sql).fetchall())]

    # --- output ------------------------------------------------------------------------------

    async def append_log(self, task_id: str, attempt: int, data: bytes) -> None:
        """Keep a piece of a task's output."""
        await self._writer.submit(lambda c: _append_log(c, task_id, attempt, data), grows=True)

    async def log(self, task_id: str, offset: int, limit: int) -> tuple[bytes, int]:
        """A piece of a task's output from `offset`, and how long all of it is."""
        return await self._read(lambda c: _log(c, task_id, offset, limit))

    # --- metrics, spans, figures -------------------------------------------------------------

    async def add_metrics(self, metrics: Sequence[Metric]) -> None:
        """Keep pushed metrics."""
        rows = [
            (m.name, m.value, m.timestamp_ms, json.dumps(dict(m.labels)), m.trace_id)
            for m in metrics
        ]
        sql = "INSERT INTO metrics (name, value, timestamp_ms, labels, trace_id) VALUES (?,?,?,?,?)"
        await self._writer.submit(lambda c: c.executemany(sql, rows), grows=True)

    def post_spans(self, spans: Sequence[SpanRow]) -> None:
        """Keep spans, soon; nobody waits for them."""
        rows = [
            (s.trace_id, s.span_id, s.parent_id, s.name, s.start_ns, s.end_ns, int(s.ok),
             s.attributes)
            for s in spans
        ]  # fmt: skip
        # one call into SQLite for all of them: see writer.py
        text = json.dumps(rows, ensure_ascii=False)
        columns = ", ".join(f"value ->> {i}" for i in range(8))
        sql = f"INSERT OR IGNORE INTO spans SELECT {columns} FROM json_each(?)"  # noqa: S608
        self._writer.post(lambda c: c.execute(sql, (text,)))

    async def trace(self, trace_id: str) -> list[SpanRow]:
        """The spans of a trace, in their order: the first MAX_SPANS."""
        sql = "SELECT * FROM spans WHERE trace_id = ? ORDER BY start_ns, span_id LIMIT ?"
        rows = await self._read(lambda c: c.execute(sql, (trace_id, MAX_SPANS)).fetchall())
        return [
            SpanRow(i, span, parent, name, start, end, bool(ok), attributes)
            for i, span, parent, name, start, end, ok, attributes in rows
        ]

    async def recent(self, limit: int) -> tuple[recent.Rows, recent.Rows]:
        """So many of the newest events and tasks, for a page that lists them."""
        return await self._read(lambda c: recent.recent(c, limit))

    async def figures(self, now_ms: int) -> Figures:
        """How full it is at `now_ms`, of the clock that tasks wait by."""
        found = await self._read(lambda c: _counts(c, now_ms))
        size = sum(_size(self._path.with_name(self._path.name + end)) for end in ("", "-wal"))
        return Figures(*found, store_bytes=size, free_bytes=opening.free_bytes(self._path))

    async def trace_coverage(self, since_ms: int, until_ms: int) -> tuple[int, int]:
        """Of the tasks that ended between: how many have a complete trace, how many there are."""
        rows = await self._read(lambda c: c.execute(_COVERAGE, (since_ms, until_ms)).fetchall())
        complete, every = rows[0]
        return (int(complete or 0), int(every))


# A trace is complete when it has what took the task in (a webhook or a request to the API), the
# event if there was one, and the attempt.
_COVERAGE = """
SELECT sum(
  EXISTS (SELECT 1 FROM spans s WHERE s.trace_id = t.trace_id AND s.name LIKE 'POST /%')
  AND EXISTS (SELECT 1 FROM spans s WHERE s.trace_id = t.trace_id AND s.name = 'task')
  AND (t.event_uuid IS NULL
       OR EXISTS (SELECT 1 FROM spans s WHERE s.trace_id = t.trace_id AND s.name = 'event'))
), count(*)
FROM tasks t WHERE completed_ms >= ? AND completed_ms < ? AND attempt > 0
"""


def _at_most(rows: Iterable[tuple[Any, ...]], most: int) -> list[tuple[Any, ...]]:
    """Rows as long as they are not larger than `most`, but one at least; then an empty one when
    there are more."""
    taken: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        size += sum(len(v) for v in row if isinstance(v, str | bytes))
        if taken and size > most:
            return [*taken, ()]
        taken.append(row)
    return taken


def _event(c: sqlite3.Connection, event_uuid: str) -> Event:
    sql = f"SELECT {EVENT_COLUMNS} FROM events WHERE event_uuid = ?"  # noqa: S608
    row = c.execute(sql, (event_uuid,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no event {event_uuid}")
    return event_of(row)


def _task(c: sqlite3.Connection, task_id: str) -> Task:
    sql = f"SELECT {TASK_COLUMNS} FROM tasks WHERE task_id = ?"  # noqa: S608
    row = c.execute(sql, (task_id,)).fetchone()
    if row is None:
        raise NotFoundError(f"there is no task {task_id}")
    return task_of(row)


def _decide(c: sqlite3.Connection, decisions: Sequence[Decision]) -> None:
    # most become no task: one statement for all of those
    rest = json.dumps([d.event_uuid for d in decisions if d.task is None])
    c.execute(
        "UPDATE events SET processed = 1 WHERE event_uuid IN (SELECT value FROM json_each(?)) "
        "AND processed = 0",
        (rest,),
    )
    for d in decisions:
        if d.task is None:
            continue
        # an event is decided once, whoever looked at it twice
        done = c.execute(
            "UPDATE events SET processed = 1, task_id = ? WHERE event_uuid = ? AND processed = 0",
            (d.task.task_id, d.event_uuid),
        )
        if done.rowcount == 1:
            c.execute(INSERT_TASK, task_row(d.task))


def _append_log(c: sqlite3.Connection, task_id: str, attempt: int, data: bytes) -> None:
    sql = "SELECT start + length(data) FROM task_log WHERE task_id = ? ORDER BY start DESC LIMIT 1"
    row = c.execute(sql, (task_id,)).fetchone()
    start = row[0] if row else 0
    for at in range(0, len(data), LOG_PIECE):
        piece = data[at : at + LOG_PIECE]
        c.execute("INSERT INTO task_log VALUES (?, ?, ?)", (task_id, start + at, piece))


def _log(c: sqlite3.Connection, task_id: str, offset: int, limit: int) -> tuple[bytes, int]:
    _task(c, task_id)
    sql = "SELECT start + length(data) FROM task_log WHERE task_id = ? ORDER BY start DESC LIMIT 1"
    row = c.execute(sql, (task_id,)).fetchone()
    total = row[0] if row else 0
    rows = c.execute(
        "SELECT start, data FROM task_log WHERE task_id = ? AND start > ? AND start < ? "
        "ORDER BY start",
        (task_id, offset - LOG_PIECE - 1, offset + limit),
    ).fetchall()
    if not rows:
        return b"", total
    text = b"".join(data for _, data in rows)
    begin = offset - rows[0][0]
    return text[begin : begin + limit], total


def _counts(c: sqlite3.Connection, now_ms: int) -> tuple[int, int, int, int, int, int | None]:
    by_status = dict(c.execute("SELECT status, count(*) FROM tasks GROUP BY status").fetchall())
    unprocessed, oldest_event = c.execute(
        "SELECT count(*), (SELECT received_ms FROM events WHERE processed = 0 ORDER BY seq LIMIT 1)"
        " FROM events WHERE processed = 0"
    ).fetchone()
    since = c.execute(
        "SELECT min(not_before_ms) FROM tasks WHERE status = 'pending' AND not_before_ms <= ?",
        (now_ms,),
    ).fetchone()[0]
    return (
        by_status.get("pending", 0), by_status.get("running", 0), by_status.get("failed", 0),
        unprocessed, 0 if since is None else now_ms - since, oldest_event,
    )  # fmt: skip


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
