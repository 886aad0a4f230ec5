"""A machine's monitoring, running: the programs of the image's base with the rendered files, in
namespaces of their own, under light load.

All of it is real but for three things: control groups that look like the kernel's (this host has
no units of the Plan), agents without a sandbox (that takes systemd), and no router nor Vibe Kanban,
which therefore do not answer. It needs root, and makes the base if there is none in the cache.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import shlex
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ravectl import files, images, vault
from ravectl.engines import debian
from ravectl.model import EngineName, Plan
from ravectl.render import write_tree
from tests.plans import PLAN

DEADLINE_SECONDS = 240.0  # a group of rules that reads days is looked at each minute
PAUSE_SECONDS = 1.0
WINDOW_SECONDS = 900
PACKAGES = (
    "prometheus", "prometheus-alertmanager", "victoria-metrics", "prometheus-pushgateway",
    "prometheus-node-exporter", "prometheus-nginx-exporter", "prometheus-blackbox-exporter",
)  # fmt: skip
GROUP = {
    "cgroup.procs": "412\n413\n",
    "memory.stat": "anon 40960000\nfile 99\n",
    "memory.max": "67108864\n",
    "cpu.stat": "usage_usec 12345678\nuser_usec 1\n",
    "pids.current": "7\n",
}


@dataclass(frozen=True)
class Query:
    """What is asked, and of whom: `port` is Prometheus' or VictoriaMetrics'."""

    port: int
    expression: str


@dataclass(frozen=True)
class Answer:
    """How many series came back, or why it could not be asked."""

    series: int
    error: str = ""


def answers(queries: Sequence[Query], patient: Sequence[Query] = ()) -> dict[Query, Answer]:
    """Ask all of them of a machine under light load; those of `patient` may return nothing.

    Each is asked again until it returns something, for DEADLINE_SECONDS at most.
    """
    plan = PLAN.on(EngineName.DEBIAN)
    base = debian.ensure_base(files.cache_dir(), plan.accounts)
    rows = [[q.port, q.expression, q in patient] for q in queries]
    with tempfile.TemporaryDirectory(prefix="rave-monitored.") as folder:
        inner = [sys.executable, "-m", "tests.monitored", folder, str(base.root)]
        unshared = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--", *inner]
        done = subprocess.run(
            unshared, input=json.dumps(rows), capture_output=True, text=True, check=False,
            timeout=DEADLINE_SECONDS + 120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout)
    return {q: Answer(**row) for q, row in zip(queries, found, strict=True)}


# --- in the namespaces --------------------------------------------------------------------------


def make_root(folder: Path, base: Path, plan: Plan) -> Path:
    """The machine's root: the rendered files over the base, with secrets, writable."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", folder], check=True)
    tree, upper, work, root = (folder / n for n in ("tree", "upper", "work", "root"))
    for path in (tree, upper, work, root):
        path.mkdir()
    write_tree(images.render_debian(plan), tree)
    layers = f"lowerdir={tree}:{base},upperdir={upper},workdir={work}"
    for words in (
        ["-t", "overlay", "-o", layers, "overlay", root],
        ["-t", "tmpfs", "-o", "mode=755", "tmpfs", root / "run"],
        ["-t", "proc", "proc", root / "proc"],
        ["--rbind", "/dev", root / "dev"],
        ["--rbind", "/sys", root / "sys"],
    ):
        subprocess.run(["mount", *words], check=True)
    _write_secrets(root / "run/secrets", plan)
    for s in plan.services:
        unit = s.unit["debian"]
        above = f"system-{unit.split('@')[0]}.slice/" if "@" in unit else ""
        group = root / "run/groups" / f"{above}{unit}"
        group.mkdir(parents=True)
        for name, text in GROUP.items():
            (group / name).write_text(text)
    for name in ("mtail", "postgresql", "rave-units", "rave-dispatcher", "rave-ingress", "rave"):
        (root / "run" / name).mkdir()
    (root / "run/mtail").chmod(0o777)
    (root / "run/rave/router-key").write_text("between nginx and the router")
    subprocess.run(["chroot", root, "chown", "postgres:", "/run/postgresql"], check=True)
    path = root / "etc/rave/dispatcher.yaml"
    config = yaml.safe_load(path.read_text())
    config["runner"] = {"kind": "unconfined"}
    config["console"]["socket"] = "/run/rave-dispatcher/console.sock"
    path.write_text(yaml.safe_dump(config))
    return root


def _write_secrets(folder: Path, plan: Plan) -> None:
    shared = vault.complete(vault.Vault(), plan.secrets, vault.now())
    machine = vault.complete_machine(vault.Vault(), plan, shared, vault.now())
    for name, value in vault.delivery(plan, shared, machine, ["ssh-ed25519 AAAA"]).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    (folder / "password").write_text(shared.values["ingress/password"])


def commands(root: Path) -> dict[str, list[str]]:
    """What the machine's units run, as words for its root."""
    found = {}
    for package in PACKAGES:
        found[package] = [f"/usr/bin/{package}", *_arguments(root, package)]
    unit = (root / "etc/systemd/system/mtail.service.d/rave.conf").read_text()
    found["mtail"] = shlex.split(unit.split("ExecStart=\nExecStart=")[1].splitlines()[0])
    exporter = "prometheus-postgres-exporter"
    found[exporter] = [f"/usr/bin/{exporter}", *_arguments(root, exporter)]
    found["rave-units"] = ["/usr/lib/rave/units", "/run/rave-units", "/run/groups"]
    found["dispatcher"] = ["/usr/bin/rave-dispatcher", "serve"]
    found["nginx"] = ["/usr/sbin/nginx", "-g", "daemon off;"]
    found["postgresql"] = [
        *_AS_POSTGRES, "/usr/lib/postgresql/17/bin/postgres", "-D", "/var/lib/postgresql/17/main",
        "-c", "config_file=/etc/postgresql/17/main/postgresql.conf",
    ]  # fmt: skip
    return found


_AS_POSTGRES = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]


def _defaults(root: Path, package: str) -> dict[str, str]:
    lines = (root / f"etc/default/{package}").read_text().splitlines()
    rows = [line.partition("=") for line in lines if "=" in line and not line.startswith("#")]
    return {key: value.strip('"') for key, _, value in rows}


def _arguments(root: Path, package: str) -> list[str]:
    return _defaults(root, package)["ARGS"].split()


@contextlib.contextmanager
def running(root: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All of it; what is left of it ends with the namespace."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["chroot", root, "/usr/lib/rave/ingress-config"], check=True)
    started: dict[str, subprocess.Popen[bytes]] = {}
    exporter = _defaults(root, "prometheus-postgres-exporter")
    env = {**os.environ, **{k: v for k, v in exporter.items() if k.startswith("DATA_SOURCE")}}
    os.umask(0)  # of mtail's and the console's sockets, which nginx' workers write to
    for name, words in commands(root).items():
        with (root.parent / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen(
                ["chroot", root, *words], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
    _until(lambda: _psql(root), "PostgreSQL takes connections")
    subprocess.run(["chroot", root, *_AS_POSTGRES, "/usr/lib/rave/roles"], check=True)
    try:
        yield started
    finally:
        for process in started.values():
            process.terminate()


def _psql(root: Path) -> bool:
    ready = ["chroot", root, *_AS_POSTGRES, "/usr/lib/postgresql/17/bin/pg_isready", "-q"]
    return subprocess.run([*ready, "-h", "/run/postgresql"], check=False).returncode == 0


def _until(holds: Any, what: str) -> None:
    end = time.monotonic() + 60
    while not holds():
        if time.monotonic() > end:
            raise SystemExit(f"not within a minute: {what}")
        time.sleep(0.2)


class Load:
    """What people and forges do, a little of it."""

    def __init__(self, root: Path) -> None:
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False  # the chain is another test's
        self._tls.verify_mode = ssl.CERT_NONE
        secrets = root / "run/secrets"
        self._key = (secrets / "dispatcher/github-secret").read_text().strip().encode()
        word = f"rave:{(secrets / 'password').read_text()}"
        self._login = {"Authorization": "Basic " + base64.b64encode(word.encode()).decode()}

    def once(self) -> None:
        """One round: pages, one refused; a webhook, the same again, one ill signed."""
        self._ask("/", self._login)
        self._ask("/console/status", self._login)
        self._ask("/ccr/health", self._login)
        self._ask("/", {})
        delivery = str(uuid.uuid4())
        for key in (self._key, self._key, b"wrong"):
            self._hook(delivery, key)

    def _hook(self, delivery: str, key: bytes) -> None:
        body = json.dumps({"action": "opened", "id": delivery}).encode()
        head = {
            "Content-Type": "application/json",
            "X-GitHub-Event": "rave-verify",
            "X-GitHub-Delivery": delivery,
            "X-Hub-Signature-256": "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest(),
        }
        self._ask("/webhooks/github", head, body)

    def _ask(self, path: str, head: dict[str, str], body: bytes | None = None) -> None:
        request = urllib.request.Request(f"https://localhost:3002{path}", body, head)
        with contextlib.suppress(urllib.error.HTTPError, urllib.error.URLError):
            urllib.request.urlopen(request, timeout=60, context=self._tls).close()


def ask(query: Query) -> Answer:
    """As Grafana asks for a panel: of a stretch of time, in steps."""
    now = time.time()
    form = {
        "query": query.expression, "start": f"{now - WINDOW_SECONDS:.0f}", "end": f"{now:.0f}",
        "step": "15",
    }  # fmt: skip
    url = f"http://127.0.0.1:{query.port}/api/v1/query_range"
    try:
        with urllib.request.urlopen(url, urllib.parse.urlencode(form).encode(), timeout=120) as a:
            document = json.load(a)
    except urllib.error.HTTPError as e:
        return Answer(0, e.read().decode(errors="replace")[:500])
    except OSError as e:
        return Answer(0, str(e))
    return Answer(sum(1 for s in document["data"]["result"] if _says_something(s)))


def _says_something(series: dict[str, Any]) -> bool:
    """Whether a series has a point that a panel can draw: NaN is none."""
    return any(value not in ("NaN", "+Inf", "-Inf") for _, value in series["values"])


def inside(folder: Path, base: Path) -> None:
    """Run it, ask the questions of standard input, print the answers."""
    rows = [(Query(port, text), patient) for port, text, patient in json.load(sys.stdin)]
    root = make_root(folder, base, PLAN.on(EngineName.DEBIAN))
    found: dict[Query, Answer] = {}
    with running(root) as started:
        load = Load(root)
        end = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < end and any(not p and not _told(found, q) for q, p in rows):
            load.once()
            for name, process in started.items():
                if process.poll() is not None:
                    raise SystemExit(f"{name}: {(folder / f'{name}.log').read_text()[-1500:]}")
            found |= {q: ask(q) for q, _ in rows if not _told(found, q)}
            time.sleep(PAUSE_SECONDS)
    json.dump([vars(found[q]) for q, _ in rows], sys.stdout)


def _told(found: dict[Query, Answer], query: Query) -> bool:
    return query in found and found[query].series > 0


if __name__ == "__main__":
    inside(Path(sys.argv[1]), Path(sys.argv[2]))
