"""Checks of the suite `http`: who may use which route, TLS, headers, response times.

All are asked from this host, through the forwarded port, as a user's browser would. What was
seen is recorded as JSON, one object per line, and judged apart from the asking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

from ravectl.model import Access, Plan, Route, Suite
from ravectl.verify import guest, web
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    at_once,
    judged,
    unreadable,
)

REQUESTS = 500
P99_MS = 200.0

# Who asks. The names stand in the records; the headers that they mean are made by _headers().
NOBODY_SIGNED_IN = "no credentials"
SIGNED_IN = "signed in"
WRONG_PASSWORD = "wrong password"  # noqa: S105
UNKNOWN_USER = "unknown user"
RIGHT_KEY = "right key"
WRONG_KEY = "wrong key"
RIGHT_TOKEN = "right token"  # noqa: S105
WRONG_TOKEN = "wrong token"  # noqa: S105

API_TOKEN = "dispatcher/api-token"  # noqa: S105 - a secret's name

# More of a page is not looked at; the router's is megabytes, which is seconds under TCG.
_BODY_KEPT = 4096

REFUSED = (401,)
HIDDEN = (403, 404)
REFUSED_WITHOUT_BODY = (401, 405)  # a request that has none cannot carry a signature over it
REFUSED_OR_HIDDEN = (401, 403, 404)


@dataclass(frozen=True)
class Trial:
    """A request and the statuses that it may get."""

    route: str
    host: str
    path: str
    who: str
    statuses: tuple[int, ...]

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.route} ({self.host}{self.path}), {self.who}"


def admissions(plan: Plan) -> list[Trial]:
    """For each route that somebody may use: requests by those who may."""
    who = {
        Access.ANYONE: (NOBODY_SIGNED_IN,),
        Access.SIGNED_IN: (SIGNED_IN,),
        Access.SIGNED_IN_OR_KEY: (SIGNED_IN, RIGHT_KEY),
        Access.BEARER: (RIGHT_TOKEN,),
    }
    return [_trial(r, w, (r.status,)) for r in plan.routes for w in who.get(r.access, ())]


def refusals(plan: Plan) -> list[Trial]:
    """For each route that somebody may not use: requests by those who may not."""
    found = []
    for r in plan.routes:
        outsiders: dict[str, tuple[int, ...]] = {}
        if r.access is Access.NOBODY:
            outsiders = {NOBODY_SIGNED_IN: REFUSED_OR_HIDDEN, SIGNED_IN: HIDDEN}
        elif r.access is Access.SIGNED:
            outsiders = {NOBODY_SIGNED_IN: REFUSED_WITHOUT_BODY}
        elif r.access is not Access.ANYONE:
            whom = (NOBODY_SIGNED_IN, WRONG_PASSWORD, UNKNOWN_USER, WRONG_KEY)
            outsiders = dict.fromkeys(whom, REFUSED)
        if r.access is Access.BEARER:  # neither the password nor the router's key is a token
            outsiders |= dict.fromkeys((SIGNED_IN, RIGHT_KEY, WRONG_TOKEN), REFUSED)
        if r.access is Access.SIGNED_IN:
            outsiders[RIGHT_KEY] = REFUSED  # it is the router's key and opens nothing else
        found += [_trial(r, who, statuses) for who, statuses in outsiders.items()]
    return found


def timed(plan: Plan) -> list[Trial]:
    """For each route that somebody may use: the request whose response time counts.

    For a route to a service that is the service's own health request: a page may be megabytes
    (the router's is), and then the time is that of the transfer.
    """
    first = {t.route: t for t in reversed(admissions(plan))}
    status = {s.health.port: s.health.status for s in plan.services}
    found = []
    for r in plan.routes:
        trial, path = first.get(r.name), plan.health_path(r)
        if trial and path and r.upstream_port:
            trial = dataclasses.replace(trial, path=path, statuses=(status[r.upstream_port],))
        if trial:
            found.append(trial)
    return found


def _trial(route: Route, who: str, statuses: tuple[int, ...]) -> Trial:
    host = route.host or web.DEFAULT_HOST
    return Trial(route.name, host, route.probe, who, statuses)


def _headers(target: VerifyTarget, who: str) -> dict[str, str]:
    user, password = target.ingress_user, target.ingress_password
    made_up = secrets.token_urlsafe(16)
    return {
        NOBODY_SIGNED_IN: {},
        SIGNED_IN: web.basic(user, password),
        WRONG_PASSWORD: web.basic(user, made_up),
        UNKNOWN_USER: web.basic(f"no-{user}", password),
        RIGHT_KEY: {"x-api-key": target.router_key},
        WRONG_KEY: {"x-api-key": made_up},
        RIGHT_TOKEN: web.bearer(target.delivery[API_TOKEN].strip()),
        WRONG_TOKEN: web.bearer(made_up),
    }[who]


def records(output: str) -> list[dict[str, Any]] | None:
    """The JSON objects of a probe's output, or None when it is not such."""
    found = []
    try:
        for line in output.splitlines():
            record = json.loads(line)
            if not isinstance(record, dict):
                return None
            found.append(record)
    except (ValueError, RecursionError):
        return None
    return found or None


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- H1, H2 ----------------------------------------------------------------------------------


def _collect_admissions(target: VerifyTarget, deadline: float) -> str:
    return _lines(_try_all(target, admissions(target.plan), deadline))


def _collect_refusals(target: VerifyTarget, deadline: float) -> str:
    return _lines(_try_all(target, refusals(target.plan), deadline))


def _try_all(
    target: VerifyTarget, trials: Sequence[Trial], deadline: float
) -> list[dict[str, object]]:
    context = web.trusting(target.ca_cert)
    rows: list[dict[str, object]] = []
    for host in dict.fromkeys(t.host for t in trials):
        with web.Client(target.endpoint.https_port, host, context, deadline) as client:
            for t in (t for t in trials if t.host == host):
                row: dict[str, object] = {"route": t.route, "who": t.who}
                try:
                    headers = _headers(target, t.who) | web.trial(target.router_key)
                    answer = client.get(t.path, headers, most=_BODY_KEPT)
                    row["status"] = answer.status
                except OSError as e:
                    row["error"] = web.explain(e)
                rows.append(row)
    return rows


def judge_trials(
    trials: Sequence[Trial], output: str, expected: str, remedy: str, *, must_answer: bool
) -> Judgement:
    """Every trial was made, and got one of the statuses that it may get.

    No answer is a fault if it `must_answer`; otherwise nothing is proven.
    """
    rows = records(output)
    if rows is None or not trials:
        return unreadable(expected, "no record of the requests")
    seen = {(str(r.get("route")), str(r.get("who"))): r for r in rows}
    faults, unanswered = [], []
    for t in trials:
        row = seen.get((t.route, t.who))
        if row is None:
            return unreadable(expected, f"no record of the request to {t.label}")
        status = row.get("status")
        if not isinstance(status, int):
            unanswered.append(f"{t.label}: {row.get('error', 'no answer')}")
        elif status not in t.statuses:
            wanted = " or ".join(map(str, t.statuses))
            faults.append(f"{t.label}: {status}, not {wanted}")
    if unanswered and not faults and not must_answer:
        return unreadable(expected, unanswered[0])
    faults += unanswered
    return judged(expected, f"{len(trials)} requests, each answered so", faults, remedy)


def judge_admissions(subject: Subject, output: str) -> Judgement:
    """Each route answers those who may use it as its row in the Plan says."""
    return judge_trials(
        admissions(subject.plan),
        output,
        "each route answers those who may use it",
        "look at the ingress and at the service behind the route: ravectl logs",
        must_answer=True,
    )


def judge_refusals(subject: Subject, output: str) -> Judgement:
    """Each route refuses those who may not use it."""
    return judge_trials(
        refusals(subject.plan),
        output,
        "each route refuses those who may not use it (401, or 403/404 where nobody may)",
        "take the machine down until this is mended: ravectl down; then render and build anew",
        must_answer=False,
    )


# --- H3 --------------------------------------------------------------------------------------

MISSING_PAGE = "/there-is-no-such-page"
_VERSION = re.compile(r"\b[a-z][a-z_-]+/\d+\.\d+(?:\.\d+)*", re.IGNORECASE)


def _collect_tls(target: VerifyTarget, deadline: float) -> str:
    port = target.endpoint.https_port
    context = web.trusting(target.ca_cert)
    rows: list[dict[str, object]] = []
    for host in hosts(target.plan):
        rows += _pages(target, host, context, deadline)
        rows.append(_try_old_tls(port, host, deadline))
    rows.append(_try_untrusted(port, deadline))
    malformed = b"GET / HTTP/1.1\r\nHost: a b\r\nConnection: close\r\n\r\n"
    rows.append(_raw_page("malformed request", port, malformed, deadline, context))
    rows.append(_raw_page("plain HTTP", port, b"GET / HTTP/1.0\r\n\r\n", deadline))
    return _lines(rows)


def hosts(plan: Plan) -> list[str]:
    """Every name that the ingress serves under."""
    return list(dict.fromkeys(r.host or web.DEFAULT_HOST for r in plan.routes))


def _pages(
    target: VerifyTarget, host: str, context: ssl.SSLContext, deadline: float
) -> list[dict[str, object]]:
    """What TLS was agreed on with `host`, and pages that it serves: found, refused, missing."""
    probes = [r.probe for r in target.plan.routes if (r.host or web.DEFAULT_HOST) == host]
    wanted = [
        (probes[0], SIGNED_IN),
        (probes[0], NOBODY_SIGNED_IN),
        (MISSING_PAGE, SIGNED_IN),
    ]
    rows: list[dict[str, object]] = []
    with web.Client(target.endpoint.https_port, host, context, deadline) as client:
        try:
            rows.append({"try": "trusted", "host": host, "version": client.tls_version})
            for path, who in wanted:
                answer = client.get(path, _headers(target, who), most=_BODY_KEPT)
                body = answer.body[:_BODY_KEPT] if answer.status >= 400 else b""
                rows.append(
                    {
                        "page": f"{host}{path}, {who}",
                        "status": answer.status,
                        "headers": dict(answer.headers),
                        "body": body.decode(errors="replace"),
                    }
                )
        except OSError as e:
            rows.append({"try": "trusted", "host": host, "error": web.explain(e)})
    return rows


def _try_old_tls(port: int, host: str, deadline: float) -> dict[str, object]:
    """Offer TLS 1.0 to 1.2 in one handshake; the server would take the newest that it speaks."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    # OpenSSL offers the old versions, with their hashes, only at its lowest security level
    context.set_ciphers("ALL:@SECLEVEL=0")
    row: dict[str, object] = {"try": "old", "host": host}
    try:
        with web.handshake(port, host, context, deadline) as sock:
            row["version"] = sock.version()
    except ssl.SSLError as e:
        # only an alert comes from the server; other errors are our own library's
        row["refused" if "ALERT" in (e.reason or "") else "error"] = e.reason or "unknown"
    except OSError as e:
        row["error"] = web.explain(e)
    return row


def _try_untrusted(port: int, deadline: float) -> dict[str, object]:
    """Hold the server's chain against a store that holds no CA at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    row: dict[str, object] = {"try": "untrusted"}
    try:
        with web.handshake(port, web.DEFAULT_HOST, context, deadline) as sock:
            row["version"] = sock.version()
    except ssl.SSLCertVerificationError as e:
        row["refused"] = e.verify_message
    except OSError as e:
        row["error"] = web.explain(e)
    return row


def _raw_page(
    name: str, port: int, request: bytes, deadline: float, context: ssl.SSLContext | None = None
) -> dict[str, object]:
    """The first bytes that the server answers to a request that is wrong."""
    row: dict[str, object] = {"raw": name}
    try:
        sock: socket.socket = (
            web.handshake(port, web.DEFAULT_HOST, context, deadline)
            if context
            else web.connect(port, deadline)
        )
        with sock:
            sock.settimeout(5.0)
            sock.sendall(request)
            row["text"] = _read_some(sock, deadline).decode(errors="replace")
    except OSError as e:
        row["error"] = web.explain(e)
    return row


def _read_some(sock: socket.socket, deadline: float) -> bytes:
    data = b""
    # a server may cut the connection when it has said what it had to say, or nothing
    with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
        while len(data) < _BODY_KEPT and time.monotonic() < deadline:
            chunk = sock.recv(_BODY_KEPT)
            if not chunk:
                break
            data += chunk
    return data


def judge_tls(subject: Subject, output: str) -> Judgement:
    """TLS 1.3 alone, the workspace's CA, security headers on every page, no versions shown."""
    expected = (
        "TLS 1.3 only, a chain to the workspace's CA and to no other, security headers on "
        "every page, no versions shown"
    )
    rows, names = records(output), hosts(subject.plan)
    if rows is None or not names:
        return unreadable(expected, "no record of the handshakes")
    faults: list[str] = []
    for host in names:
        trusted = [r for r in rows if r.get("try") == "trusted" and r.get("host") == host]
        old = [r for r in rows if r.get("try") == "old" and r.get("host") == host]
        if not trusted or len(old) != 1:
            return unreadable(expected, f"no record of the handshakes with {host}")
        if (open_question := _unproven(old[0])) is not None:
            return unreadable(expected, f"old TLS could not be tried with {host}: {open_question}")
        faults += [f for r in trusted for f in _trusted_faults(host, r)]
        if "version" in old[0]:
            faults.append(f"{host} speaks {old[0]['version']}")
    untrusted = [r for r in rows if r.get("try") == "untrusted"]
    if len(untrusted) != 1 or _unproven(untrusted[0]) is not None:
        return unreadable(expected, "the chain could not be held against an empty store")
    if "version" in untrusted[0]:
        faults.append("the chain is accepted without the workspace's CA")
    pages = [r for r in rows if "page" in r]
    raw = [r for r in rows if "raw" in r]
    if not faults and (len(pages) != 3 * len(names) or len(raw) != 2):
        return unreadable(expected, "no record of the pages")
    faults += [f for r in pages for f in page_faults(r)]
    faults += [f for r in pages for f in console_faults(r)]
    faults += [f for r in raw for f in _raw_faults(r)]
    return judged(
        expected,
        f"so on {len(names)} hosts and {len(pages) + len(raw)} pages",
        faults,
        "mend the ingress's configuration, then: ravectl build, ravectl up",
    )


def _unproven(row: Mapping[str, Any]) -> str | None:
    """Why a handshake that should be refused proved nothing, or None."""
    if "version" in row or isinstance(row.get("refused"), str):
        return None
    return str(row.get("error", "no record"))


def _trusted_faults(host: str, row: Mapping[str, Any]) -> list[str]:
    if "error" in row:
        return [f"{host}: {row['error']}"]
    version = row.get("version")
    return [] if version == "TLSv1.3" else [f"{host} agreed on {version}"]


def page_faults(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with the headers of a page, and what it shows of versions."""
    name, headers = str(row.get("page")), row.get("headers")
    if not isinstance(headers, dict):
        return [f"{name}: no headers"]
    h = {str(k).lower(): str(v) for k, v in headers.items()}
    csp = h.get("content-security-policy", "").lower()
    framing = _each(h.get("x-frame-options", ""), ("deny", "sameorigin"))
    rows = (
        ("strict-transport-security", _lasting(h.get("strict-transport-security", ""))),
        ("x-content-type-options", _each(h.get("x-content-type-options", ""), ("nosniff",))),
        ("x-frame-options", framing or "frame-ancestors" in csp),
        ("referrer-policy", h.get("referrer-policy", "").lower() not in ("", "unsafe-url")),
        ("content-security-policy", "-src" in csp or "frame-ancestors" in csp),
    )
    faults = [f"{name}: no good {header}" for header, good in rows if not good]
    for header in ("server", "x-powered-by", "via"):
        if re.search(r"\d", h.get(header, "")) or (header == "x-powered-by" and header in h):
            faults.append(f"{name}: {header} shows {h[header]!r}")
    faults += [f"{name}: shows {v}" for v in _versions(str(row.get("body", "")))]
    return faults


def console_faults(row: Mapping[str, Any]) -> list[str]:
    """What the console's policy, of all pages at `/` of the default host, allows and must not."""
    name = str(row.get("page"))
    if not name.startswith(f"{web.DEFAULT_HOST}/, "):
        return []
    h = {str(k).lower(): str(v).lower() for k, v in dict(row.get("headers") or {}).items()}
    csp = h.get("content-security-policy", "")
    good = "default-src 'none'" in csp and "'unsafe-" not in csp and "*" not in csp
    return [] if good else [f"{name}: its content-security-policy allows more than its own files"]


def _each(header: str, allowed: tuple[str, ...]) -> bool:
    """Whether each value of a header, which may have come twice, is allowed."""
    return all(value.strip().lower() in allowed for value in header.split(","))


def _lasting(hsts: str) -> bool:
    age = re.search(r"max-age=\"?([0-9]{1,12})", hsts, re.IGNORECASE)
    return age is not None and int(age[1]) > 0


def _versions(body: str) -> list[str]:
    # error pages are short and name their server in the foot: <center>nginx/1.26.3</center>
    return _VERSION.findall(re.sub(r"HTTP/\d(\.\d)?", "", body))[:3]


def _raw_faults(row: Mapping[str, Any]) -> list[str]:
    name, text = row["raw"], row.get("text")
    if not isinstance(text, str):
        return [f"{name}: {row.get('error', 'no answer')}"]
    return [f"{name}: the answer shows {v}" for v in _versions(text)]


# --- H4 --------------------------------------------------------------------------------------


# what the ingress itself says of its requests, by route (docs/observability.md)
COUNTED = "rave_http_request_duration_seconds_bucket"
# who counts may be behind: wait until it has nothing left to count
COUNTED_SCRIPT = """\
last=
for look in 1 2 3 4 5 6 7 8 9 10; do
  sleep 1
  now=$(curl -sS --max-time 30 'http://127.0.0.1:%d/metrics' 2>&1 | grep '^{COUNTED}')
  [ "$now" != "$last" ] || break
  last=$now
done
echo '== counted =='
echo "$now"
""".replace("{COUNTED}", COUNTED)
COUNTED_LEAST = 0.9  # the queue to who counts holds more than all of them; an overrun loses counts


def _collect_times(target: VerifyTarget, deadline: float) -> str:
    before = _counted(target, deadline)
    rows = _time_all(target, deadline)
    after = _counted(target, deadline)
    counts = {
        route: {le: n - before.get(route, {}).get(le, 0) for le, n in buckets.items()}
        for route, buckets in after.items()
    }
    return _lines([*rows, {"counted": counts}])


def _counted(target: VerifyTarget, deadline: float) -> dict[str, dict[str, int]]:
    port = target.plan.service("mtail").health.port
    return buckets(guest.run_script(target, COUNTED_SCRIPT % port, deadline))


def buckets(output: str) -> dict[str, dict[str, int]]:
    """Requests by route and by the time (seconds, as text) that they took at most."""
    found: dict[str, dict[str, int]] = {}
    for line in (guest.sections(output) or {}).get("counted", "").splitlines():
        if m := re.fullmatch(COUNTED + r'{route="([a-z-]+)",le="([^"]+)"} (\d+)', line):
            found.setdefault(m[1], {})[m[2]] = int(m[3])
    return found


def _time_all(target: VerifyTarget, deadline: float) -> list[dict[str, object]]:
    # the services at once, as people use them; the routes of one service one after the other, as
    # what is to be measured is its answer and not its queue
    own = target.plan.service("dispatcher").health.port  # whose console has a socket of its own
    port = {r.name: own if r.upstream_socket else r.upstream_port for r in target.plan.routes}
    groups: dict[int | None, list[Trial]] = {}
    for trial in timed(target.plan):
        groups.setdefault(port[trial.route], []).append(trial)
    calls = [partial(_time_routes, target, trials, deadline) for trials in groups.values()]
    return [row for rows in at_once(calls) for row in rows]


def _time_routes(
    target: VerifyTarget, trials: Sequence[Trial], deadline: float
) -> list[dict[str, object]]:
    return [_time_route(target, trial, deadline) for trial in trials]


def _time_route(target: VerifyTarget, trial: Trial, deadline: float) -> dict[str, object]:
    """Ask one route REQUESTS times over a kept-alive connection."""
    context, headers = web.trusting(target.ca_cert), _headers(target, trial.who)
    times: list[float] = []
    unexpected: Counter[str] = Counter()
    try:
        with web.Client(target.endpoint.https_port, trial.host, context, deadline) as client:
            for _ in range(REQUESTS):
                answer = client.get(trial.path, headers)
                times.append(round(answer.seconds * 1000, 1))
                if answer.status not in trial.statuses:
                    unexpected[str(answer.status)] += 1
    except OSError as e:
        unexpected[web.explain(e)] += 1
    return {"route": trial.route, "unexpected": dict(unexpected), "ms": times}


def nearest_rank(values: Sequence[float], percent: float) -> float:
    """The percentile of `values` by nearest rank: always one of them."""
    ordered = sorted(values)
    return ordered[max(math.ceil(len(ordered) * percent / 100), 1) - 1]


def judge_times(subject: Subject, output: str) -> Judgement:
    """The 99th percentile of each route is below P99_MS: as asked, and as the ingress counted."""
    expected = (
        f"p99 < {P99_MS:.0f} ms over {REQUESTS} requests on each route, by the ingress's count, too"
    )
    routes = [t.route for t in timed(subject.plan)]
    rows = records(output)
    if rows is None or not routes:
        return unreadable(expected, "no record of the requests")
    counted = next((r["counted"] for r in rows if "counted" in r), None)
    if not isinstance(counted, dict) or not counted:
        return unreadable(expected, "the ingress's requests are not counted")
    faults, seen = _counted_faults(routes, counted), []
    for route in routes:
        row = next((r for r in rows if r.get("route") == route), {})
        times, unexpected = row.get("ms"), row.get("unexpected")
        if not isinstance(unexpected, dict) or not _are_times(times):
            return unreadable(expected, f"no record of the requests to {route}")
        faults += [f"{route}: {n} times {what}" for what, n in unexpected.items()]
        if len(times) < REQUESTS:
            faults.append(f"{route}: {len(times)} of {REQUESTS} requests answered in time")
        if times:
            p99 = nearest_rank(times, 99)
            seen.append(f"{route} {p99:.0f} ms")
            if p99 >= P99_MS:
                faults.append(f"{route}: p99 is {p99:.0f} ms")
    remedy = "see what the machine is busy with: ravectl ssh -- top; or give it more CPUs"
    return judged(expected, ", ".join(seen), faults, remedy)


def _counted_faults(routes: Sequence[str], counted: Mapping[str, Any]) -> list[str]:
    """Where the ingress's own count does not bear out what was measured from outside."""
    faults = []
    for route in routes:
        mine = counted.get(route)
        by_time = mine if isinstance(mine, dict) else {}
        every = by_time.get("+Inf", 0)
        quick = by_time.get(f"{P99_MS / 1000:g}", 0)
        if every < REQUESTS * COUNTED_LEAST:
            faults.append(f"{route}: {every} requests are counted in the machine")
        elif quick < every * 0.99:
            faults.append(f"{route}: {every - quick} of {every} took {P99_MS:.0f} ms or more there")
    return faults


def _are_times(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in value
    )


CHECKS = (
    Check(
        "H1", Suite.HTTP, "every route answers those who may use it",
        Probe("admissions", _collect_admissions, 90.0), judge_admissions,
    ),
    Check(
        "H2", Suite.HTTP, "every route refuses those who may not",
        Probe("refusals", _collect_refusals, 90.0), judge_refusals,
    ),
    Check(
        "H3", Suite.HTTP, "TLS 1.3 only, own CA, security headers, no versions",
        Probe("tls", _collect_tls, 90.0), judge_tls,
    ),
    Check(
        "H4", Suite.HTTP, "p99 below 200 ms on every route",
        Probe("response-times", _collect_times, 240.0, alone=True), judge_times,
    ),
)  # fmt: skip
