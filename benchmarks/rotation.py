"""A rotation of everything under load: what clients of every route and of webhooks notice.

Each route that answers anybody has a client that asks ten times a second over a kept-alive
connection. It knows the old credentials, and the new ones from when they are written; a request
counts as *refused* while neither is served, as *lost* when that lasts ten seconds. Webhooks come
ten times a second with the secret of before, as their senders do: a stub in the machine takes
what the delivered files say, until the dispatcher is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ravectl import journal, sops, vault, workspace
from ravectl.errors import RavectlError
from ravectl.instance import Instance
from ravectl.model import Access
from ravectl.verify import web

RATE = 10.0  # requests a second, each client
LOST_SECONDS = 10.0
QUIET_SECONDS = 3.0  # load before and after

# python3-minimal has sockets and no HTTP
STUB = """
import socket, sys, threading, time
base = "/run/secrets/dispatcher/gitlab-token"
def read(path):
    try:
        with open(path) as f:
            return f.read().strip()
    except OSError:
        return None
def accepted(token):
    if token == read(base):
        return True
    until = read(base + ".previous-until")
    return until is not None and time.time() < int(until) and token == read(base + ".previous")
server = socket.create_server(("127.0.0.1", 0))
def serve():
    while True:
        peer, _ = server.accept()
        with peer:
            peer.sendall(b"202" if accepted(peer.recv(200).decode()) else b"401")
threading.Thread(target=serve, daemon=True).start()
token = read(base)
sent = lost = 0
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    with socket.create_connection(server.getsockname()) as s:
        s.sendall(token.encode())
        lost += s.recv(10) != b"202"
    sent += 1
    time.sleep(0.1)
print(sent, lost, flush=True)
"""


@dataclass
class Seen:
    """What the clients of all routes noticed."""

    sent: int = 0
    lost: int = 0
    longest: float = 0.0
    longest_route: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Credentials:
    """The headers that may be served: by the old values, and by new ones once written."""

    def __init__(self, found: Instance) -> None:
        self._found = found
        self._identity = sops.find_identity(usual=found.workspace.identity_file)
        self._next = journal.folder(found.workspace.state) / vault.FILE
        self.known = [self._of(found.places.shared)]

    def _of(self, path: Path) -> dict[str, str]:
        values = vault.read(path, self._identity).values
        user = self._found.endpoint().operator
        return web.basic(user, values["ingress/password"])

    def watch(self, stop: threading.Event) -> None:
        """Learn the new ones as soon as they are written."""
        while not stop.wait(0.1):
            with contextlib.suppress(RavectlError):
                headers = self._of(self._next)
                if headers not in self.known:
                    self.known.insert(0, headers)


def client(
    found: Instance, route: Any, known: Credentials, seen: Seen, stop: threading.Event
) -> None:
    """Ask one route until told to stop."""
    context = web.trusting(found.places.ca_cert)
    host, port = route.host or web.DEFAULT_HOST, found.endpoint().https_port
    path = found.require_record().plan.health_path(route) if route.upstream_port else None
    at = path or route.probe
    while not stop.is_set():
        with web.Client(port, host, context, time.monotonic() + 600) as connection:
            while not stop.wait(1 / RATE):
                if not ask(connection, at, route, known, seen):
                    break


def ask(connection: web.Client, path: str, route: Any, known: Credentials, seen: Seen) -> bool:
    """One request, repeated until it is served or lost; False when a new connection is wanted."""
    began = time.monotonic()
    with seen.lock:
        seen.sent += 1
    first = True
    while time.monotonic() - began < LOST_SECONDS:
        for headers in list(known.known):
            with contextlib.suppress(OSError):
                answer = connection.get(path, headers)
                if answer.status in (200, 302):
                    refused = 0.0 if first else time.monotonic() - began
                    with seen.lock:
                        if refused > seen.longest:
                            seen.longest, seen.longest_route = refused, route.name
                    return True
            first = False
        time.sleep(0.02)
    with seen.lock:
        seen.lost += 1
    return False


def measure(folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Rotate everything on the running machine of `folder` under load; the figures."""
    space = workspace.find(override=folder)
    found = Instance(space.instance_dir("default"), "default")
    routes = [
        r for r in found.require_record().plan.routes
        if r.access is not Access.NOBODY
    ]  # fmt: skip
    stop, seen, known = threading.Event(), Seen(), Credentials(found)
    threads = [threading.Thread(target=known.watch, args=(stop,), daemon=True)]
    threads += [
        threading.Thread(target=client, args=(found, r, known, seen, stop), daemon=True)
        for r in routes
    ]
    ravectl = [sys.executable, "-m", "ravectl"]
    stub = subprocess.Popen(
        [*ravectl, "exec", "--", "sudo", "python3", "-", "60"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment),
    )  # fmt: skip
    assert stub.stdin is not None
    stub.stdin.write(STUB)
    stub.stdin.close()
    for t in threads:
        t.start()
    time.sleep(QUIET_SECONDS)
    done = subprocess.run(
        [*ravectl, "rotate-secrets", "--all", "--json"],
        capture_output=True, text=True, env=dict(environment), check=False,
    )  # fmt: skip
    time.sleep(QUIET_SECONDS)
    stop.set()
    for t in threads:
        t.join(timeout=LOST_SECONDS + 5)
    assert stub.stdout is not None
    hooks_sent, hooks_lost = map(int, stub.stdout.read().split())
    stub.wait(timeout=60)
    if done.returncode != 0:
        sys.exit(f"the rotation failed:\n{done.stderr}")
    rotation = json.loads(done.stdout)
    return {
        "seconds": rotation["seconds"], "steps": rotation["steps"], "sent": seen.sent,
        "lost": seen.lost + hooks_lost, "longest": round(seen.longest, 2),
        "longest_route": seen.longest_route, "webhooks": hooks_sent, "routes": len(routes),
    }  # fmt: skip


def main() -> None:
    """Print the figures beside their targets."""
    if len(sys.argv) > 1:
        report(measure(Path(sys.argv[1]), {**os.environ, "RAVECTL_WORKSPACE": sys.argv[1]}))
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "RAVECTL_WORKSPACE": folder, "XDG_CONFIG_HOME": f"{folder}/config",
        }  # fmt: skip
        os.environ.update(environment)
        ravectl = [sys.executable, "-m", "ravectl"]
        try:
            subprocess.run([*ravectl, "up"], env=environment, check=True, stdout=sys.stderr)
            report(measure(Path(folder), environment))
        finally:
            subprocess.run([*ravectl, "down"], env=environment, check=False)


def report(figures: Mapping[str, Any]) -> None:
    """Print a table."""
    of = f"requests to {figures['routes']} routes, {figures['webhooks']} webhooks"
    longest = f"longest refusal ({figures['longest_route'] or 'none'})"
    rows = [
        (of, figures["sent"], ""),
        ("lost", figures["lost"], "0"),
        (longest, f"{figures['longest']} s", "<= 2 s"),
        ("rotation of everything", f"{figures['seconds']:.1f} s", "<= 60 s"),
        *((f"  {step}", f"{took:.1f} s", "") for step, took in figures["steps"].items()),
    ]  # fmt: skip
    for what, figure, target in rows:
        print(f"{what:<48} {figure!s:>10}   {target}")
    print(f"load of this host: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
