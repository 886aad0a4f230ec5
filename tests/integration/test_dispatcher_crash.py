"""What was answered 2xx is never lost: kill -9, duplicates, a full disk, a damaged store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks.dispatcher import crash, load

from rave_dispatcher.adapters.store import connection as opening
from rave_dispatcher.adapters.store import maintenance, schema
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.domain.events import Event, Trace
from rave_dispatcher.domain.tasks import AgentType, Task
from tests import dispatcher
from tests.dispatcher import GITHUB, Dispatcher

KILLS = 25  # benchmarks/dispatcher/run does 200
RULES = [{"name": "all", "agent_type": "backend-architect", "prompt": "{{ $.n }}"}]


def requests(body: bytes = b'{"n": 1}') -> load.Requests:
    return load.Requests("/webhooks/github", GITHUB, body)


def test_nothing_that_was_acknowledged_is_lost_by_kill_9(tmp_path: Path) -> None:
    """The process is killed again and again while webhooks come in."""
    d = dispatcher.make(tmp_path)
    found = crash.kill_repeatedly(
        lambda: d.start(wait=False), d.kill, d.port, requests(), KILLS, random.Random(1)
    )  # fmt: skip
    try:
        stored = crash.stored_ids(d.store)
        assert found.kills == KILLS
        assert len(found.acknowledged) > 20 * KILLS, "the load was a load"
        assert found.broken > 0, "requests were cut off"
        assert found.acknowledged - stored == set()
        assert maintenance.Checker(d.store).run() is None
    finally:
        d.kill()


def test_tasks_survive_kill_9_and_each_event_becomes_one(tmp_path: Path) -> None:
    d = dispatcher.make(tmp_path, rules=RULES, tasks={"concurrency": 2, "max_attempts": 100})
    found = crash.kill_repeatedly(
        lambda: d.start(wait=False), d.kill, d.port, requests(), 5, random.Random(2), most=40
    )  # fmt: skip
    try:
        d.start()
        d.wait_for("/v1/tasks?status=running", lambda p: not p["items"], 60)
        end = time.monotonic() + 60
        while d.metric("rave_dispatcher_queue_depth") > 0 and time.monotonic() < end:
            time.sleep(0.2)
    finally:
        d.kill()
    with contextlib.closing(sqlite3.connect(d.store)) as c:
        assert c.execute("SELECT count(*) FROM events WHERE task_id IS NULL").fetchone() == (0,)
        by_event = c.execute("SELECT count(*), count(DISTINCT event_uuid) FROM tasks").fetchone()
        assert by_event[0] == by_event[1] >= len(found.acknowledged)
        assert c.execute("SELECT DISTINCT status FROM tasks").fetchall() == [("completed",)]


def test_duplicates_in_any_order_are_processed_once(tmp_path: Path) -> None:
    """3,000 deliveries, each three times, shuffled, by 32 senders at once."""
    ids = [str(uuid.uuid4()) for _ in range(3000)]
    order = ids * 3
    random.Random(3).shuffle(order)
    rules = [RULES[0] | {"types": ["push"]}]
    with dispatcher.running(tmp_path, rules=rules, agents={}) as d:
        outcome = asyncio.run(load.closed_loop(d.port, requests(), iter(order), 120, 32))
        assert outcome.statuses == {202: 9000}
        end = time.monotonic() + 60
        while (
            d.metric('rave_dispatcher_queue_depth{state="unprocessed"}') and time.monotonic() < end
        ):
            time.sleep(0.2)
        assert d.metric("rave_dispatcher_events_duplicate_total") == 6000
        assert d.metric("rave_dispatcher_deduplication_ratio") == pytest.approx(2 / 3)
    with contextlib.closing(sqlite3.connect(d.store)) as c:
        assert c.execute("SELECT count(*), count(DISTINCT delivery_id) FROM events").fetchone() == (
            3000, 3000,
        )  # fmt: skip
        assert c.execute("SELECT count(*), count(DISTINCT event_uuid) FROM tasks").fetchone() == (
            3000, 3000,
        )  # fmt: skip


# --- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system of its own needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], check=True)
    yield mount
    subprocess.run(["umount", "--lazy", mount], check=True)


@pytest.mark.parametrize("reserve_mb", [0, 1])
def test_a_full_disk_refuses_recovers_and_loses_nothing(
    tmp_path: Path, small_disk: Path, reserve_mb: float
) -> None:
    store = {"path": str(small_disk / "events.db"), "reserve_mb": reserve_mb}
    taken = []
    body = json.dumps({"x": "y" * 50_000}).encode()
    with dispatcher.running(tmp_path, store=store) as d:
        for n in range(400):
            answer = d.hook(body, f"first-{n}")
            if answer.status != 202:
                break
            taken.append(f"first-{n}")
        assert answer.status == 507, answer.body
        assert answer.headers["content-type"] == "application/problem+json"
        assert int(answer.headers["retry-after"]) > 0
        assert d.hook(body).status == 507, "and so it stays"
        assert d.get("/healthz").status == 200
        assert d.get("/readyz").status == (503 if reserve_mb else 200)
        listed = d.api("GET", "/v1/events?limit=1")
        assert listed.status == 200, "what is there can be read"
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
        for n in range(100):
            answer = d.hook(body, f"second-{n}")
            assert answer.status == 202, answer.body
            taken.append(f"second-{n}")
        assert d.get("/readyz").status == 200
        assert d.stop() == 0
        assert crash.stored_ids(d.store) >= set(taken)
        assert maintenance.Checker(d.store).run() is None


# --- a damaged store -------------------------------------------------------------------------


def filled(d: Dispatcher) -> None:
    d.start()
    for _ in range(50):
        assert d.hook(json.dumps({"x": "y" * 2000}).encode()).status == 202
    assert d.stop() == 0


@pytest.mark.parametrize("how", ["header", "pages", "not a database", "cut short"])
def test_a_damaged_store_is_not_used_and_the_way_back_is_said(tmp_path: Path, how: str) -> None:
    d = dispatcher.make(tmp_path)
    filled(d)
    backup = tmp_path / "backup.db"
    assert d.run("backup", str(backup)).returncode == 0
    content = bytearray(d.store.read_bytes())
    if how == "header":
        content[0:16] = b"x" * 16
    elif how == "pages":
        for at in range(4096 * 3, len(content) - 4096, 4096):
            content[at : at + 64] = os.urandom(64)
    elif how == "not a database":
        content = bytearray(b"this is a text\n" * 1000)
    else:
        del content[len(content) // 2 :]
    d.store.write_bytes(content)
    done = d.run("serve")
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    for words in ("is damaged", "Nothing was changed", "rave-dispatcher backup", str(d.store)):
        assert words in done.stderr
    assert d.store.read_bytes() == bytes(content)
    # as it says
    for end in ("", "-wal", "-shm"):
        d.store.with_name(d.store.name + end).unlink(missing_ok=True)
    backup.rename(d.store)
    d.start()
    try:
        assert len(d.api("GET", "/v1/events?limit=200").json()["items"]) == 50
        assert d.hook().status == 202
    finally:
        d.kill()


def test_damage_that_shows_later_stops_ingestion_and_is_said(tmp_path: Path) -> None:
    d = dispatcher.make(tmp_path)
    filled(d)
    d.start()
    try:
        content = bytearray(d.store.read_bytes())
        for at in range(4096 * 3, len(content), 4096):
            content[at : at + 64] = b"\xff" * 64
        d.store.write_bytes(content)
        end = time.monotonic() + 10
        while d.hook().status == 202:
            assert time.monotonic() < end
            d.api("GET", "/v1/events?limit=200")
        assert d.hook().status == 503
        assert "damaged" in d.get("/readyz").json()["reasons"][0]
    finally:
        d.kill()


def test_a_store_of_a_newer_dispatcher_is_left_alone(tmp_path: Path) -> None:
    d = dispatcher.make(tmp_path)
    filled(d)
    with contextlib.closing(sqlite3.connect(d.store)) as c:
        c.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    done = d.run("serve")
    assert done.returncode == 4
    assert "newer dispatcher" in done.stderr


def test_two_dispatchers_do_not_share_a_store(tmp_path: Path) -> None:
    with dispatcher.running(tmp_path) as d:
        other = dispatcher.make(tmp_path / "other", store=d.config["store"])
        done = other.run("serve")
        assert done.returncode == 1
        assert "another dispatcher uses" in done.stderr


# --- what else is kept -----------------------------------------------------------------------


def test_the_store_is_as_durable_as_it_says(tmp_path: Path) -> None:
    with dispatcher.running(tmp_path) as d:
        d.hook()
        done = d.run("check")
        assert done.returncode == 0
        assert json.loads(done.stdout) == {
            "journal_mode": "wal", "synchronous": 2, "user_version": schema.VERSION,
            "auto_vacuum": 2, "integrity_check": "ok",
        }  # fmt: skip


def test_retention_export_and_backup(tmp_path: Path) -> None:
    with dispatcher.running(tmp_path, rules=RULES, store={
        "path": str(tmp_path / "events.db"), "reserve_mb": 0, "retention_days": 1,
    }) as d:  # fmt: skip
        for n in range(3):
            d.hook(b'{"n": %d}' % n)
        d.wait_for("/v1/tasks?status=completed", lambda p: len(p["items"]) == 3)
        lines = [json.loads(x) for x in d.run("export").stdout.splitlines()]
        assert [x["kind"] for x in lines] == ["event"] * 3 + ["task"] * 3
        assert {json.loads(x["payload"])["n"] for x in lines[:3]} == {0, 1, 2}
        assert d.stop() == 0
    old = int((time.time() - 2 * 86400) * 1000)
    with contextlib.closing(sqlite3.connect(d.store)) as c, c:
        c.execute(
            "UPDATE events SET received_ms = ? WHERE CAST(payload AS TEXT) != '{\"n\": 2}'", (old,)
        )
        c.execute("UPDATE tasks SET completed_ms = ? WHERE prompt != '2'", (old,))
    assert "rows deleted" in d.run("prune").stdout
    lines = [json.loads(x) for x in d.run("export").stdout.splitlines()]
    assert [x["kind"] for x in lines] == ["event", "task"]
    with contextlib.closing(sqlite3.connect(d.store)) as c:
        assert c.execute("SELECT count(DISTINCT task_id) FROM task_log").fetchone() == (1,)


def test_what_of_a_damaged_store_can_be_read_is_exported(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    trace = Trace("a" * 32, "b" * 16)

    async def fill() -> None:
        store = await EventStore.open(path, 0)
        events = [Event(str(n), "x", str(n), "t", "p", n, b"{}", "s", trace) for n in range(4000)]
        await asyncio.gather(*(store.add_event(e) for e in events))
        for n in (1, 2):
            await store.add_task(Task(str(n), AgentType.AI_ENGINEER, "do", 4000, trace))
        await store.close()

    asyncio.run(fill())
    with contextlib.closing(sqlite3.connect(path)) as c:
        size = c.execute("PRAGMA page_size").fetchone()[0]
        leaves = [
            (int(pageno), int(cells))
            for pageno, cells in c.execute(
                "SELECT pageno, ncell FROM dbstat WHERE name = 'events' AND pagetype = 'leaf' "
                "ORDER BY path"
            )
        ]
        # damage that SQLite cannot see
        c.execute("UPDATE events SET source = CAST(x'ff41' AS TEXT) WHERE seq = 3000")
        c.execute("UPDATE tasks SET status = 'rUnning' WHERE task_id = '1'")
        c.commit()
    before = sum(cells for _, cells in leaves[:5])
    lost = range(before + 1, before + leaves[5][1] + 1)  # seq begins at 1
    with path.open("r+b") as f:
        f.seek((leaves[5][0] - 1) * size)
        f.write(b"\xff" * size)
    for since in (0, 2000):
        skipped: list[str] = []
        lines = [json.loads(x) for x in maintenance.export(path, since, skipped.append)]
        found = [int(x["event_uuid"]) + 1 for x in lines if x["kind"] == "event"]
        assert found == [n for n in range(since + 1, 4001) if n not in lost]
        assert [x["task_id"] for x in lines if x["kind"] == "task"] == ["2"]
        assert [s.partition(" cannot")[0] for s in skipped] == [
            f"events {lost[0]} to {lost[-1]}", "tasks 1",
        ]  # fmt: skip


def test_who_reads_on_and_on_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "LOG_BYTES", 1_000_000)
    monkeypatch.setattr(maintenance, "RESTART_FRAMES", 200)
    path = tmp_path / "events.db"
    trace = Trace("a" * 32, "b" * 16)

    async def load() -> float:
        store = await EventStore.open(path, 0)
        checkpointer = maintenance.Checkpointer(path, store.writer, asyncio.to_thread)
        slowest = 0.0
        number = 0
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM events").fetchone()
            for _ in range(20):
                for _ in range(20):
                    number += 1
                    body = b"z" * 8000
                    await store.add_event(
                        Event(f"{number}", "x", f"{number}", "t", "p", 1, body, "s", trace)
                    )
                began = time.monotonic()
                await checkpointer.look()
                slowest = max(slowest, time.monotonic() - began)
        await store.close()
        return slowest

    # the writer would wait for the reader as long as for another writer
    assert asyncio.run(load()) < opening.BUSY_MS / 1000


def test_a_check_that_is_stopped_ends_and_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.db"
    asyncio.run(_one_event(path))
    checker = maintenance.Checker(path)
    checker.stop()
    assert checker.run() is None
    assert maintenance.Checker(path).run() is None


async def _one_event(path: Path) -> None:
    store = await EventStore.open(path, 0)
    trace = Trace("a" * 32, "b" * 16)
    await store.add_event(Event("1", "x", "1", "t", "p", 1, b"{}", "s", trace))
    await store.close()


def test_a_migration_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as c:
        assert schema.migrate(c) == 0
        bad = (*schema.MIGRATIONS, "CREATE TABLE good (a); CREATE TABLE bad (")
        monkeypatch.setattr(schema, "MIGRATIONS", bad)
        with pytest.raises(sqlite3.Error):
            schema.migrate(c)
        if c.in_transaction:
            c.execute("ROLLBACK")
        assert schema.version_of(c) == len(bad) - 1
        assert c.execute("SELECT name FROM sqlite_master WHERE name = 'good'").fetchall() == []


def test_no_question_for_a_type_walks_through_all_events(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as c:
        schema.migrate(c)
        asked = "SELECT * FROM events WHERE event_type = ? AND seq < ? ORDER BY seq DESC LIMIT 20"
        (plan,) = c.execute(f"EXPLAIN QUERY PLAN {asked}", ("push", 9)).fetchall()
        assert "USING INDEX events_type" in plan[-1]


def test_a_store_of_a_former_version_goes_on_with_what_it_has(tmp_path: Path) -> None:
    with dispatcher.running(tmp_path, rules=RULES) as d:
        d.hook(b'{"n": 1}')
        d.wait_for("/v1/tasks?status=completed", lambda p: len(p["items"]) == 1)
        assert d.stop() == 0
    with contextlib.closing(sqlite3.connect(d.store)) as c:
        # as the first version had it
        c.executescript(
            "ALTER TABLE tasks DROP COLUMN rule; DROP INDEX events_type; PRAGMA user_version = 1;"
        )
    with dispatcher.running(tmp_path / "later", rules=RULES, store=d.config["store"]) as d:
        (task,) = d.wait_for("/v1/tasks", lambda p: p["items"])["items"]
        assert task["status"] == "completed"
        d.hook(b'{"n": 2}')
        d.wait_for("/v1/tasks?status=completed", lambda p: len(p["items"]) == 2)
        lines = [json.loads(x) for x in d.run("export").stdout.splitlines()]
    assert [x["rule"] for x in lines if x["kind"] == "task"] == [None, RULES[0]["name"]]


def test_a_client_that_waits_while_the_store_is_busy_is_not_forgotten(tmp_path: Path) -> None:
    """Another process holds the write lock for a moment; the answer comes when it is released."""
    with dispatcher.running(tmp_path) as d:
        d.hook()
        with contextlib.closing(sqlite3.connect(d.store, isolation_level=None)) as c:
            c.execute("BEGIN IMMEDIATE")
            answers = []
            client = threading.Thread(target=lambda: answers.append(d.hook(delivery="w").status))
            client.start()
            time.sleep(0.5)
            assert answers == []
            c.execute("COMMIT")
        client.join(10)
        assert answers == [202]


def test_the_log_begins_anew_under_a_load_that_never_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance, "CHECKPOINT_WORK", 50)
    monkeypatch.setattr(maintenance, "RESTART_FRAMES", 200)
    path = tmp_path / "events.db"

    def event(n: int) -> Event:
        trace = Trace("a" * 32, "b" * 16)
        return Event(str(n), "x", str(n), "t", "p", n, b"z" * 2000, "s", trace)

    async def load_and_look() -> None:
        store = await EventStore.open(path, 0)
        checkpointer = maintenance.Checkpointer(path, store.writer, asyncio.to_thread)
        looking = True

        async def look() -> None:
            while looking:
                await checkpointer.look()
                await asyncio.sleep(0.01)

        task = asyncio.create_task(look())
        for start in range(0, 4000, 20):
            await asyncio.gather(*(store.add_event(event(start + i)) for i in range(20)))
        looking = False
        await task
        wal = path.with_name("events.db-wal").stat().st_size
        await store.close()
        # without beginning anew it would hold each page of 4,000 events, some more than once
        assert wal < 8_000_000, wal

    asyncio.run(load_and_look())
    assert len(crash.stored_ids(path)) == 4000


def test_retention_gives_the_space_back_and_the_log_stays_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "LOG_BYTES", 4_000_000)
    monkeypatch.setattr(maintenance, "RESTART_FRAMES", 1000)
    path = tmp_path / "events.db"
    trace = Trace("a" * 32, "b" * 16)

    def event(n: int) -> Event:
        return Event(str(n), "x", str(n), "t", "p", n, b"z" * 8000, "s", trace)

    async def fill_and_prune() -> int:
        store = await EventStore.open(path, 0)
        for start in range(0, 10_000, 200):
            await asyncio.gather(*(store.add_event(event(start + n)) for n in range(200)))
        await store.writer.submit(
            lambda c: c.execute("UPDATE events SET processed = 1"), grows=False
        )
        await asyncio.to_thread(maintenance.checkpoint, path)
        assert path.stat().st_size > 80_000_000
        checkpointer = maintenance.Checkpointer(path, store.writer, asyncio.to_thread)
        pruning = asyncio.create_task(maintenance.prune(store.writer, 2**40))
        while not pruning.done():
            await checkpointer.look()
            await asyncio.sleep(0.02)
        assert await pruning == 10_000
        log = path.with_name("events.db-wal").stat().st_size
        await store.close()
        return log

    # it held 80 MB before
    assert asyncio.run(fill_and_prune()) < 20_000_000
    assert path.stat().st_size < 1_000_000


def test_a_group_that_fails_in_an_unforeseen_way_leaves_nobody_waiting(tmp_path: Path) -> None:
    trace = Trace("a" * 32, "b" * 16)

    async def two() -> None:
        store = await EventStore.open(tmp_path / "events.db", 0)
        async with asyncio.timeout(5):
            with pytest.raises(OverflowError):
                await store.add_event(Event("1", "x", "1", "t", "p", 2**70, b"{}", "s", trace))
            await store.add_event(Event("2", "x", "2", "t", "p", 2, b"{}", "s", trace))
        await store.close()

    asyncio.run(two())
    assert crash.stored_ids(tmp_path / "events.db") == {"2"}
