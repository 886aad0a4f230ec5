"""HTTPS to the ingress, as the checks need it: one kept-alive connection, with a deadline.

The machine is not trusted: an answer is bounded in size, and a server that trickles bytes is
cut off at the deadline by a timer, since socket timeouts only bound the gaps between bytes.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ravectl.errors import RavectlError
from ravectl.ssh import HOST

DEFAULT_HOST = "localhost"  # the name by which the ingress's default server is asked for
MAX_BODY = 4 * 2**20


@dataclass(frozen=True)
class Answer:
    """An HTTP response. Header names are in lower case, repeated ones joined by commas."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float  # from sending the request to the last byte of the body


def basic(user: str, password: str) -> dict[str, str]:
    """The header that signs in by HTTP Basic."""
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"}


def bearer(token: str) -> dict[str, str]:
    """The header that shows a token."""
    return {"Authorization": f"Bearer {token}"}


def trial(key: str) -> dict[str, str]:
    """The header by which the ingress does not count wrong credentials: those of a trial by who
    has the router's key."""
    return {"X-Rave-Trial": key}


def trusting(ca_cert: Path) -> ssl.SSLContext:
    """A TLS context that accepts only chains to the workspace's CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cafile=ca_cert)
    except (OSError, ssl.SSLError) as e:
        raise RavectlError(
            f"the workspace's CA certificate cannot be read: {ca_cert}: {e}",
            "restore the file from where the workspace is kept",
        ) from None
    return context


class Client:
    """A kept-alive HTTPS connection to one host of the ingress; use as a context manager.

    `deadline` is a time.monotonic() value. Requests raise OSError (also for a response that is
    not HTTP), TimeoutError once the deadline has passed.
    """

    def __init__(self, port: int, host: str, context: ssl.SSLContext, deadline: float) -> None:
        self._port, self._host, self._context, self._deadline = port, host, context, deadline
        self._http: http.client.HTTPConnection | None = None
        self._sock: ssl.SSLSocket | None = None
        self._timer = threading.Timer(max(deadline - time.monotonic(), 0.0), self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()
        self._drop()

    @property
    def tls_version(self) -> str:
        """The version of TLS that was agreed on; connects when that has not happened yet."""
        self._connect()
        assert self._sock is not None
        return self._sock.version() or ""

    @property
    def certificate(self) -> bytes:
        """The certificate that the server showed (DER); connects when that has not happened."""
        self._connect()
        assert self._sock is not None
        return self._sock.getpeercert(binary_form=True) or b""

    def get(
        self, path: str, headers: Mapping[str, str] | None = None, *, most: int = MAX_BODY
    ) -> Answer:
        """GET `path`, on a new connection when the server has closed the one we had.

        Of a longer body, `most` bytes are read and the rest is refused by hanging up.
        """
        fresh = self._http is None
        try:
            return self._get(path, headers or {}, most)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            self._drop()
            if fresh or time.monotonic() > self._deadline:
                raise
            return self._get(path, headers or {}, most)
        except http.client.HTTPException as e:
            self._drop()
            raise OSError(f"not an HTTP response ({type(e).__name__})") from None
        except OSError:
            self._drop()
            raise

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """POST `body`, once: whether it was taken before a connection broke, nobody knows."""
        try:
            return self._ask("POST", path, body, headers, MAX_BODY)
        except http.client.HTTPException as e:
            self._drop()
            raise OSError(f"not an HTTP response ({type(e).__name__})") from None
        except OSError:
            self._drop()
            raise

    def _get(self, path: str, headers: Mapping[str, str], most: int) -> Answer:
        return self._ask("GET", path, None, headers, most)

    def _ask(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], most: int
    ) -> Answer:
        connection = self._connect()
        started = time.monotonic()
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        content = response.read(most)
        seconds = time.monotonic() - started
        if time.monotonic() > self._deadline:
            raise TimeoutError("no answer by the deadline")
        if response.will_close or not response.isclosed():
            self._drop()  # closed by the server, or there is more than we care to read
        return Answer(response.status, _by_name(response.getheaders()), content, seconds)

    def _connect(self) -> http.client.HTTPConnection:
        if self._http is None:
            self._sock = handshake(self._port, self._host, self._context, self._deadline)
            self._http = http.client.HTTPConnection(self._host, self._port)
            self._http.sock = self._sock
            self._http.auto_open = 0  # it would connect to the name, without TLS
        return self._http

    def _drop(self) -> None:
        if self._http is not None:
            self._http.close()
        self._http = self._sock = None

    def _cut(self) -> None:
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                # not SSLSocket.shutdown, which forgets the TLS state under the reader's feet
                socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _by_name(headers: Sequence[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


def handshake(port: int, host: str, context: ssl.SSLContext, deadline: float) -> ssl.SSLSocket:
    """Connect to the ingress and agree on TLS, asking for `host`."""
    sock = connect(port, deadline)
    try:
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def connect(port: int, deadline: float) -> socket.socket:
    """A TCP connection to a forwarded port, whose operations time out at the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no answer by the deadline")
    sock = socket.create_connection((HOST, port), timeout=left)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def explain(error: OSError) -> str:
    """What went wrong, in words that name the cause and hold nothing of the request."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or type(error).__name__}"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror or str(error) or type(error).__name__
