"""Senders and clients who mean it badly, against a dispatcher that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.dispatcher import Dispatcher, github, make, running

RULE = {"name": "r", "agent_type": "backend-architect", "prompt": "do"}
SMALLEST_MB = 192  # what the shipped profiles give it at least


@pytest.mark.parametrize(
    ("condition", "payload"),
    [
        # exponential in Python's re, which no thread can interrupt
        ({"path": "$.t", "matches": "^(a+)+$"}, {"t": "a" * 60 + "!"}),
        # more values than fit into the service's memory
        ({"path": "$..*..*", "matches": "never"}, {"a": [[[[[[[[[[1]] * 9] * 9] * 9] * 9] * 9]]]]}),
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
        event = d.wait_for(f"/v1/events/{after}", lambda e: e["processed"], 10)
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
