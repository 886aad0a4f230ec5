"""A rotation of everything under load: what clients of every route and of webhooks notice.

Each route that answers anybody has a client that asks ten times a second over a kept-alive
connection. It knows the old credentials, and the new ones from when they are written; a request
counts as *refused* while neither is served, as *lost* when that lasts ten seconds. Webhooks are
signed with the secret of before to the end, as their senders do.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ravectl import journal, sops, vault, workspace
from ravectl.errors import RavectlError
from ravectl.instance import Instance
from ravectl.model import Access, Route
from ravectl.verify import events, web

RATE = 10.0  # requests a second, each client
LOST_SECONDS = 10.0
QUIET_SECONDS = 3.0  # load before and after
EVENT_TYPE = "rave-rotation"  # no rule makes a task of it


def _github(secret: str, body: bytes, delivery: str) -> dict[str, str]:
    return events.github_headers(secret, body, delivery, EVENT_TYPE)


def _gitlab(secret: str, body: bytes, delivery: str) -> dict[str, str]:
    return events.gitlab_headers(secret, body, delivery, EVENT_TYPE, int(time.time()))


def _standard(secret: str, body: bytes, delivery: str) -> dict[str, str]:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return events.standard_headers(key, body, delivery, int(time.time()))


SIGN = {"github": _github, "gitlab": _gitlab, "standard": _standard}
SECRET_OF = {
    "github": "dispatcher/github-secret", "gitlab": "dispatcher/gitlab-token",
    "standard": "dispatcher/standard-secret",
}  # fmt: skip


@dataclass
class Seen:
    """What the clients of all routes noticed."""

    sent: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    longest: float = 0.0
    longest_route: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def served(self, route: str, refused: float) -> None:
        """A request was served, after it had been refused for so many seconds."""
        with self.lock:
            self.sent[route] += 1
            if refused > self.longest:
                self.longest, self.longest_route = refused, route

    def missed(self, route: str) -> None:
        """A request was never served."""
        with self.lock:
            self.sent[route] += 1
            self.lost[route] += 1


class Credentials:
    """The values that may be served: the old ones first, and before them new ones once written."""

    def __init__(self, found: Instance) -> None:
        self._identity = sops.find_identity(usual=found.workspace.identity_file)
        self._next = journal.folder(found.workspace.state) / vault.FILE
        self.known = [vault.read(found.places.shared, self._identity).values]

    def watch(self, stop: threading.Event) -> None:
        """Learn the new ones as soon as they are written."""
        while not stop.wait(0.1):
            with contextlib.suppress(RavectlError):
                values = vault.read(self._next, self._identity).values
                if values not in self.known:
                    self.known.insert(0, values)


class Client:
    """Who asks one route, as those who use it do."""

    def __init__(self, found: Instance, route: Route, known: Credentials) -> None:
        self._operator, self._known = found.endpoint().operator, known
        self._old = known.known[0]
        plan = found.require_record().plan
        self._path = (plan.health_path(route) if route.upstream_port else None) or route.probe
        self._signed = route.access is Access.SIGNED
        self._bearer = route.access is Access.BEARER
        if self._signed or self._bearer:
            self._path = route.probe
        self.name = route.name

    def request(self) -> Callable[[web.Client], bool]:
        """A request that can be made again, as the same one: it says whether it was served."""
        if not self._signed:
            return lambda connection: any(
                connection.get(self._path, self._headers(values)).status in (200, 302)
                for values in list(self._known.known)
            )
        delivery, body = secrets.token_hex(16), json.dumps({"type": EVENT_TYPE}).encode()
        headers = SIGN[self.name](self._old[SECRET_OF[self.name]], body, delivery)
        return lambda connection: connection.post(self._path, body, headers).status in (200, 202)

    def _headers(self, values: Mapping[str, str]) -> dict[str, str]:
        if self._bearer:
            return web.bearer(values["dispatcher/api-token"])
        return web.basic(self._operator, values["ingress/password"])


def run(client: Client, found: Instance, host: str, seen: Seen, stop: threading.Event) -> None:
    """Ask until told to stop."""
    context, port = web.trusting(found.places.ca_cert), found.endpoint().https_port
    while not stop.is_set():
        with web.Client(port, host, context, time.monotonic() + 600) as connection:
            while not stop.wait(1 / RATE):
                if not ask(connection, client, seen):
                    break


def ask(connection: web.Client, client: Client, seen: Seen) -> bool:
    """One request, repeated until it is served or lost; False when a new connection is wanted."""
    began, served = time.monotonic(), client.request()
    first = True
    while time.monotonic() - began < LOST_SECONDS:
        with contextlib.suppress(OSError):
            if served(connection):
                seen.served(client.name, 0.0 if first else time.monotonic() - began)
                return True
        first = False
        time.sleep(0.02)
    seen.missed(client.name)
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
    for r in routes:
        whom = (Client(found, r, known), found, r.host or web.DEFAULT_HOST, seen, stop)
        threads.append(threading.Thread(target=run, args=whom, daemon=True))
    ravectl = [sys.executable, "-m", "ravectl"]
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
    if done.returncode != 0:
        sys.exit(f"the rotation failed:\n{done.stderr}")
    rotation = json.loads(done.stdout)
    return {
        "seconds": rotation["seconds"], "steps": rotation["steps"],
        "sent": seen.sent.total(), "lost": dict(seen.lost), "longest": round(seen.longest, 2),
        "longest_route": seen.longest_route, "webhooks": sum(seen.sent[r] for r in SIGN),
        "routes": len(routes),
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
    of = f"requests to {figures['routes']} routes, {figures['webhooks']} of them webhooks"
    longest = f"longest refusal ({figures['longest_route'] or 'none'})"
    rows = [
        (of, figures["sent"], ""),
        ("lost", sum(figures["lost"].values()), "0"),
        (longest, f"{figures['longest']} s", "<= 2 s"),
        ("rotation of everything", f"{figures['seconds']:.1f} s", "<= 60 s"),
        *((f"  {step}", f"{took:.1f} s", "") for step, took in figures["steps"].items()),
    ]  # fmt: skip
    for what, figure, target in rows:
        print(f"{what:<48} {figure!s:>10}   {target}")
    print(f"load of this host: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
