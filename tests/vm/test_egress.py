"""The way out is closed in SAFE and open where the profile opens it."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Tool

pytestmark = pytest.mark.vm

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "open-egress" / "rave.yaml"


@contextlib.contextmanager
def host_service() -> Iterator[tuple[str, list[str]]]:
    """A web server on this host's loopback, as the machine addresses it, and what it was asked."""
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"reached\n")

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://10.0.2.2:{server.server_port}/", asked
        finally:
            server.shutdown()


def test_safe_has_no_way_out(machine: Tool) -> None:
    with host_service() as (address, asked):
        done = machine("exec", "--", "curl", "-sS", "--max-time", "5", address, code=None)
    assert done.returncode in (7, 28), "curl: refused, or no answer in time"
    assert asked == []


def test_a_profile_opens_it(tool: Tool) -> None:
    shutil.copy(EXAMPLE, tool.workspace)
    tool("up")
    with host_service() as (address, asked):
        done = tool("exec", "--", "curl", "-sS", "--max-time", "20", address)
    assert done.stdout == "reached\n"
    assert asked == ["/"]
    tool("down")
