"""A machine under load: its memory, and what fails, while requests come and an agent works.

All routes that answer anybody are asked in turn, and webhooks are delivered. The agent counts for
as long as the load lasts, holding as much memory as its limit leaves. What the machine uses is
looked at every five seconds, as `ravectl status --watch` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from benchmarks.rotation import Client, Credentials

from ravectl import workspace
from ravectl.instance import Instance
from ravectl.model import Access
from ravectl.verify import web

MB = 2**20
WORKERS = 10
SETTLE_SECONDS = 60.0  # after the start, until it is idle
# dd holds a buffer of half of its limit and fills it again and again
PROFILE = """\
extends: safe
name: endurance
agents:
  types:
    ai-engineer:
      command: [/usr/bin/dd, if=/dev/urandom, of=/dev/null, bs=96M]
      time: {seconds} s
"""
# each is a sum of failures since the start of the load
QUERIES = {
    "scrapes that failed": "sum by (job) (count_over_time(up[{s}s]) - sum_over_time(up[{s}s]))",
    "rules that failed": "sum(increase(prometheus_rule_evaluation_failures_total[{s}s]))",
    "rounds of rules that were missed": (
        "sum(increase(prometheus_rule_group_iterations_missed_total[{s}s]))"
    ),
    "notifications that failed": "sum(increase(prometheus_notifications_errors_total[{s}s]))",
    "samples not written elsewhere": (
        "sum(increase(prometheus_remote_storage_samples_failed_total[{s}s])) or vector(0)"
    ),
    "OOM kills": "sum(increase(node_vmstat_oom_kill[{s}s]))",
}


class Machine:
    """The tool under measurement, in a workspace of its own."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        (folder / "rave.yaml").write_text(PROFILE.format(seconds=round(seconds) + 300))
        self.environment = {**os.environ, "RAVECTL_WORKSPACE": str(folder)}
        os.environ["RAVECTL_WORKSPACE"] = str(folder)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Begin a command whose output is read as it comes."""
        return subprocess.Popen(
            [sys.executable, "-m", "ravectl", *words],
            env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ravectl", *words],
            env=self.environment, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"ravectl {words[0]} failed")
        return done.stdout

    def ask(self, query: str) -> dict[str, float]:
        """What Prometheus says to a query, by job."""
        url = f"http://127.0.0.1:9090/api/v1/query?query={quote(query)}"
        answer = json.loads(self("exec", "--", "curl", "-sS", "--max-time", "30", url))
        rows = answer["data"]["result"]
        return {r["metric"].get("job", ""): float(r["value"][1]) for r in rows}


class Load:
    """Requests at a rate, spread over all routes."""

    def __init__(self, found: Instance, rate: float) -> None:
        self._found, self._rate = found, rate
        self._context = web.trusting(found.places.ca_cert)
        known = Credentials(found)
        self._clients = [
            (Client(found, r, known), r.host or web.DEFAULT_HOST)
            for r in found.require_record().plan.routes
            if r.access is not Access.NOBODY
        ]
        self._lock = threading.Lock()
        self._next = 0
        self.sent = self.failed = 0
        self.times: list[float] = []

    def run(self, until: float) -> None:
        """Ask until a moment (time.monotonic())."""
        began = time.monotonic()
        threads = [
            threading.Thread(target=self._work, args=(began, until), daemon=True)
            for _ in range(WORKERS)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()

    def _work(self, began: float, until: float) -> None:
        port = self._found.endpoint().https_port
        connections = {
            host: web.Client(port, host, self._context, until + 60) for _, host in self._clients
        }
        while (now := time.monotonic()) < until:
            with self._lock:
                number, self._next = self._next, self._next + 1
            time.sleep(max(began + number / self._rate - now, 0.0))
            client, host = self._clients[number % len(self._clients)]
            self._ask(client, connections[host])

    def _ask(self, client: Client, connection: web.Client) -> None:
        began = time.monotonic()
        try:
            served = client.request()(connection)
        except OSError:
            served = False
        with self._lock:
            self.sent += 1
            self.failed += not served
            self.times.append(time.monotonic() - began)


def measure(machine: Machine, seconds: float, rate: float) -> dict[str, Any]:
    """Put the machine under load; the figures."""
    found = Instance(workspace.find(override=machine.folder).instance_dir("default"), "default")
    time.sleep(SETTLE_SECONDS)
    watching = machine.start("status", "--watch", "--interval", "5", "--json")
    looks: list[dict[str, Any]] = []

    def watch() -> None:
        assert watching.stdout is not None
        looks.extend(json.loads(line) for line in watching.stdout)

    reader = threading.Thread(target=watch, daemon=True)
    reader.start()
    while not looks:
        time.sleep(0.5)
    idle = looks[0]["memory_used_bytes"]
    task_id = machine("task", "submit", "--agent", "ai-engineer", "go on").split()[-1]
    load = Load(found, rate)
    began = time.monotonic()
    load.run(began + seconds)
    took = time.monotonic() - began
    watching.terminate()
    watching.wait(30)
    reader.join(30)
    failures = {n: machine.ask(q.format(s=round(took))) for n, q in QUERIES.items()}
    state = json.loads(machine("task", "show", task_id))["status"]
    machine("task", "cancel", task_id)
    return {
        "idle": idle, "most": max(x["memory_used_bytes"] for x in looks), "looks": looks,
        "sent": load.sent, "failed": load.failed, "rate": load.sent / took, "task": state,
        "p99": sorted(load.times)[int(len(load.times) * 0.99)], "failures": failures,
        "seconds": took,
    }  # fmt: skip


def report(figures: dict[str, Any]) -> None:
    """Print a table."""
    most: dict[str, int] = {}
    for look in figures["looks"]:
        for unit in look["units"]:
            most[unit["name"]] = max(most.get(unit["name"], 0), unit["memory_bytes"] or 0)
    rows = [
        ("memory used, idle", f"{figures['idle'] / MB:.0f} MB", "<= 800 MB"),
        ("memory used under load, at most", f"{figures['most'] / MB:.0f} MB", "<= 1,500 MB"),
        ("requests", f"{figures['sent']:,}", ""),
        ("  of them not served", f"{figures['failed']:,}", "0"),
        ("  a second", f"{figures['rate']:.1f}", "50"),
        ("  p99, from this host", f"{1000 * figures['p99']:.0f} ms", ""),
        ("the agent's task at the end", figures["task"], "running"),
        *(
            (name + "".join(f", {job}" for job, n in found.items() if n and job),
             f"{sum(found.values()):.0f}", "0")
            for name, found in figures["failures"].items()
        ),
        *((f"  {n}, at most", f"{b / MB:.0f} MB", "") for n, b in most.items()),
    ]  # fmt: skip
    for what, figure, target in rows:
        print(f"{what:<44} {figure:>10}   {target}")
    print(f"{figures['seconds']:.0f} s; load of this host: {os.getloadavg()[0]:.1f}")


def main() -> None:
    """Make a machine, put it under load, print the figures, and end it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=600.0)
    options.add_argument("--rate", type=float, default=50.0, help="requests a second")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder), given.seconds)
        try:
            machine("up")
            report(measure(machine, given.seconds, given.rate))
        finally:
            machine("down")


if __name__ == "__main__":
    main()
