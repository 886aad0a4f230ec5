"""Senders and clients who mean it badly, against a dispatcher that runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from rave_dispatcher import service
from rave_dispatcher.adapters.http.gate import DISCARD_SECONDS
from rave_dispatcher.adapters.store.sqlite import MAX_SPANS
from rave_dispatcher.adapters.systemd import Notifier, Sockets
from rave_dispatcher.application.ports import TaskFilter
from rave_dispatcher.config import Config
from rave_dispatcher.domain.events import Trace
from rave_dispatcher.domain.tasks import AgentType, Status, Task
from tests.dispatcher import Dispatcher, github, make, running

RULE = {"name": "r", "agent_type": "backend-architect", "prompt": "do"}
SMALLEST_MB = 192  # what the shipped profiles give it at least


@pytest.mark.parametrize(
    ("condition", "payload"),
    [
        # exponential in Python's re, which no thread can interrupt
        ({"path": "$.t", "matches": "^(a+)+$"}, {"t": "a" * 60 + "!"}),
        # more values than fit into the service's memory
        (
            {"path": "$..*..*", "matches": "never"},
            {"a": [[[[[[[[[[1]] * 9] * 9] * 9] * 9] * 9] * 9]]]},
        ),
    ],
    ids=["expression", "path"],
)
def test_a_payload_that_makes_a_rule_endless_stops_nobody(
    tmp_path: Path, condition: dict[str, str], payload: Any
) -> None:
    bad_one = {**RULE, "types": ["bad"], "conditions": [condition]}
    with running(tmp_path, rules=[bad_one, {**RULE, "name": "g", "types": ["good"]}]) as d:
        bad = d.hook(json.dumps(payload).encode(), event="bad").json()["event_uuid"]
        after = d.hook(event="good").json()["event_uuid"]
        event = d.wait_for(f"/v1/events/{after}", lambda e: e["processed"])
        assert event["task_id"] is not None
        seen = d.wait_for(f"/v1/events/{bad}", lambda e: e["processed"])
        assert seen["task_id"] is None
        assert "the rules failed on an event" in d.log
        assert d.metric("rave_dispatcher_rules_failed_total") == 1
        assert peak_mb(d) < SMALLEST_MB


def test_a_list_of_large_events_fits_into_the_memory(tmp_path: Path) -> None:
    # a million characters that are 330,000 lists once they are parsed
    body = b'{"x": [' + b",".join([b"[]"] * 330_000) + b"]}"
    with running(tmp_path) as d:
        sent = [d.hook(body).json()["event_uuid"] for _ in range(12)]
        found, cursor = [], ""
        while cursor is not None:
            page = d.api("GET", f"/v1/events?limit=200{cursor and '&cursor=' + cursor}").json()
            found += [e["event_uuid"] for e in page["items"]]
            assert page["items"][0]["payload"] == json.loads(body)
            cursor = page["next_cursor"]
        assert found == sent[::-1]
        assert peak_mb(d) < SMALLEST_MB


def test_who_is_refused_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    more = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "Content-Type": "application/json"}
    with running(tmp_path) as d:
        for path in ("/webhooks/github", "/webhooks/nobody", "/v1/tasks", "/nowhere"):
            answer = d.request("POST", path, b"{}", more)
            assert 400 <= answer.status < 500
            assert answer.headers["x-trace-id"] == trace  # it can be found in the log all the same
        body = b"{}"
        assert d.request("POST", "/webhooks/github", body, github(body) | more).status == 202
        # spans are kept in the order of their end, so those of before would be there as well
        spans = d.wait_for(f"/v1/traces/{trace}", lambda page: page["items"])["items"]
        assert [s["name"] for s in spans] == ["POST /webhooks/{source}"]
        assert d.metric("rave_dispatcher_http_requests_total") >= 5


def test_a_trace_that_senders_made_endless_is_shown_in_part(tmp_path: Path) -> None:
    trace = "1af7651916cd43dd8448eb211c80319c"
    with running(tmp_path) as d, contextlib.closing(sqlite3.connect(d.store)) as c, c:
        rows = ((trace, f"{n:016x}", n, n + 1) for n in range(MAX_SPANS + 500))
        c.executemany("INSERT INTO spans VALUES (?, ?, NULL, 'x', ?, ?, 1, '{}')", rows)
        c.commit()
        assert len(d.api("GET", f"/v1/traces/{trace}").json()["items"]) == MAX_SPANS


def peak_mb(d: Dispatcher) -> float:
    """The most memory that the process ever had."""
    assert d.process is not None
    status = Path(f"/proc/{d.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        (("check", "--store", "GARBAGE"), 4, "file is not a database"),
        (("export", "--store", "GARBAGE"), 4, "file is not a database"),
        (("check", "--store", "EMPTY"), 4, "is no event store"),
        (("export", "--store", "EMPTY"), 1, "no such table"),
        (("check",), 1, "there is no store"),
        (("export",), 1, "there is no store"),
        (("prune",), 1, "there is no store"),
        (("backup", "BACKUP"), 1, "there is no store"),
        (("export", "--since", "nan"), 2, "--since"),
        (("export", "--since", "1e300"), 2, "--since"),
    ],
)
def test_commands_say_what_is_wrong(
    tmp_path: Path, words: tuple[str, ...], code: int, cause: str
) -> None:
    (tmp_path / "GARBAGE").write_bytes(b"no database" * 999)
    (tmp_path / "EMPTY").touch()
    d = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    done = d.run(*(str(tmp_path / w) if w.isupper() else w for w in words))
    assert (done.returncode, done.stdout) == (code, "")
    assert cause in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # none of them makes or changes a store
    assert (tmp_path / "EMPTY").stat().st_size == 0


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        *(
            json.dumps({"rules": [{**RULE, "conditions": [{"path": "$.a", "matches": m}]}]})
            for m in ("a{99999999999}", "(" * 500 + ")" * 500)
        ),
    ],
    ids=["deep", "repetition", "groups"],
)
def test_a_configuration_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    d = make(tmp_path)
    (tmp_path / "wrong").write_text(text)
    done = d.run("--config", str(tmp_path / "wrong"), "check")
    assert done.returncode == 2
    assert done.stderr.startswith("rave-dispatcher: ")
    assert done.stderr.count("\n") == 1


def test_bodies_of_who_signs_nothing_do_not_fill_the_memory(tmp_path: Path) -> None:
    head = b"POST /webhooks/github HTTP/1.1\r\nHost: x\r\nContent-Length: 1048576\r\n\r\n"
    with running(tmp_path) as d, contextlib.ExitStack() as stack:
        for _ in range(200):  # each but for its last byte
            c = stack.enter_context(socket.create_connection(("127.0.0.1", d.port), 5))
            c.sendall(head + b"x" * (2**20 - 1))
        time.sleep(DISCARD_SECONDS + 0.5)  # most are refused, and what they sent is let come
        assert peak_mb(d) < SMALLEST_MB
        stack.close()
        d.wait()
        body = b'{"x": "' + b"y" * 900_000 + b'"}'
        for _ in range(100):  # what was held is given back
            assert d.hook(body).status == 202


def test_a_collector_that_never_answers_does_not_hold_up_the_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with running(tmp_path, tracing={"otlp_endpoint": endpoint}) as d:
            for _ in range(600):  # more than a batch
                assert d.hook().status == 202
            assert d.stop(10) == 0  # what systemd waits for, in the machine


def test_beyond_the_connections_the_refusal_is_a_problem(tmp_path: Path) -> None:
    limits = {"connections": 4, "requests_per_second": 1e6, "burst": 1_000_000}
    with running(tmp_path, limits=limits) as d, contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(socket.create_connection(("127.0.0.1", d.port)))
        time.sleep(0.2)
        answer = d.hook()
        assert answer.status == 503
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"]


def test_a_clock_that_was_years_ahead_leaves_no_task_waiting_for_years(tmp_path: Path) -> None:
    new = {"agent_type": "backend-architect", "prompt": "do"}
    tasks = {"backoff_seconds": 0.2, "backoff_most_seconds": 1}
    with running(tmp_path, tasks=tasks, agents={"backend-architect": {"command": ["false"]}}) as d:
        task = d.api("POST", "/v1/tasks", new).json()["task_id"]
        d.wait_for(f"/v1/tasks/{task}", lambda t: t["status"] == "failed")
        d.kill()
        with contextlib.closing(sqlite3.connect(d.store)) as c, c:
            c.execute(
                "UPDATE tasks SET status = 'pending', attempt = 1, not_before_ms = "
                "not_before_ms + ?",
                (5 * 365 * 86_400_000,),
            )
        d.start()
        d.wait_for(f"/v1/tasks/{task}", lambda t: t["status"] == "failed")


def test_retention_does_not_wait_for_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is never up for so long would keep everything for ever."""
    monkeypatch.setattr(service, "FIRST_PRUNE_SECONDS", 0.1)
    store = {"path": str(tmp_path / "events.db"), "retention_days": 1e-6}
    config = {"store": store, "secrets_dir": str(tmp_path), "runner": {"kind": "unconfined"}}

    async def serve() -> bool:
        made = await service.Service.start(Config.model_validate(config), Notifier())
        await made.store.add_task(OLD)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            run = asyncio.create_task(made.run(Sockets([listening], [])))
            for _ in range(100):
                await asyncio.sleep(0.05)
                if gone := not (await made.store.tasks(TaskFilter(), None, 1)).items:
                    break
            made.stop()
            await run
        await made.close()
        return gone

    assert asyncio.run(serve())


OLD = Task(
    "t", AgentType.AI_ENGINEER, "do", 1, Trace("a" * 32, "b" * 16), status=Status.COMPLETED,
    completed_ms=2,
)  # fmt: skip
