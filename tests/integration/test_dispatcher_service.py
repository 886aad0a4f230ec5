"""The dispatcher as it runs: a process, real requests, real files."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from rave_dispatcher.application.collect_metrics import FRESH_MS
from rave_dispatcher.service import openapi_document
from tests import dispatcher
from tests.dispatcher import (
    ALERTS_TOKEN,
    AUTH,
    GITHUB,
    GITLAB,
    TOKEN,
    Dispatcher,
    github,
    standard,
)

ROOT = Path(__file__).resolve().parents[2]
PAYLOADS = sorted((ROOT / "tests/integration/payloads").glob("*.json"))
RULES = [
    {
        "name": "review",
        "agent_type": "backend-architect",
        "types": ["Merge Request Hook", "pull_request"],
        "conditions": [{"path": "$..draft", "equals": False}],
        "prompt": "Review {{ $.object_attributes.title }}{{ $.pull_request.title }}",
    },
    {"name": "alerts", "agent_type": "ai-engineer", "sources": ["alertmanager"], "prompt": "!"},
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dispatcher]:
    """One for all tests that only use it."""
    folder = tmp_path_factory.mktemp("service")
    limits = {
        "requests_per_second": 1e6, "burst": 1_000_000, "body_bytes": 200_000, "body_seconds": 1,
        "header_seconds": 1,
    }  # fmt: skip
    with dispatcher.running(folder, rules=RULES, limits=limits) as made:
        yield made


def is_problem(answer: dispatcher.Answer, status: int) -> dict[str, Any]:
    """A refusal as all refusals are."""
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    found = dict(answer.json())
    assert found["status"] == status
    assert re.fullmatch(r"[0-9a-f]{32}", found["trace_id"])
    assert found["trace_id"] == answer.headers["x-trace-id"]
    assert "Traceback" not in answer.body.decode()
    return found


# --- webhooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAYLOADS, ids=lambda p: p.stem)
def test_what_gitlab_and_github_send(service: Dispatcher, path: Path) -> None:
    recorded = json.loads(path.read_text())
    source = path.name.partition("-")[0]
    body = json.dumps(recorded["body"]).encode()
    headers = recorded["headers"]
    if source == "github":
        headers["X-Hub-Signature-256"] = github(body)["X-Hub-Signature-256"]
    else:
        headers["X-Gitlab-Token"] = GITLAB.decode()
    first = service.request("POST", f"/webhooks/{source}", body, headers)
    again = service.request("POST", f"/webhooks/{source}", body, headers)
    assert (first.status, again.status) == (202, 202)
    assert first.json() | {"duplicate": True} == again.json()
    assert not first.json()["duplicate"]
    event = service.wait_for(f"/v1/events/{first.json()['event_uuid']}", lambda e: e["processed"])
    assert event["payload"] == recorded["body"]
    assert event["event_type"] == headers.get("X-Gitlab-Event", headers.get("X-GitHub-Event"))
    assert event["project"] in ("finance/billing", "octo-org/hello-world")
    assert GITLAB.decode() not in json.dumps(event), "a token is no evidence, it is a secret"
    becomes_task = event["event_type"] in ("Merge Request Hook", "pull_request")
    assert (event["task_id"] is not None) == becomes_task


def test_one_trace_from_webhook_to_task(service: Dispatcher) -> None:
    body = b'{"draft": false, "pull_request": {"title": "T"}}'
    trace_id = uuid.uuid4().hex
    headers = github(body, event="pull_request") | {
        "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"
    }
    answer = service.request("POST", "/webhooks/github", body, headers)
    assert answer.json()["trace_id"] == answer.headers["x-trace-id"] == trace_id
    event = service.wait_for(f"/v1/events/{answer.json()['event_uuid']}", lambda e: e["task_id"])
    task = service.wait_for(f"/v1/tasks/{event['task_id']}", lambda t: t["status"] == "completed")
    assert task["trace_id"] == event["trace_id"] == trace_id
    spans = service.wait_for(f"/v1/traces/{trace_id}", lambda p: len(p["items"]) == 3)["items"]
    assert [s["name"] for s in spans] == ["POST /webhooks/{source}", "event", "task"]
    assert spans[0]["parent_id"] == "00f067aa0ba902b7"
    assert spans[1]["parent_id"] == spans[0]["span_id"]
    assert spans[2]["parent_id"] == spans[1]["span_id"]
    logged = [json.loads(line) for line in service.log.splitlines() if trace_id in line]
    assert [row["task_id"] for row in logged] == [task["task_id"]]
    output = service.api("GET", f"/v1/tasks/{task['task_id']}/logs")
    assert output.body == b"Review T"
    page = service.get("/metrics", {"Accept": "application/openmetrics-text"}).body.decode()
    assert 'trace_id="' in page, "exemplars"


def test_the_share_of_complete_traces(tmp_path: Path) -> None:
    """Of a task that ended just now the spans may be on their way."""
    body = b'{"draft": false, "pull_request": {"title": "T"}}'
    with dispatcher.running(tmp_path, rules=RULES) as d:
        trace_id = d.hook(body, event="pull_request").json()["trace_id"]
        d.wait_for(f"/v1/traces/{trace_id}", lambda p: len(p["items"]) == 3)

        def share_after(change: str) -> float:
            with contextlib.closing(sqlite3.connect(d.store)) as c, c:
                assert c.execute(change).rowcount == 1
            time.sleep(FRESH_MS / 1000)
            return d.metric("rave_dispatcher_trace_coverage_ratio")

        assert share_after("UPDATE spans SET name = 'another' WHERE name = 'event'") == 1.0
        assert share_after("UPDATE tasks SET completed_ms = completed_ms - 31000") == 0.0
        assert share_after("UPDATE spans SET name = 'event' WHERE name = 'another'") == 1.0


def test_standard_webhooks(service: Dispatcher) -> None:
    body = b'{"type": "user.created", "data": {}}'
    headers = standard(body, "msg_1", time.time())
    assert service.request("POST", "/webhooks/standard", body, headers).status == 202
    old = standard(body, "msg_2", time.time() - 301)
    assert "within 300 s" in is_problem(
        service.request("POST", "/webhooks/standard", body, old), 401
    )["detail"]  # fmt: skip


def test_alerts_become_events(service: Dispatcher) -> None:
    row = {"fingerprint": "f", "status": "firing", "startsAt": "2026-01-01T00:00:00Z"}
    body = {"version": "4", "groupKey": "g", "status": "firing", "alerts": [row]}
    first, again = (service.api("POST", "/alerts", body) for _ in range(2))
    assert (first.json()["duplicate"], again.json()["duplicate"]) == (False, True)
    path = f"/v1/events/{first.json()['event_uuid']}"
    event = service.wait_for(path, lambda e: e["task_id"])
    assert event["event_type"] == "alert.firing"
    assert service.request("POST", "/alerts", b"{}").status == 415
    unsigned = {"Content-Type": "application/json"}
    is_problem(service.request("POST", "/alerts", json.dumps(body).encode(), unsigned), 401)


def test_alertmanagers_token_opens_alerts_and_nothing_else(service: Dispatcher) -> None:
    row = {"fingerprint": "f", "status": "firing", "startsAt": "2026-01-01T00:00:00Z"}
    body = json.dumps({"groupKey": "g", "status": "firing", "alerts": [row]}).encode()
    headers = {"Authorization": f"Bearer {ALERTS_TOKEN}", "Content-Type": "application/json"}
    assert service.request("POST", "/alerts", body, headers).status == 202
    for method, path in (("GET", "/v1/events"), ("POST", "/v1/tasks"), ("POST", "/v1/metrics")):
        is_problem(service.request(method, path, body if method == "POST" else b"", headers), 401)


# --- the API ---------------------------------------------------------------------------------


def test_a_task_from_the_api(service: Dispatcher) -> None:
    made = service.api("POST", "/v1/tasks", {"agent_type": "backend-architect", "prompt": "héllo"})
    assert made.status == 202
    path = f"/v1/tasks/{made.json()['task_id']}"
    done = service.wait_for(path, lambda t: t["status"] == "completed")
    assert done["outcome"] == "succeeded"
    assert done["metrics"]["duration_ms"] > 0
    assert service.api("GET", path + "/logs").body.decode() == "héllo"
    assert service.api("GET", path + "/logs?offset=1&limit=2").body == "é".encode()
    is_problem(service.api("POST", path + "/cancel"), 409)
    is_problem(service.api("POST", path + "/replay"), 409)
    is_problem(service.api("GET", "/v1/tasks/none"), 404)
    found = service.api("GET", "/v1/tasks?limit=1&agent_type=backend-architect").json()
    assert len(found["items"]) == 1


def test_pushed_metrics(service: Dispatcher) -> None:
    row = {
        "metric_name": "tokens_used", "value": 12.5, "timestamp": "2026-01-01T00:00:00Z",
        "labels": {"model": "m"},
    }  # fmt: skip
    assert service.api("POST", "/v1/metrics", {"metrics": [row]}).status == 204
    assert service.metric("tokens_used") == 12.5
    is_problem(service.api("POST", "/v1/metrics", {"metrics": [row | {"metric_name": "1"}]}), 422)
    is_problem(service.api("POST", "/v1/metrics", {"metrics": [row | {"more": 1}]}), 422)


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer no"}, {"Authorization": f"Basic {TOKEN}"},
                {"Authorization": "Bearer"}, {"Authorization": "Bearer \xe9"}],
)  # fmt: skip
def test_only_who_has_the_token(service: Dispatcher, headers: dict[str, str]) -> None:
    answer = service.get("/v1/tasks", headers)
    is_problem(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("DELETE", "/v1/tasks", 405), ("GET", "/webhooks/github", 405),
     ("POST", "/webhooks/nobody", 404), ("GET", "/v2/tasks", 404), ("GET", "/docs", 404)],
)  # fmt: skip
def test_what_is_not_there(service: Dispatcher, method: str, path: str, status: int) -> None:
    body = b"{}" if method == "POST" else None
    is_problem(
        service.request(method, path, body, AUTH | {"Content-Type": "application/json"}), status
    )


def test_the_description_that_is_checked_in_is_the_one_that_is_served(service: Dispatcher) -> None:
    checked_in = json.loads((ROOT / "docs/api/openapi.json").read_text())
    assert checked_in == json.loads(openapi_document()), (
        "run: python -m rave_dispatcher openapi > docs/api/openapi.json"
    )
    assert service.get("/openapi.json").json() == checked_in
    assert checked_in["openapi"].startswith("3.1")


def test_health(service: Dispatcher) -> None:
    assert service.get("/healthz").body == b"ok\n"
    assert service.get("/readyz").json() == {"ready": True, "reasons": []}


def test_no_server_error_whatever_the_description_allows_or_not(service: Dispatcher) -> None:
    """schemathesis makes requests, right and wrong ones, from the OpenAPI document."""
    checks = (
        "not_a_server_error", "status_code_conformance", "content_type_conformance",
        "response_schema_conformance",
    )  # fmt: skip
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "--no-color",
            "run", ROOT / "docs/api/openapi.json", f"--url=http://127.0.0.1:{service.port}",
            f"--header=Authorization: Bearer {TOKEN}", f"--checks={','.join(checks)}",
            "--mode=all", "--max-examples=15", "--phases=examples,coverage,fuzzing", "--seed=1",
            "--continue-on-failure",
        ],
        capture_output=True, text=True, check=False, timeout=200, cwd=service.folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    asked = re.search(r"(\d+) generated", done.stdout)
    assert asked is not None, done.stdout
    assert int(asked[1]) > 300, done.stdout
    assert service.process is not None
    assert service.process.poll() is None
    assert '"level": "error"' not in service.log


# --- hostile input ---------------------------------------------------------------------------


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"\xff\xfe{}", 400), (b'{"a": "\xc3\x28"}', 400), (b"null", 400),
        (b'"text"', 400), (deep(65), 400), (deep(100_000), 400), (b'{"a":' * 50_000, 413),
        (b'{"a": Infinity}', 400), (b"x" * 200_001, 413), (b"\x00", 400),
        (b'{"a": "\\ud800"}', 400),
        (deep(64), 202), (b'{"a": 1e400}', 202), (b'{"a": ' + b"9" * 4000 + b"}", 202),
        (b'{"a": ' + b"9" * 5000 + b"}", 400),
    ],
)  # fmt: skip
def test_bodies_that_are_no_good(service: Dispatcher, body: bytes, status: int) -> None:
    before = service.metric("rave_dispatcher_queue_depth")
    answer = service.hook(body)
    if status != 202:
        is_problem(answer, status)
    else:
        assert answer.status == 202, answer.body
        event = service.api("GET", f"/v1/events/{answer.json()['event_uuid']}")
        assert event.status == 200, event.body
    assert service.metric("rave_dispatcher_queue_depth") >= before


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "a" * 999])
def test_another_media_type(service: Dispatcher, kind: str) -> None:
    headers = github(b"{}") | {"Content-Type": kind}
    is_problem(service.request("POST", "/webhooks/github", b"{}", headers), 415)


def test_refusals_are_counted_and_nothing_is_stored(service: Dispatcher) -> None:
    before = service.metric("rave_dispatcher_webhooks_refused_total")
    newest = service.api("GET", "/v1/events?limit=1").json()
    wrong = github(b"{}", secret=b"wrong")
    is_problem(service.request("POST", "/webhooks/github", b"{}", wrong), 401)
    assert service.metric("rave_dispatcher_webhooks_refused_total") == before + 1
    assert service.api("GET", "/v1/events?limit=1").json() == newest


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"no http at all\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000, b"431"),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"POST /webhooks/github HTTP/1.1\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"POST /webhooks/github HTTP/1.1\r\nContent-Length: 5x\r\n\r\n", b"400"),
        (b"POST /webhooks/github HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", b"400"),
        (b"POST /webhooks/github HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n", b"413"),
        (b"POST /webhooks/github HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        ((b"POST /webhooks/github HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n"
         b"\r\n{}"), b"400"),
        # a body that does not come, or not all of it
        (b"POST /webhooks/github HTTP/1.1\r\nContent-Length: 10\r\n\r\n{}", b"408"),
    ],
)  # fmt: skip
def test_http_that_is_no_good(service: Dispatcher, data: bytes, status: bytes) -> None:
    answer = service.raw(data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:300]
    assert b"application/problem+json" in answer
    assert b"Traceback" not in answer
    assert service.get("/healthz").status == 200


def test_a_body_beyond_the_limit_in_chunks(service: Dispatcher) -> None:
    chunk = b"%x\r\n" % 50_000 + b"x" * 50_000 + b"\r\n"
    head = b"POST /webhooks/github HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = service.raw(head + chunk * 6)
    assert answer.startswith(b"HTTP/1.1 413"), answer[:300]


def test_headers_that_trickle_are_cut_off(service: Dispatcher) -> None:
    with socket.create_connection(("127.0.0.1", service.port)) as s:
        s.settimeout(10)
        began = time.monotonic()
        s.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 8:
                s.sendall(b"x")
                time.sleep(0.2)
        assert time.monotonic() - began < 5


def test_a_thousand_clients_that_hang_up(service: Dispatcher) -> None:
    body = b'{"a": 1}'
    head = "\r\n".join(f"{k}: {v}" for k, v in github(body).items())
    for n in range(1000):
        with socket.create_connection(("127.0.0.1", service.port)) as s:
            s.sendall(
                f"POST /webhooks/github HTTP/1.1\r\n{head}\r\nContent-Length: 8\r\n\r\n".encode()
            )
            if n % 2:
                s.sendall(body)
    assert service.get("/healthz").status == 200
    assert service.metric("rave_dispatcher_http_requests_in_flight") <= 5


# --- secrets, rates, versions ----------------------------------------------------------------


def test_a_rotation_refuses_no_delivery_and_the_old_secret_ends(tmp_path: Path) -> None:
    with dispatcher.running(tmp_path) as d:
        secrets = tmp_path / "secrets"
        new = b"new-secret"
        until = int(time.time()) + 3
        for name, value in (
            ("github-secret.previous", GITHUB), ("github-secret.previous-until", b"%d" % until),
            ("github-secret", new), ("api-token", b"another"),
        ):  # fmt: skip
            (secrets / "x").write_bytes(value)
            (secrets / "x").rename(secrets / name)
        for secret in (GITHUB, new):
            headers = github(b"{}", secret=secret)
            assert d.request("POST", "/webhooks/github", b"{}", headers).status == 202
        assert d.get("/v1/tasks", AUTH).status == 401
        assert d.get("/v1/tasks", {"Authorization": "Bearer another"}).status == 200
        time.sleep(max(until - time.time(), 0) + 0.1)
        assert d.hook().status == 401
        for value in (GITHUB, new, b"another"):
            assert value.decode() not in d.log


def test_too_many_requests_of_one_client(tmp_path: Path) -> None:
    with dispatcher.running(tmp_path, limits={"requests_per_second": 1, "burst": 5}) as d:
        answers = [d.get("/v1/tasks", AUTH | {"X-Real-IP": "10.0.0.1"}) for _ in range(7)]
        assert [a.status for a in answers] == [200] * 5 + [429] * 2
        assert int(answers[-1].headers["retry-after"]) >= 1
        is_problem(answers[-1], 429)
        assert d.get("/v1/tasks", AUTH | {"X-Real-IP": "10.0.0.2"}).status == 200
        assert d.get("/healthz", {"X-Real-IP": "10.0.0.1"}).status == 200
        assert d.metric("rave_dispatcher_rate_limited_total") == 2


# --- life ------------------------------------------------------------------------------------


def test_a_restart_behind_a_socket_of_systemds_refuses_nobody(tmp_path: Path) -> None:
    """The listening socket outlives the process, as systemd holds it."""
    d = dispatcher.make(tmp_path)
    listener = socket.create_server(("127.0.0.1", d.port), backlog=256)
    listener.set_inheritable(True)
    # what systemd does, for each start: the socket as descriptor 3, and the pid that it is for
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ.update(LISTEN_FDS='1', "
        "LISTEN_PID=str(os.getpid())); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code, str(listener.fileno()), "-m", "rave_dispatcher",
                 "--config", d.config_file, "serve"],
                pass_fds=[listener.fileno()], stdout=log, stderr=log,
            )  # fmt: skip

    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                statuses.append(d.hook().status)
            except OSError as e:
                statuses.append(-(e.errno or 1))

    d.process = start()
    d.wait()
    client = threading.Thread(target=ask)
    client.start()
    try:
        for _ in range(3):
            time.sleep(0.5)
            assert d.stop() == 0, d.log
            d.process = start()
            d.wait()
    finally:
        stop.set()
        client.join(30)
        d.kill()
        listener.close()
    assert len(statuses) > 20
    assert set(statuses) == {202}


def test_readiness_and_the_watchdog_are_told_to_systemd(tmp_path: Path) -> None:
    d = dispatcher.make(tmp_path)
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(address)
        s.settimeout(20)
        d.start(env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "600000"})
        try:
            said = {s.recv(100) for _ in range(4)}
            assert said == {b"READY=1", b"WATCHDOG=1"}
            assert d.stop() == 0
            while (word := s.recv(100)) == b"WATCHDOG=1":
                pass
            assert word == b"STOPPING=1"
        finally:
            d.kill()


def test_sigterm_drains_and_gives_tasks_back(tmp_path: Path) -> None:
    agents = {"backend-architect": {"command": ["sh", "-c", "trap '' TERM; sleep 333 & sleep 334"]}}
    with dispatcher.running(tmp_path, agents=agents) as d:
        made = d.api("POST", "/v1/tasks", {"agent_type": "backend-architect", "prompt": "x"})
        path = f"/v1/tasks/{made.json()['task_id']}"
        d.wait_for(path, lambda t: t["status"] == "running")
        time.sleep(0.3)
        began = time.monotonic()
        assert d.stop() == 0
        assert time.monotonic() - began < 10
        end = time.monotonic() + 3  # a killed process takes a moment to be gone
        while running_with("sleep 333"):
            assert time.monotonic() < end, "the tree ended too"
            time.sleep(0.05)
        d.start()
        task = d.wait_for(path, lambda t: t["status"] == "running")
        assert task["attempt"] == 1


def running_with(words: str) -> bool:
    """Whether a process has these words as its command."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().replace(b"\0", b" ").strip() == words.encode():
                return True
    return False


def test_cancel_and_time_out_end_the_whole_tree(tmp_path: Path) -> None:
    slow = ["sh", "-c", "echo begun; (setsid sleep 431 &) ; sleep 432 & sleep 433"]
    agents = {
        "backend-architect": {"command": slow},
        "ai-engineer": {"command": ["sh", "-c", "sleep 434 & sleep 435"], "seconds": 1},
        "frontend-developer": {"command": ["/nowhere/at/all"]},
    }
    cgroup = writable_cgroup(tmp_path)
    home = str(tmp_path / "home")
    runner = {"kind": "unconfined", "home": home, "cgroup": cgroup and str(cgroup)}
    tasks = {"concurrency": 3, "lease_seconds": 1, "max_attempts": 1}
    with dispatcher.running(tmp_path, agents=agents, tasks=tasks, runner=runner) as d:
        made = {
            kind: d.api("POST", "/v1/tasks", {"agent_type": kind, "prompt": "x"}).json()["task_id"]
            for kind in agents
        }
        log = f"/v1/tasks/{made['backend-architect']}/logs"
        end = time.monotonic() + 10
        while d.api("GET", log).body != b"begun\n":
            assert time.monotonic() < end
            time.sleep(0.05)
        cancelled = d.api("POST", f"/v1/tasks/{made['backend-architect']}/cancel")
        assert cancelled.json()["cancel_requested"]
        outcomes = {
            kind: d.wait_for(f"/v1/tasks/{i}", lambda t: t["status"] == "failed")["outcome"]
            for kind, i in made.items()
        }
        assert outcomes == {
            "backend-architect": "cancelled", "ai-engineer": "timed-out",
            "frontend-developer": "not-started" if cgroup is None else "error",
        }  # fmt: skip
        time.sleep(0.5)
        left = [n for n in (431, 432, 433, 434, 435) if running_with(f"sleep {n}")]
        # only a cgroup also holds what left the session
        assert left == ([] if cgroup else [431])
    if cgroup is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes() == b"sleep\x00431\x00":
                    os.kill(int(path.parent.name), 9)
    else:
        assert list(cgroup.glob("rave-task-*")) == []
        cgroup.rmdir()


def writable_cgroup(tmp_path: Path) -> Path | None:
    """A cgroup v2 folder of our own, where this machine lets us make one."""
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.procs").exists() and (root / "cgroup.controllers").exists():
            made = root / f"rave-test-{tmp_path.name}-{os.getpid()}"
            with contextlib.suppress(OSError):
                made.mkdir()
                return made
    return None


def test_what_a_task_used_is_counted_by_its_cgroup(tmp_path: Path) -> None:
    cgroup = writable_cgroup(tmp_path)
    if cgroup is None:
        pytest.skip("no cgroup v2 that we may write; the machine's tests count in a unit's")
    burn = (
        "import time; x = bytearray(50_000_000); e = time.time() + 1\nwhile time.time() < e: pass"
    )
    agents = {"backend-architect": {"command": [sys.executable, "-c", burn]}}
    runner = {"kind": "unconfined", "home": str(tmp_path / "home"), "cgroup": str(cgroup)}
    with dispatcher.running(tmp_path, agents=agents, runner=runner) as d:
        made = d.api("POST", "/v1/tasks", {"agent_type": "backend-architect", "prompt": "x"})
        path = f"/v1/tasks/{made.json()['task_id']}"
        found = d.wait_for(path, lambda t: t["status"] == "completed")["metrics"]
    cgroup.rmdir()
    assert found["duration_ms"] >= 1000
    assert 5 < found["cpu_usage_percent"] <= 150
    if found["memory_usage_mb"] is not None:  # the memory controller may be elsewhere (v1)
        assert 50 < found["memory_usage_mb"] < 200


def test_spans_go_to_a_collector_by_otlp(tmp_path: Path) -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    try:
        with dispatcher.running(tmp_path, tracing={"otlp_endpoint": endpoint}) as d:
            trace_id = d.hook().json()["trace_id"]
            assert d.stop() == 0
    finally:
        server.shutdown()
    spans = [
        span
        for r in received
        for rs in r.resource_spans
        for ss in rs.scope_spans
        for span in ss.spans
    ]
    assert trace_id in [span.trace_id.hex() for span in spans]
    names = {
        a.value.string_value
        for r in received
        for rs in r.resource_spans
        for a in rs.resource.attributes
        if a.key == "service.name"
    }
    assert names == {"rave-dispatcher"}
