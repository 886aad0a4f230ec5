"""uvicorn, with the limits that it lacks: on headers, in size and in time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from rave_dispatcher.adapters.http import problems
from rave_dispatcher.application.errors import UnavailableError
from rave_dispatcher.config import Limits

ON_ITS_WAY_SECONDS = 0.5


class BoundedProtocol(HttpToolsProtocol):
    """HTTP that ends what sends its headers too slowly, or too many of them."""

    limits: Limits

    _seen = 0
    _too_many = False
    _draining = False
    _slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._seen = 0
        if self._slow is None:
            self._await_headers()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._forget()
        if len(self.connections) > self.limits.connections:
            self.app = _too_many
            self._draining = True
        super().on_headers_complete()
        if self._draining:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """End, but for a request that is on its way: its sender would see a reset."""
        if self.cycle is None or self.cycle.response_complete:
            self._draining = True
            self._forget()
            self._slow = self.loop.call_later(ON_ITS_WAY_SECONDS, self._give_up)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        status, line, slug = 400, b"400 Bad Request", "malformed"
        if self._too_many:
            status, line = 431, b"431 Request Header Fields Too Large"
            slug = "headers-too-large"
        body = problems.body(status, slug, line[4:].decode(), "this is no HTTP that is taken")
        head = b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n" % (
            line, problems.MEDIA_TYPE.encode(), len(body),
        )  # fmt: skip
        self.transport.write(head + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        # before its end a header is not shown to us, only kept: so its pieces count too
        if self._slow is not None:
            self._pending = getattr(self, "_pending", 0) + len(data)
            if self._pending > self.limits.header_bytes + self.limits.body_bytes:
                self._too_many = True
                self.send_400_response("")
                return
        super().data_received(data)

    def _count(self, size: int) -> None:
        self._seen += size
        if self._seen > self.limits.header_bytes:
            self._too_many = True
            raise ValueError("too many headers")  # the parser gives up, and 431 is sent

    def _await_headers(self) -> None:
        self._slow = self.loop.call_later(self.limits.header_seconds, self._give_up)

    def _give_up(self) -> None:
        self._slow = None
        if not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        self._pending = 0
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    refusal = UnavailableError("there are too many connections", {"Connection": "close"})
    await problems.of_error(refusal)(scope, receive, send)


class Server(uvicorn.Server):
    """Leaves the signals to us: what ends the process decides in which order things end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None."""
        yield


def make_server(app: Any, limits: Limits, drain_seconds: int) -> Server:
    """A server that is not running yet."""
    return Server(
        uvicorn.Config(
            app,
            loop="none",
            http=type("Protocol", (BoundedProtocol,), {"limits": limits}),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=drain_seconds,
        )
    )
