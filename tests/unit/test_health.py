"""The script that asks the services, run by a real bash against a real server."""

from __future__ import annotations

import dataclasses
import http.server
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest

from ravectl import health, profile
from ravectl.model import EngineName, Health, Plan
from ravectl.plan import make_plan


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ok" else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def plan_of(*health_of: Health) -> Plan:
    plan = make_plan(**profile.select("safe", {}, None).plan_arguments())
    services = [
        dataclasses.replace(plan.services[0], name=f"s{n}", health=h)
        for n, h in enumerate(health_of)
    ]
    return dataclasses.replace(plan, services=tuple(services))


def first_progress(plan: Plan) -> health.Progress:
    script = health.script(plan, EngineName.DEBIAN)
    with subprocess.Popen(
        ["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            progress = health.parse(process.stdout.readline())
        finally:
            process.kill()
    assert progress is not None
    return progress


def test_only_the_promised_answer_counts(port: int) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: refused
        plan = plan_of(
            Health(port, "/ok"),
            Health(port, "/busy"),
            Health(port, None),
            Health(closed.getsockname()[1], None),
            Health(port, "/busy", 503),
        )
        assert first_progress(plan).waiting == ("s1", "s3")


def test_lines_are_read_back() -> None:
    assert health.parse("waiting a b failed c") == health.Progress(("a", "b"), ("c",))
    assert health.parse("waiting failed") == health.Progress((), ())
    assert health.Progress((), ()).healthy
    assert not health.Progress((), ("c",)).healthy


def test_noise_is_no_progress() -> None:
    assert health.parse("Last login: Tue") is None
