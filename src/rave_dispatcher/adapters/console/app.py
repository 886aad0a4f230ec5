"""HTTP of the console: its files and its data, by GET only. ASGI without a framework, for speed.

It is served at a socket of its own, which only the ingress can open (ADR 9): whoever gets here
has signed in. The ingress also sets the headers that all pages have, with the console's
Content-Security-Policy.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rave_dispatcher.adapters.console import queries
from rave_dispatcher.adapters.console.parts import Parts
from rave_dispatcher.adapters.http import problems
from rave_dispatcher.adapters.http.gate import Receive, Scope, Send
from rave_dispatcher.adapters.prometheus import Metrics
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.application.errors import DispatcherError, MalformedError, NotFoundError

STATIC = Path(__file__).with_name("static")
PAGE = "index.html"
PREFIX = "/console/"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
MOST_SPANS = 500

_TRACE = re.compile(r"[0-9a-f]{32}")
_LOG = logging.getLogger("rave.console")


class MethodError(DispatcherError):
    """Only reading is possible here."""

    status, slug, title = 405, "method-not-allowed", "Method Not Allowed"


@dataclass(frozen=True)
class Content:
    """What an answer holds."""

    body: bytes
    kind: str
    cache: str  # the value of Cache-Control

    @functools.cached_property
    def etag(self) -> str:
        """The same for the same bytes."""
        return f'"{hashlib.blake2b(self.body, digest_size=12).hexdigest()}"'


@functools.cache
def static_files() -> dict[str, Content]:
    """The files of the page, by the path at which they are served."""
    found = {}
    for path in sorted(STATIC.iterdir()):
        where = "/" if path.name == PAGE else PREFIX + path.name
        # kept, but asked about each time: another version of the dispatcher has others
        found[where] = Content(path.read_bytes(), TYPES[path.suffix], "no-cache")
    return found


class Console:
    """The application."""

    def __init__(self, parts: Parts, store: EventStore, metrics: Metrics) -> None:
        self._parts, self._store, self._metrics = parts, store, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            return
        try:
            content = await self._answer(scope)
        except DispatcherError as e:
            status = e.status
            await problems.of_error(e)(scope, receive, send)
        except Exception as e:  # the last resort: a defect here must not show its inside
            status = 500
            _LOG.error("a request failed", exc_info=e)
            failed = problems.response(500, "internal", "The dispatcher failed", "see its log")
            await failed(scope, receive, send)
        else:
            status = await _send(content, scope, send)
        self._metrics.console_answered(status)

    async def _answer(self, scope: Scope) -> Content:
        if scope["method"] not in ("GET", "HEAD"):
            raise MethodError("the console only reads", {"Allow": "GET, HEAD"})
        path: str = scope["path"]
        if (file := static_files().get(path)) is not None:
            return file
        if path == PREFIX + "status":
            return _data(await self._parts.document(_period(scope["query_string"])))
        head, _, trace_id = path.rpartition("/")
        if head == PREFIX + "traces" and _TRACE.fullmatch(trace_id):
            return _data(await self._trace(trace_id))
        raise NotFoundError("there is no such page")

    async def _trace(self, trace_id: str) -> bytes:
        rows = await self._store.trace(trace_id)
        if not rows:
            raise NotFoundError(f"there is no trace {trace_id} any more, or not yet")
        spans = [
            {
                "span_id": r.span_id, "parent_id": r.parent_id, "name": r.name,
                "start_us": r.start_ns // 1000, "duration_us": (r.end_ns - r.start_ns) // 1000,
                "ok": r.ok, "attributes": json.loads(r.attributes),
            }
            for r in rows[:MOST_SPANS]
        ]  # fmt: skip
        document = {"trace_id": trace_id, "spans": spans, "more": len(rows) - len(spans)}
        return json.dumps(document, ensure_ascii=False).encode("utf-8", "replace")


def _period(query: bytes) -> str:
    try:
        given = urllib.parse.parse_qs(
            query.decode("ascii"), strict_parsing=bool(query), keep_blank_values=True
        )
    except ValueError:
        raise MalformedError("the query is not of the form name=value") from None
    period = given.pop("period", [queries.DEFAULT_PERIOD])
    if given or len(period) != 1 or period[0] not in queries.PERIODS:
        raise MalformedError(f"the period is one of {', '.join(queries.PERIODS)}")
    return period[0]


def _data(body: bytes) -> Content:
    # what senders wrote stays out of caches on disk
    return Content(body, "application/json", "no-store")


async def _send(content: Content, scope: Scope, send: Send) -> int:
    """Answer with it, or that it is what the client has; the status."""
    asked = dict(scope["headers"]).get(b"if-none-match", b"").decode("latin-1")
    etag = content.etag
    status = 304 if etag in [e.strip().removeprefix("W/") for e in asked.split(",")] else 200
    headers: list[tuple[bytes, bytes]] = [
        (b"etag", etag.encode()),
        (b"cache-control", content.cache.encode()),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"cross-origin-opener-policy", b"same-origin"),
    ]
    body = b""
    if status == 200:
        headers.append((b"content-type", content.kind.encode()))
        headers.append((b"content-length", str(len(content.body)).encode()))
        body = content.body if scope["method"] == "GET" else b""
    start: dict[str, Any] = {"type": "http.response.start", "status": status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
    return status
