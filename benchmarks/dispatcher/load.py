"""A load of signed webhooks for one server on this machine, and what came of it.

Small enough that the server, not this, is measured: requests are made of prepared bytes, and
answers are only looked at for their status and length.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Outcome:
    """What came of a load."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)  # delivery ids
    broken: int = 0  # connections that ended without an answer

    @property
    def ok(self) -> int:
        """How many were taken."""
        return sum(n for status, n in self.statuses.items() if 200 <= status < 300)

    def percentile(self, share: float) -> float:
        """A latency in milliseconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000 if ordered else 0.0


def payload(size: int = 2000) -> bytes:
    """A push event of about that size."""
    body = {
        "ref": "refs/heads/main",
        "repository": {"full_name": "group/project", "id": 1},
        "commits": [],
        "pusher": {"name": "someone", "email": "someone@example.org"},
    }
    body["filler"] = "x" * max(size - len(json.dumps(body)) - 14, 0)
    return json.dumps(body).encode()


class Requests:
    """GitHub's deliveries as bytes: only the id differs, which is not signed."""

    def __init__(self, path: str, secret: bytes, body: bytes, host: str = "127.0.0.1") -> None:
        signature = hmac.new(secret, body, hashlib.sha256).hexdigest()
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"X-GitHub-Event: push\r\nX-Hub-Signature-256: sha256={signature}\r\n"
            f"Content-Length: {len(body)}\r\nX-GitHub-Delivery: "
        ).encode()
        self._tail = b"\r\n\r\n" + body

    def make(self, delivery: str) -> bytes:
        """One of them."""
        return self._head + delivery.encode() + self._tail


def new_ids() -> Iterator[str]:
    """Delivery ids without end."""
    while True:
        yield str(uuid.uuid4())


class Connection(asyncio.Protocol):
    """A kept-alive connection: one request at a time."""

    def __init__(self) -> None:
        self._buffer = b""
        self._waiting: asyncio.Future[int] | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self.lost = True
        if self._waiting and not self._waiting.done():
            self._waiting.set_exception(ConnectionError())

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._waiting is None:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._buffer) >= end + 4 + size:
            self._buffer = self._buffer[end + 4 + size :]
            if not self._waiting.done():
                self._waiting.set_result(int(head[9:12]))

    async def send(self, request: bytes) -> int:
        """The status of the answer; ConnectionError when there is none."""
        if self.lost:
            raise ConnectionError
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)  # type: ignore[attr-defined]
        return await self._waiting

    def close(self) -> None:
        """Hang up."""
        self._transport.close()


async def connect(port: int) -> Connection:
    """A new connection; OSError when nobody listens."""
    _, made = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return made


async def closed_loop(
    port: int, requests: Requests, ids: Iterator[str], seconds: float, connections: int,
    most: int | None = None,
) -> Outcome:  # fmt: skip
    """As many as the server takes: each connection sends its next when it has its answer."""
    outcome = Outcome()
    began = time.perf_counter()
    end = began + seconds
    left = [most if most is not None else 2**62]

    async def client() -> None:
        connection = None
        while time.perf_counter() < end and left[0] > 0:
            left[0] -= 1
            delivery = next(ids, None)
            if delivery is None:
                return
            try:
                if connection is None or connection.lost:
                    connection = await connect(port)
                sent = time.perf_counter()
                status = await connection.send(requests.make(delivery))
            except OSError:
                outcome.broken += 1
                connection = None
                await asyncio.sleep(0.005)
                continue
            outcome.latencies.append(time.perf_counter() - sent)
            outcome.statuses[status] += 1
            if 200 <= status < 300:
                outcome.acknowledged.append(delivery)
        if connection:
            connection.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(client())
    outcome.seconds = time.perf_counter() - began
    return outcome


async def at_rate(
    port: int, requests: Requests, ids: Iterator[str], rate: float, seconds: float,
    connections: int = 64,
) -> Outcome:  # fmt: skip
    """A fixed rate, whatever the server does: a latency counts from when a request was due."""
    outcome = Outcome()
    idle: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        idle.put_nowait(await connect(port))
    began = time.perf_counter()

    async def one(due: float) -> None:
        connection = await idle.get()
        try:
            if connection.lost:
                connection = await connect(port)
            status = await connection.send(requests.make(next(ids)))
            outcome.latencies.append(time.perf_counter() - due)
            outcome.statuses[status] += 1
        except OSError:
            outcome.broken += 1
        finally:
            idle.put_nowait(connection)

    async with asyncio.TaskGroup() as group:
        for i in range(int(rate * seconds)):
            due = began + i / rate
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            group.create_task(one(due))
    outcome.seconds = time.perf_counter() - began
    return outcome
