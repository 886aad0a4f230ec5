"""A fork bomb, a memory hog and a disk filler as an agent: stopped, and nobody else is hurt.

Also who opens secrets is noted, and the clock of a machine that stood still comes right by itself.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator

import pytest

from ravectl import qmp
from ravectl.verify import web
from tests.conftest import Tool
from tests.vm.test_dispatcher import api, root, run, shell

__all__ = ["shell"]  # the fixture

pytestmark = pytest.mark.vm

ANSWERS_SECONDS = 1.0
FORK_BOMB = "echo on; bomb() { bomb | bomb & }; bomb; sleep 60"
MEMORY_HOG = "head -c 900M /dev/zero | tail"
DISK_FILLER = """\
i=0; while fallocate -l 64M fill$i 2>/dev/null; do i=$((i + 1)); done
cat /dev/zero >rest 2>/dev/null; echo x >more 2>/dev/null && cat more || echo "no space"
"""
LEFT = 'printf "%s\\n" "$(stat -f -c "%a %S" /)" "$(stat -f -c %a /home/agent)"'


class Clients:
    """Somebody who asks every service that the ingress leads to, again and again."""

    def __init__(self, tool: Tool) -> None:
        found = tool.instance()
        self._plan = found.require_record().plan
        self._port = found.endpoint().https_port
        self._context = web.trusting(found.places.ca_cert)
        self._signed_in = web.basic(self._plan.operator, tool.secret("ingress/password"))
        self.slowest: dict[str, float] = {}
        self.wrong: list[str] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join(60)

    def _ask(self) -> None:
        routes = [r for r in self._plan.routes if r.access.value in ("anyone", "signed-in")]
        deadline = time.monotonic() + 300
        clients = {
            r.name: web.Client(self._port, r.host or web.DEFAULT_HOST, self._context, deadline)
            for r in routes
        }
        while not self._ending.is_set():
            for r in routes:
                began = time.monotonic()
                try:
                    status = clients[r.name].get(r.probe, self._signed_in).status
                except OSError as e:
                    self.wrong.append(f"{r.name}: {web.explain(e)}")
                    continue
                took = time.monotonic() - began
                self.slowest[r.name] = max(took, self.slowest.get(r.name, 0.0))
                if status != r.status:
                    self.wrong.append(f"{r.name}: {status}")
            time.sleep(0.2)


@contextlib.contextmanager
def nobody_else_is_hurt(tool: Tool) -> Iterator[None]:
    plan = tool.instance().require_record().plan
    units = " ".join(s.unit["debian"] for s in plan.services)
    before = root(tool, f"systemctl show -P NRestarts {units}")
    with Clients(tool) as clients:
        time.sleep(2)  # connections are open, the first answers are there
        clients.slowest.clear()
        yield
    assert clients.wrong == []
    assert clients.slowest
    assert max(clients.slowest.values()) < ANSWERS_SECONDS, clients.slowest
    assert root(tool, f"systemctl show -P NRestarts {units}") == before
    assert root(tool, f"systemctl is-active {units} | sort -u") == "active\n"


def alerted(tool: Tool, names: set[str], since: float, seconds: float) -> str:
    """The first alert of these names that the dispatcher was told of."""
    end = time.monotonic() + seconds
    while True:
        with api(tool) as client:
            found = list(client.items("/events", {"source": "alertmanager"}, 200))
        for event in found:
            for alert in event["payload"].get("alerts", ()):
                if alert["labels"]["alertname"] in names and event["timestamp"] >= stamp(since):
                    return str(alert["labels"]["alertname"])
        assert time.monotonic() < end, [e["payload"].get("alerts") for e in found]
        time.sleep(3)


def wait_for_figures(machine: Tool, query: str, seconds: float, *, wanted: bool = True) -> None:
    """Until Prometheus has what is asked for; with `wanted` False, until it has none of it."""
    asked = ("curl", "-sSG", "http://127.0.0.1:9090/api/v1/query", "--data-urlencode")
    end = time.monotonic() + seconds
    while True:
        said = machine("exec", "--", *asked, f"query={query}").stdout
        if bool(json.loads(said)["data"]["result"]) is wanted:
            return
        assert time.monotonic() < end, said
        time.sleep(2)


def stamp(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def test_a_fork_bomb(shell: Tool) -> None:
    since = time.time() - 2
    with nobody_else_is_hurt(shell):
        task, output = run(shell, FORK_BOMB)
    assert task["status"] == "failed"
    assert "starting processes" in json.dumps(task)
    assert output.startswith("on\n")
    assert root(shell, "pgrep -u agent -c || true") == "0\n"
    alerted(shell, {"AgentForkBomb", "TaskFailures"}, since, 90)


def test_a_memory_hog(shell: Tool) -> None:
    since = time.time() - 2
    with nobody_else_is_hurt(shell):
        task, _ = run(shell, MEMORY_HOG)
    assert task["outcome"] == "out-of-memory"
    alerted(shell, {"OomKill"}, since, 60)


def notes(tool: Tool, words: str) -> list[dict[str, str]]:
    """The fields of what the kernel noted, of those lines that hold `words`."""
    text = root(tool, f"journalctl -q -o cat _TRANSPORT=audit -g '{words}' || true")
    return [dict(re.findall(r'(\w+)="?([^" ]+)', line)) for line in text.splitlines()]


def test_who_opens_a_secret_is_noted(shell: Tool) -> None:
    """An operator is; services and agents, who could make too many of them, are not."""
    secret = "/run/secrets/dispatcher/api-token"
    forged = 'SYSCALL success=yes auid=1000 uid=0 comm="cat" key="rave-secrets"'
    script = f"cat {secret} 2>&1; logger -t audit '{forged}'"
    assert "Permission denied" in run(shell, script)[1]
    root(shell, f"systemd-run -q --wait --collect --uid=vibe-kanban cat {secret} || true")
    root(shell, f"cat {secret} >/dev/null")
    made = [n for n in notes(shell, 'SYSCALL.*key="rave-secrets"') if n["comm"] == "cat"]
    assert [(n["success"], n["auid"], n["uid"]) for n in made] == [("yes", "1000", "0")]
    assert all(n.get("auid") == "1000" for n in notes(shell, "SYSCALL.*rave-secrets"))
    assert notes(shell, 'SYSCALL.*comm="sudo".*key="rave-sudo"')[-1]["auid"] == "1000"
    assert root(shell, "auditctl -s | grep ^lost") == "lost 0\n"


def test_a_disk_filler(shell: Tool) -> None:
    since = time.time() - 2
    try:
        with nobody_else_is_hurt(shell):
            task, output = run(shell, DISK_FILLER)
        assert output == "no space\n"
        assert task["status"] == "completed"
        of_all, of_agents = root(shell, LEFT).splitlines()
        blocks, size = map(int, of_all.split())
        assert blocks * size > 2**30, "the machine's own disk has more than 1 GB left"
        assert int(of_agents) == 0
        alerted(shell, {"DiskFilling"}, since, 200)
    finally:
        root(shell, "rm -rf /home/agent/tasks/*")


def test_a_burst_of_strangers_is_told(machine: Tool) -> None:
    """Also when they are the first to be refused there: no series begins with them."""
    # what is told already is not told again, and who was refused before counts for 5 minutes: most
    # of them went by in the tests above
    wait_for_figures(machine, "ALERTS{alertname='AuthFailures'}", 400, wanted=False)
    # two scrapes after a start
    wait_for_figures(machine, "rave_http_requests_total{route='kanban-host'}", 60)
    port, ca = machine.instance().endpoint().https_port, machine.workspace / ".rave/ca/ca.crt"
    since = time.time()
    end = time.monotonic() + 30
    with web.Client(port, "kanban.localhost", web.trusting(ca), end) as client:
        assert [client.get("/", {}).status for _ in range(30)] == [401] * 30
    assert time.time() - since < 8, "they come between two scrapes"
    alerted(machine, {"AuthFailures"}, since, 60)


def test_the_clock_comes_right_after_the_host_slept(machine: Tool) -> None:
    """QEMU's `stop` does to the guest what a sleeping host does: its clock stands still."""

    def off() -> float:
        before = time.time()
        said = float(machine("exec", "--", "date", "+%s.%N").stdout)
        return abs(said - (before + time.time()) / 2)

    assert off() < 2
    monitor = machine.instance().monitor
    with qmp.Monitor(monitor) as ask:
        ask.ask("stop")
        time.sleep(30)
        ask.ask("cont")
    assert off() > 20, "it did not stand still"
    end = time.monotonic() + 60
    while off() > 2:
        assert time.monotonic() < end
        time.sleep(2)
