"""What every request passes: rate and body limits, its span, its figures, its last resort.

ASGI rather than a framework's middleware: at thousands of requests per second each layer of
tasks and streams counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from rave_dispatcher.adapters.http import problems, versions
from rave_dispatcher.adapters.http.limits import RateLimiter
from rave_dispatcher.adapters.logs import current_trace
from rave_dispatcher.adapters.prometheus import Metrics
from rave_dispatcher.adapters.tracing import OtelSpan, OtelTracer
from rave_dispatcher.application.errors import (
    DispatcherError,
    MalformedError,
    RateLimitedError,
    TooLargeError,
    UnauthenticatedError,
    UnavailableError,
    WrongMediaTypeError,
)
from rave_dispatcher.config import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

WEBHOOKS = "/webhooks/"
DISCARD_MOST = 16 * 2**20
DISCARD_SECONDS = 2.0
# of bodies at once, before any signature is looked at: the service has 192 MB in all
BODIES_MOST = 48 * 2**20


class _Route:
    path = "/webhooks/{source}"


_WEBHOOK_ROUTE = _Route()
_LOG = logging.getLogger("rave.http")
_QUIET = {"/healthz", "/readyz", "/metrics", "/openapi.json"}  # asked often, traced never
_LOOPBACK = {"127.0.0.1", "::1"}


class SlowError(DispatcherError):
    """A body that does not come."""

    status, slug, title = 408, "timeout", "The body did not come in time"


class GoneError(DispatcherError):
    """A version of the API that is served no more."""

    status, slug, title = 410, "gone", "This version of the API is gone"


class Gate:
    """Stands before the application."""

    def __init__(
        self,
        app: App,
        limits: Limits,
        tracer: OtelTracer,
        metrics: Metrics,
        webhooks: Callable[[str, Scope], Awaitable[Response]] | None = None,
        served: tuple[versions.ApiVersion, ...] = versions.VERSIONS,
    ) -> None:
        self._app, self._limits, self._webhooks = app, limits, webhooks
        self._tracer, self._metrics, self._served = tracer, metrics, served
        self._rate = RateLimiter(limits.requests_per_second, limits.burst)
        self._bodies = _Bodies()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        # reversed: of a header that is there twice, the first counts
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"][::-1]}
        path: str = scope["path"]
        span = None if path in _QUIET else self._tracer.start_request("request", headers)
        trace_id = span.trace.trace_id if span else ""
        token = current_trace.set(trace_id or None)
        scope["state"].update(headers=headers, trace=span.trace if span else None)
        answer = _Answer(send, trace_id, self._version_headers(path))
        began = time.perf_counter()
        self._metrics.in_flight(1)
        try:
            await self._serve(scope, receive, answer, headers)
        finally:
            self._metrics.in_flight(-1)
            self._account(scope, answer.status, time.perf_counter() - began, span)
            current_trace.reset(token)

    async def _serve(
        self, scope: Scope, receive: Receive, answer: _Answer, headers: dict[str, str]
    ) -> None:
        incoming = _Incoming(receive, self._bodies)
        try:
            try:
                source = scope["path"].removeprefix(WEBHOOKS)
                hook = scope["method"] == "POST" and source != scope["path"]
                if hook:
                    scope["route"] = _WEBHOOK_ROUTE  # also of what is refused from here on
                self._admit(scope, headers)
                body = await self._body(scope, incoming, headers)
                scope["state"]["body"] = body
                if self._webhooks and hook:
                    # past the framework, whose layers cost more than all that a webhook needs
                    response = await self._webhooks(source, scope)
                    await response(scope, receive, answer)
                else:
                    await self._app(scope, _replay(body, receive), answer)
            except DispatcherError as e:
                if isinstance(e, UnauthenticatedError):
                    self._metrics.auth_failed(e.reason)
                # their frames hold what has come of the body, which nobody counts any more
                e.__traceback__ = e.__context__ = None
                await incoming.discard()
                await problems.of_error(e)(scope, receive, answer)
        except _GoneAwayError:
            answer.status = 499  # as nginx calls it: nobody reads the answer
        except Exception as e:  # the last resort: a defect here must not show its inside
            _LOG.error("a request failed", exc_info=e)
            if not answer.began:
                r = problems.response(500, "internal", "The dispatcher failed", "see its log")
                await r(scope, receive, answer)
        finally:
            incoming.forget()

    def _version_headers(self, path: str) -> list[tuple[bytes, bytes]]:
        version = versions.version_of(path, self._served)
        if version is None or version.deprecated is None:
            return []
        return [(k.lower().encode(), v.encode()) for k, v in version.headers().items()]

    def _admit(self, scope: Scope, headers: dict[str, str]) -> None:
        path = scope["path"]
        if path in _QUIET:
            return
        version = versions.version_of(path, self._served)
        if version is not None and version.is_gone(datetime.datetime.now(datetime.UTC)):
            raise GoneError(f"v{version.major} is served no more: see the header Link")
        wait = self._rate.admit(_client(scope, headers))
        if wait is not None:
            self._metrics.rate_limited()
            raise RateLimitedError(f"come back in {wait} s", {"Retry-After": str(wait)})

    async def _body(self, scope: Scope, receive: Receive, headers: dict[str, str]) -> bytes:
        """The whole body, within its limits."""
        most = self._limits.body_bytes
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:18]) > most:
            raise TooLargeError(f"at most {most} bytes are taken")
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _read(receive, most)
        except TimeoutError:
            raise SlowError(
                f"it has {self._limits.body_seconds:g} s", {"Connection": "close"}
            ) from None
        if body:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise WrongMediaTypeError("send application/json")
        elif scope["path"].startswith("/webhooks/") and scope["method"] == "POST":
            raise MalformedError("the body is empty")
        return body

    def _account(self, scope: Scope, status: int, seconds: float, span: OtelSpan | None) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        trace_id = span.trace.trace_id if span else ""
        self._metrics.answered(method, route, status, seconds, trace_id)
        # a span that does not end is not kept. Anybody may be refused, as often as they like: kept,
        # that would fill the disk until there is no room for who may
        if span and not 400 <= status < 500:
            span.rename(f"{method} {route}")
            span.set("http.response.status_code", status)
            if status >= 500:
                span.fail(f"answered {status}")
            span.end()


_METHODS = {"GET", "POST", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"}


class _GoneAwayError(Exception):
    """The client hung up."""


@dataclass
class _Bodies:
    """How much of bodies is in memory, of all requests that are under way."""

    held: int = 0


class _Incoming:
    """A request's body as it comes, and whether all of it has come."""

    def __init__(self, receive: Receive, bodies: _Bodies) -> None:
        self._receive, self._complete = receive, False
        self._bodies, self._held, self._discarding = bodies, 0, False

    async def __call__(self) -> Message:
        """The next piece. Raises UnavailableError when all bodies together are too large."""
        message = await self._receive()
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body")
        if not self._discarding:
            self._held += (size := len(message.get("body", b"")))
            self._bodies.held += size
            if self._bodies.held > BODIES_MOST:
                raise UnavailableError("too many large bodies are under way", {"Retry-After": "5"})
        return message

    def forget(self) -> None:
        """Nobody needs the body any more."""
        self._bodies.held -= self._held
        self._held = 0

    async def discard(self) -> None:
        """Let the rest come, within reason: a proxy that is still sending sees no answer, and
        tells its client that we are broken."""
        self.forget()
        self._discarding = True
        size = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while not self._complete and size < DISCARD_MOST:
                    size += len((await self()).get("body", b""))


class _Answer:
    """Sends an answer with the headers that all have, and remembers its status."""

    def __init__(self, send: Send, trace_id: str, more: list[tuple[bytes, bytes]]) -> None:
        self._send, self.status, self.began = send, 500, False
        self._headers = [(b"cache-control", b"no-store"), *more]
        if trace_id:
            self._headers.append((b"x-trace-id", trace_id.encode()))

    async def __call__(self, message: Message) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status, self.began = message["status"], True
            message["headers"] = [*message.get("headers", ()), *self._headers]
        await self._send(message)


async def _read(receive: Receive, most: int) -> bytes:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise _GoneAwayError
    body = bytes(message.get("body", b""))
    if not message.get("more_body"):
        if len(body) > most:
            raise TooLargeError(f"at most {most} bytes are taken")
        return body
    pieces, size = [body], len(body)
    while message.get("more_body"):
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneAwayError
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most:
            raise TooLargeError(f"at most {most} bytes are taken")
    return b"".join(pieces)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, for the application; then what else comes (a disconnect)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _client(scope: Scope, headers: dict[str, str]) -> str:
    """Who asks: of our own ingress, for whom it asks."""
    peer = (scope.get("client") or ("",))[0]
    if peer in _LOOPBACK or not peer:
        return headers.get("x-real-ip", peer)[:64]
    return str(peer)
