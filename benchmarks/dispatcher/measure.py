"""The figures of docs/benchmarks.md for the dispatcher. All of one run, on this host."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import uvloop
import yaml
from benchmarks.dispatcher import crash, load

SECRET = b"benchmark-secret"
PORT, OTHER_PORT = 3891, 3892
CONNECTIONS = 64
RULES = [
    {
        "name": "review", "agent_type": "backend-architect", "types": ["pull_request"],
        "prompt": "Review {{ $.pull_request.title }}",
    }
]  # fmt: skip


def row(what: str, figure: str, target: str = "") -> None:
    print(f"{what:<58} {figure:>26}   {target}", flush=True)


class Dispatcher:
    """Ours, in a folder of its own."""

    def __init__(self, folder: Path, rules: list[dict[str, object]]) -> None:
        self.folder = folder
        self.store = folder / "events.db"
        (folder / "secrets").mkdir(parents=True)
        for name in ("api-token", "github-secret"):
            (folder / "secrets" / name).write_bytes(SECRET)
        self.config = folder / "dispatcher.yaml"
        self.config.write_text(yaml.safe_dump({
            "listen": {"port": PORT}, "store": {"path": str(self.store)},
            "secrets_dir": str(folder / "secrets"), "rules": rules,
            "runner": {"kind": "unconfined", "home": str(folder)},
            "limits": {"requests_per_second": 1e9, "burst": 10**9},
        }))  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rave_dispatcher", "--config", self.config, "serve"],
                stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(30)

    @property
    def rss_mb(self) -> float:
        assert self.process is not None
        return rss_mb(self.process.pid)


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def ours(folder: Path, rules: list[dict[str, object]] | None = None) -> Iterator[Dispatcher]:
    made = Dispatcher(folder, RULES if rules is None else rules)  # type: ignore[arg-type]
    made.start()
    try:
        run(crash.wait(PORT))
        yield made
    finally:
        made.kill(signal.SIGTERM)


@contextlib.contextmanager
def theirs(folder: Path) -> Iterator[int]:
    """Debian's webhook: checks the same signature, runs `true` for each, keeps nothing."""
    hooks = folder / "hooks.json"
    hooks.write_text(json.dumps([{
        "id": "github", "execute-command": "/bin/true", "success-http-response-code": 202,
        "trigger-rule": {"match": {
            "type": "payload-hmac-sha256", "secret": SECRET.decode(),
            "parameter": {"source": "header", "name": "X-Hub-Signature-256"},
        }},
    }]))  # fmt: skip
    process = subprocess.Popen(
        ["webhook", "-hooks", hooks, "-ip", "127.0.0.1", "-port", str(OTHER_PORT)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        run(crash.wait(OTHER_PORT))
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def run(coroutine: object) -> object:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(coroutine)  # type: ignore[arg-type]


def sustained(port: int, path: str, seconds: float) -> load.Outcome:
    requests = load.Requests(path, SECRET, load.payload())
    made = load.closed_loop(port, requests, load.new_ids(), seconds, CONNECTIONS)
    return run(made)  # type: ignore[return-value]


def steady(port: int, path: str, seconds: float) -> load.Outcome:
    requests = load.Requests(path, SECRET, load.payload())
    return run(load.at_rate(port, requests, load.new_ids(), 500, seconds))  # type: ignore[return-value]


def measure_throughput(folder: Path, scale: float) -> None:
    seconds = 60 * scale
    with ours(folder / "throughput") as d:
        assert d.process is not None
        mine = sustained(PORT, "/webhooks/github", seconds)
        cpu = cpu_seconds(d.process.pid)
        calm = steady(PORT, "/webhooks/github", seconds)
    rate = mine.ok / mine.seconds
    stored = len(crash.stored_ids(d.store))
    assert stored == mine.ok + calm.ok, "each that was answered is stored"
    row(f"durable, signed ingestion, {seconds:.0f} s", f"{rate:.0f} events/s", ">= 1,500")
    row("  refused or broken", f"{sum(mine.statuses.values()) - mine.ok + mine.broken}", "0")
    row("  its CPU for an event", f"{1000 * cpu / mine.ok:.2f} ms")
    row("latency at 500 events/s, p50 / p99",
        f"{calm.percentile(0.5):.1f} / {calm.percentile(0.99):.1f} ms", "p99 <= 20 ms")  # fmt: skip
    if shutil.which("webhook") is None:
        row("Debian's webhook", "not installed", "apt-get install webhook")
        return
    with theirs(folder):
        other = sustained(OTHER_PORT, "/hooks/github", seconds)
        other_calm = steady(OTHER_PORT, "/hooks/github", seconds)
    other_rate = other.ok / other.seconds
    row("  the same load against webhook, which keeps nothing", f"{other_rate:.0f} events/s")
    row("  webhook at 500 events/s, p50 / p99",
        f"{other_calm.percentile(0.5):.1f} / {other_calm.percentile(0.99):.1f} ms")  # fmt: skip
    row("  ours by webhook's", f"{rate / max(other_rate, 1):.2f}", ">= 0.5")


def measure_memory(folder: Path, scale: float) -> None:
    events = int(1_000_000 * scale)
    requests = load.Requests("/webhooks/github", SECRET, load.payload(500))
    seen = []
    with ours(folder / "memory") as d:
        for _ in range(10):
            outcome = run(
                load.closed_loop(PORT, requests, load.new_ids(), 3600, CONNECTIONS, events // 10)
            )
            assert isinstance(outcome, load.Outcome)
            assert outcome.ok == events // 10
            seen.append(d.rss_mb)
    figures = " ".join(f"{mb:.0f}" for mb in seen)
    row(f"memory after {events} events (RSS)", f"{seen[-1]:.0f} MB", "<= 120 MB")
    row("  after each tenth", figures + " MB", "flat")
    shutil.rmtree(folder / "memory")


def measure_kills(folder: Path, scale: float) -> None:
    kills = int(200 * scale)
    d = Dispatcher(folder / "kills", [])
    requests = load.Requests("/webhooks/github", SECRET, load.payload())
    found = crash.kill_repeatedly(
        d.start, d.kill, PORT, requests, kills, random.Random(4), most=10_000
    )  # fmt: skip
    d.kill()
    lost = found.acknowledged - crash.stored_ids(d.store)
    row(f"acknowledged and lost, {kills} x kill -9 under load",
        f"{len(lost)} of {len(found.acknowledged)}", "0")  # fmt: skip
    row("start to first answer, median / most",
        f"{statistics.median(found.starts):.2f} / {max(found.starts):.2f} s", "<= 1 s")  # fmt: skip


def measure_duplicates(folder: Path, scale: float) -> None:
    ids = [str(uuid.uuid4()) for _ in range(int(100_000 * scale))]
    order = ids * 3
    random.Random(5).shuffle(order)
    rules = [{**RULES[0], "types": ["push"], "prompt": "x"}]
    requests = load.Requests("/webhooks/github", SECRET, load.payload(500))
    with ours(folder / "duplicates", rules) as d:  # type: ignore[arg-type]
        outcome = run(load.closed_loop(PORT, requests, iter(order), 3600, CONNECTIONS))
        assert isinstance(outcome, load.Outcome)
        assert outcome.ok == len(order)
        while crash.unprocessed(d.store):
            time.sleep(1)
    twice, events, tasks = crash.processed_twice(d.store)
    assert events == len(ids)
    row(
        f"processed twice, {len(ids)} deliveries 3 times, shuffled", f"{twice} ({tasks} tasks)", "0"
    )


def measure_start(folder: Path) -> None:
    seen = []
    d = Dispatcher(folder / "start", RULES)  # type: ignore[arg-type]
    for _ in range(7):
        began = time.monotonic()
        d.start()
        run(crash.wait(PORT))
        seen.append(time.monotonic() - began)
        d.kill(signal.SIGTERM)
    row("start to ready, empty store, median of 7", f"{statistics.median(seen):.2f} s", "<= 1 s")


PARTS = ("start", "throughput", "kills", "duplicates", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--scale", type=float, help="a share of everything")
    parser.add_argument("--only", choices=PARTS, action="append")
    arguments = parser.parse_args()
    scale = arguments.scale or (0.1 if arguments.quick else 1.0)
    wanted = arguments.only or PARTS
    folder = Path(tempfile.mkdtemp(prefix="rave-dispatcher-"))
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    try:
        if "start" in wanted:
            measure_start(folder)
        for name, measure in (
            ("throughput", measure_throughput), ("kills", measure_kills),
            ("duplicates", measure_duplicates), ("memory", measure_memory),
        ):  # fmt: skip
            if name in wanted:
                measure(folder, scale)
    finally:
        shutil.rmtree(folder)
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
