"""Checks of the dispatcher: webhooks become tasks, once; what is wrong is refused; nothing is lost.

What is asked from this host goes through the ingress, signed as GitLab and GitHub sign. What was
seen is recorded as JSON, one object per line, and judged apart from the asking.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from ravectl.model import Suite
from ravectl.verify import guest, web
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    judged,
    unreadable,
)
from ravectl.verify.http import API_TOKEN, records

GITHUB_SECRET, GITLAB_TOKEN = "dispatcher/github-secret", "dispatcher/gitlab-token"
GITHUB, GITLAB, API = "/webhooks/github", "/webhooks/gitlab", "/api/v1"
EVENT_TYPE = "rave-verify"  # the shipped rules make a task of it
DELIVERIES = 3
TASK_SECONDS = 60.0
TOO_LARGE = 2**20 + 1
STALE_SECONDS = 301  # Standard Webhooks tolerates five minutes
COVERAGE = 0.95
SPANS = ("POST /webhooks/{source}", "event", "task")
_LOGS = "see what the dispatcher says: ravectl logs dispatcher"


# --- asking ----------------------------------------------------------------------------------


def github_headers(secret: str, body: bytes, delivery: str, event: str) -> dict[str, str]:
    """How GitHub signs a delivery."""
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "X-GitHub-Event": event,
        "X-GitHub-Delivery": delivery,
        "X-Hub-Signature-256": f"sha256={signature}",
    }


def gitlab_headers(
    token: str, body: bytes, delivery: str, event: str, seconds: int
) -> dict[str, str]:
    """How a GitLab that signs (Standard Webhooks) signs a delivery at a time."""
    return standard_headers(token.encode(), body, delivery, seconds) | {"X-Gitlab-Event": event}


def standard_headers(key: bytes, body: bytes, delivery: str, seconds: int) -> dict[str, str]:
    """How Standard Webhooks signs a delivery at a time (seconds since 1970)."""
    signed = f"{delivery}.{seconds}.".encode() + body
    digest = hmac.new(key, signed, hashlib.sha256).digest()
    return {
        "Content-Type": "application/json",
        "webhook-id": delivery,
        "webhook-timestamp": str(seconds),
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }


class _Asker:
    """Makes the requests of a probe and records what came of them."""

    def __init__(self, target: VerifyTarget, client: web.Client) -> None:
        self._client = client
        self._token = web.bearer(target.delivery[API_TOKEN].strip())
        self.rows: list[dict[str, object]] = []

    def post(self, label: str, path: str, body: bytes, headers: Mapping[str, str]) -> Any:
        """Deliver; the JSON that came back."""
        row: dict[str, object] = {"try": label}
        self.rows.append(row)
        try:
            answer = self._client.post(path, body, headers)
        except OSError as e:
            row["error"] = web.explain(e)
            return {}
        row["status"] = answer.status
        document = _object(answer.body)
        keys = ("event_uuid", "trace_id", "duplicate")
        row.update({k: document[k] for k in keys if k in document and answer.status < 300})
        return document

    def get(self, path: str) -> Any:
        """Ask the API; an empty object when it does not answer."""
        return _object(self._client.get(API + path, self._token).body)

    def until(self, path: str, done: Any, deadline: float) -> Any:
        """Ask the API until an answer is as wanted, or the time is over."""
        while True:
            found = self.get(path)
            if done(found) or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _asking(target: VerifyTarget, deadline: float) -> web.Client:
    context = web.trusting(target.ca_cert)
    return web.Client(target.endpoint.https_port, web.DEFAULT_HOST, context, deadline)


def _text(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- H5 --------------------------------------------------------------------------------------


def _collect_webhook(target: VerifyTarget, deadline: float) -> str:
    nonce = secrets.token_hex(16)
    body = json.dumps({"nonce": nonce}).encode()
    headers = github_headers(target.delivery[GITHUB_SECRET].strip(), body, nonce, EVENT_TYPE)
    with _asking(target, deadline) as client:
        ask = _Asker(target, client)
        answers = [ask.post(f"{n + 1}", GITHUB, body, headers) for n in range(DELIVERIES)]
        event_uuid = str(answers[0].get("event_uuid"))
        by_then = min(deadline - 5, time.monotonic() + TASK_SECONDS)
        event = ask.until(f"/events/{event_uuid}", lambda e: e.get("task_id"), by_then)
        task_id = event.get("task_id")
        listed = ask.get(f"/events?event_type={EVENT_TYPE}&limit=20").get("items") or []
        mine = [e for e in listed if (e.get("payload") or {}).get("nonce") == nonce]
        ask.rows.append({"stored": len(mine), "task": task_id, "trace_id": event.get("trace_id")})
        if task_id:
            over = ("completed", "failed")
            path = f"/tasks/{task_id}"
            task = ask.until(path, lambda t: t.get("status") in over, by_then)
            trace_id = task.get("trace_id")
            ask.rows.append({k: task.get(k) for k in ("task_id", "trace_id", "status", "outcome")})
            spans = ask.until(
                f"/traces/{trace_id}", lambda p: len(p.get("items") or []) >= len(SPANS), by_then
            ).get("items") or []  # fmt: skip
            ask.rows.append({"spans": [s.get("name") for s in spans]})
        return _text(ask.rows)


def judge_webhook(subject: Subject, output: str) -> Judgement:
    """A delivery is stored once and becomes a task, in one trace."""
    expected = (
        f"a webhook delivered {DELIVERIES} times is stored once, and one trace leads to a task"
    )
    rows = records(output)
    tries = [r for r in rows or [] if "try" in r]
    stored = next((r for r in rows or [] if "stored" in r), None)
    if rows is None or len(tries) != DELIVERIES or stored is None:
        return unreadable(expected, "no record of the deliveries")
    faults = _delivery_faults(tries)
    if stored["stored"] != 1:
        faults.append(f"it is stored {stored['stored']} times")
    task = next((r for r in rows if "task_id" in r), None)
    spans: Any = next((r["spans"] for r in rows if "spans" in r), [])
    if not stored.get("task") or task is None:
        faults.append("it became no task")
    else:
        faults += _task_faults(tries, stored, task, spans)
    return judged(expected, "stored once, became a task, one trace", faults, _LOGS)


def _delivery_faults(tries: list[dict[str, Any]]) -> list[str]:
    faults = []
    for t in tries:
        if t.get("status") != 202:
            faults.append(f"delivery {t['try']} got {t.get('status') or t.get('error')}, not 202")
    if faults:
        return faults
    if [t.get("duplicate") for t in tries] != [False] + [True] * (len(tries) - 1):
        faults.append("the first delivery is new and the others are duplicates: not so here")
    if len({t.get("event_uuid") for t in tries}) != 1:
        faults.append("the deliveries became several events")
    return faults


def _task_faults(
    tries: list[dict[str, Any]], stored: dict[str, Any], task: dict[str, Any], spans: Any
) -> list[str]:
    faults = []
    if task.get("status") != "completed":
        faults.append(f"its task is {task.get('status')} ({task.get('outcome')})")
    traces = {t.get("trace_id") for t in tries} | {stored.get("trace_id"), task.get("trace_id")}
    if len(traces) != 1:
        faults.append("the trace is not the same throughout")
    missing = [s for s in SPANS if not isinstance(spans, list) or s not in spans]
    if missing:
        faults.append(f"the trace lacks {', '.join(missing)}")
    return faults


# --- H6 --------------------------------------------------------------------------------------

REFUSALS = {
    "wrong signature": 401, "no signature": 401, "signed long ago": 401, "signed ahead": 401,
    "too large": 413, "not JSON": 400,
}  # fmt: skip
COUNTERS = "rave_dispatcher_http_requests_total"
# only what a route of webhooks answered
COUNT_SCRIPT = f"""\
echo '== counters =='
curl -sS --max-time 30 http://127.0.0.1:%d/metrics | grep '^{COUNTERS}{{.*route="/webhooks/'
"""


def _collect_hostile(target: VerifyTarget, deadline: float) -> str:
    port = target.plan.service("dispatcher").health.port
    before = counters(guest.run_script(target, COUNT_SCRIPT % port, deadline))
    event = f"rave-refused-{secrets.token_hex(8)}"
    with _asking(target, deadline) as client:
        ask = _Asker(target, client)
        for label, (path, body, headers) in _hostile(target, event).items():
            ask.post(label, path, body, headers)
        found = ask.get(f"/events?event_type={event}&limit=5").get("items")
        ask.rows.append({"stored": len(found) if isinstance(found, list) else None})
    after = counters(guest.run_script(target, COUNT_SCRIPT % port, deadline))
    ask.rows.append({"counted": {k: after[k] - before.get(k, 0) for k in after}})
    return _text(ask.rows)


def _hostile(
    target: VerifyTarget, event: str
) -> dict[str, tuple[str, bytes, dict[str, str]]]:  # fmt: skip
    secret, token = (target.delivery[n].strip() for n in (GITHUB_SECRET, GITLAB_TOKEN))
    body, broken = b"{}", b"{"
    large = b'{"a": "' + b"x" * TOO_LARGE + b'"}'
    right = github_headers(secret, body, event, event)
    unsigned = {k: v for k, v in right.items() if k != "X-Hub-Signature-256"}
    made_up = secrets.token_urlsafe(24)
    now = int(time.time())
    old = gitlab_headers(token, body, event, event, now - STALE_SECONDS)
    ahead = gitlab_headers(token, body, event, event, now + 2 * STALE_SECONDS)
    return {
        "wrong signature": (GITHUB, body, github_headers(made_up, body, event, event)),
        "no signature": (GITHUB, body, unsigned),
        "signed long ago": (GITLAB, body, old),
        "signed ahead": (GITLAB, body, ahead),
        "too large": (GITHUB, large, github_headers(secret, large, event, event)),
        "not JSON": (GITHUB, broken, github_headers(secret, broken, event, event)),
    }


def counters(output: str) -> dict[str, int]:
    """Requests to webhooks by the status they got, as the dispatcher's metrics say."""
    found: dict[str, int] = {}
    for line in (guest.sections(output) or {}).get("counters", "").splitlines():
        if m := re.fullmatch(rf'{COUNTERS}{{.*status="(\d+)".*}} (\d+(?:\.\d+)?)', line):
            found[m[1]] = found.get(m[1], 0) + int(float(m[2]))
    return found


def judge_hostile(subject: Subject, output: str) -> Judgement:
    """What is wrong with a delivery is refused, counted, and not stored."""
    expected = f"{len(REFUSALS)} wrong deliveries are refused and counted, and nothing is stored"
    rows = records(output)
    statuses = {str(r["try"]): r for r in rows or [] if "try" in r}
    stored = next((r["stored"] for r in rows or [] if "stored" in r), None)
    counted = next((r["counted"] for r in rows or [] if "counted" in r), None)
    if set(statuses) != set(REFUSALS) or stored is None or not isinstance(counted, dict):
        return unreadable(expected, "no record of the deliveries")
    faults = []
    for label, wanted in REFUSALS.items():
        seen = statuses[label].get("status")
        if seen != wanted:
            faults.append(f"{label}: {seen or statuses[label].get('error')}, not {wanted}")
    if stored:
        faults.append(f"{stored} of them are stored")
    for status in sorted(set(REFUSALS.values())):
        wanted = sum(s == status for s in REFUSALS.values())
        seen = counted.get(str(status), 0)
        if not isinstance(seen, int) or seen < wanted:
            faults.append(f"{wanted} answers {status} were given, {seen} counted")
    return judged(expected, "each refused and counted, none stored", faults, _LOGS)


# --- D2, O4 ----------------------------------------------------------------------------------

STORE_SCRIPT = """\
echo '== store =='
runuser -u rave-dispatcher -- rave-dispatcher check 2>&1
"""
DURABLE = {"journal_mode": "wal", "synchronous": 2, "integrity_check": "ok"}


def _collect_store(target: VerifyTarget, deadline: float) -> str:
    return guest.run_script(target, STORE_SCRIPT, deadline, root=True)


def judge_store(subject: Subject, output: str) -> Judgement:
    """The event store is sound, and commits to the disk."""
    expected = "the event store is sound (integrity_check), in WAL mode, synchronous FULL"
    text = (guest.sections(output) or {}).get("store", "")
    found = _object(text.encode())
    if not found:
        if "is damaged" in text or "malformed" in text:
            return judged(expected, "", ["the event store is damaged"], _RESTORE)
        return unreadable(expected, text[:200] or "no answer")
    faults = [
        f"{key} is {found.get(key)}, not {wanted}"
        for key, wanted in DURABLE.items()
        if found.get(key) != wanted or isinstance(found.get(key), bool)
    ]
    return judged(expected, "sound, WAL, FULL", faults, _RESTORE)


_RESTORE = "the dispatcher's journal says how to restore it: ravectl logs dispatcher"

COVERAGE_SCRIPT = """\
echo '== coverage =='
curl -sS --max-time 30 http://127.0.0.1:%d/metrics 2>&1 \\
  | grep '^rave_dispatcher_trace_coverage_ratio '
"""


def _collect_coverage(target: VerifyTarget, deadline: float) -> str:
    port = target.plan.service("dispatcher").health.port
    return guest.run_script(target, COVERAGE_SCRIPT % port, deadline)


def judge_coverage(subject: Subject, output: str) -> Judgement:
    """Nearly all tasks can be followed from what caused them to their end."""
    expected = f"at least {COVERAGE:.0%} of the last hour's tasks have a complete trace"
    text = (guest.sections(output) or {}).get("coverage", "")
    m = re.fullmatch(r"rave_dispatcher_trace_coverage_ratio (\d(?:\.\d+)?(?:e-\d+)?)", text.strip())
    if m is None or not 0 <= float(m[1]) <= 1:
        return unreadable(expected, text[:200] or "no answer")
    ratio = float(m[1])
    faults = [] if ratio >= COVERAGE else [f"only {ratio:.1%} have one"]
    return judged(expected, f"{ratio:.0%} have one", faults, _LOGS)


HTTP_CHECKS = (
    Check(
        "H5", Suite.HTTP, "a webhook is stored once and becomes a task, in one trace",
        Probe("webhook", _collect_webhook, 150.0), judge_webhook,
    ),
    Check(
        "H6", Suite.HTTP, "wrong webhooks are refused, counted and not stored",
        Probe("hostile", _collect_hostile, 150.0), judge_hostile,
    ),
)  # fmt: skip
DATA_CHECKS = (
    Check(
        "D2", Suite.DATA, "the event store is sound and durable",
        Probe("eventstore", _collect_store, 180.0), judge_store,
    ),
)  # fmt: skip
OBSERVABILITY_CHECKS = (
    Check(
        "O4", Suite.OBSERVABILITY, "tasks have complete traces",
        Probe("coverage", _collect_coverage, 90.0), judge_coverage,
    ),
)  # fmt: skip
