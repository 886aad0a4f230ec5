"""A dispatcher as a process of its own, and requests to it, for tests."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ALERTS_TOKEN = "test-alerts-token"
TOKEN = "test-api-token"
GITLAB, GITHUB = b"test-gitlab-token", b"test-github-secret"
STANDARD = b"whsec_" + base64.b64encode(b"test-standard-secret-of-32-bytes")
AUTH = {"Authorization": f"Bearer {TOKEN}"}
READY_SECONDS = 120.0  # a host that has other tests to run, too


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Dispatcher:
    """A configuration in a folder, and the process that serves it."""

    folder: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return Path(self.config["store"]["path"])

    @property
    def config_file(self) -> Path:
        return self.folder / "dispatcher.yaml"

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def write(self, **changes: Any) -> None:
        self.config.update(changes)
        self.config_file.write_text(yaml.safe_dump(self.config))

    def start(self, *, wait: bool = True, env: Mapping[str, str] | None = None) -> None:
        self.write()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rave_dispatcher", "--config", self.config_file, "serve"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(env or {})},
            )  # fmt: skip
        if wait:
            self.wait()

    def wait(self) -> None:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            with contextlib.suppress(OSError):
                if self.get("/healthz").status == 200:
                    return
            time.sleep(0.02)
        raise AssertionError(f"the dispatcher did not become ready:\n{self.log}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, seconds: float = 60) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        self.write()
        return subprocess.run(
            [sys.executable, "-m", "rave_dispatcher", "--config", str(self.config_file), *words],
            capture_output=True, text=True, check=False, timeout=180,
        )  # fmt: skip

    def request(
        self, method: str, path: str, body: bytes | None = None,
        headers: Mapping[str, str] | None = None, seconds: float = 60,
    ) -> Answer:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            found = {k.lower(): v for k, v in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, None, headers)

    def api(self, method: str, path: str, document: Any = None) -> Answer:
        body = None if document is None else json.dumps(document).encode()
        kind = {} if body is None else {"Content-Type": "application/json"}
        return self.request(method, path, body, {**AUTH, **kind})

    def raw(self, data: bytes, seconds: float = 5) -> bytes:
        """What a server sends back to these bytes until it hangs up, or is silent so long."""
        with socket.create_connection(("127.0.0.1", self.port), seconds) as s:
            s.sendall(data)
            found = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while piece := s.recv(65536):
                    found += piece
            return found

    def hook(self, body: bytes = b'{"a":1}', delivery: str | None = None, **more: str) -> Answer:
        """A delivery as GitHub makes it."""
        return self.request("POST", "/webhooks/github", body, github(body, delivery, **more))

    def wait_for(self, path: str, holds: Any, seconds: float = 60) -> Any:
        """Ask until an answer holds; the answer."""
        end = time.monotonic() + seconds
        while True:
            found = self.api("GET", path).json()
            if holds(found):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        page = self.get("/metrics").body.decode()
        rows = [line for line in page.splitlines() if line.startswith((name + " ", name + "{"))]
        return sum(float(row.rpartition(" ")[2]) for row in rows)


def github(
    body: bytes, delivery: str | None = None, secret: bytes = GITHUB, event: str = "push"
) -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "X-GitHub-Event": event,
        "X-GitHub-Delivery": delivery or str(uuid.uuid4()),
        "X-Hub-Signature-256": "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest(),
    }


def standard(
    body: bytes, delivery: str, at: float, key: bytes = b"test-standard-secret-of-32-bytes"
) -> dict[str, str]:
    signed = f"{delivery}.{int(at)}.".encode() + body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return {
        "Content-Type": "application/json",
        "webhook-id": delivery,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": f"v1,{signature}",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def make(folder: Path, **changes: Any) -> Dispatcher:
    """A dispatcher that is not running yet."""
    secrets = folder / "secrets"
    secrets.mkdir(parents=True)
    for name, value in (
        ("api-token", TOKEN.encode()),
        ("alerts-token", ALERTS_TOKEN.encode()),
        ("gitlab-token", GITLAB),
        ("github-secret", GITHUB),
        ("standard-secret", STANDARD),
    ):
        (secrets / name).write_bytes(value + b"\n")
    port = free_port()
    config: dict[str, Any] = {
        "listen": {"port": port},
        "store": {"path": str(folder / "events.db"), "reserve_mb": 0},
        "secrets_dir": str(secrets),
        "runner": {"kind": "unconfined", "home": str(folder / "home")},
        "limits": {"requests_per_second": 1e6, "burst": 1_000_000},
        "agents": {"backend-architect": {"command": ["cat"]}},
        "rules": [],
    }
    made = Dispatcher(folder, port, None, config)
    made.write(**changes)
    return made


@contextlib.contextmanager
def running(folder: Path, **changes: Any) -> Iterator[Dispatcher]:
    """A dispatcher that runs until the block ends, however it ends."""
    made = make(folder, **changes)
    try:
        made.start()
        yield made
    finally:
        made.kill()
