"""The dispatcher in the machine: tasks in units of systemd, restarts, and the power cut."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ravectl.dispatcher import Api
from ravectl.verify import events, web
from tests.conftest import Tool

pytestmark = pytest.mark.vm

UNIT = "rave-dispatcher.service"
CONFIG = "/etc/rave/dispatcher.yaml"


class Senders:
    """Threads that deliver signed webhooks, and what was acknowledged, until told to stop."""

    def __init__(self, tool: Tool, threads: int = 4) -> None:
        self._secret = tool.secret("dispatcher/github-secret")
        found = tool.instance()
        self._port = found.endpoint().https_port
        self._context = web.trusting(found.places.ca_cert)
        self.acknowledged: list[str] = []
        self.refused: list[int | str] = []
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._send, daemon=True) for _ in range(threads)]

    def __enter__(self) -> Senders:
        for t in self._threads:
            t.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        for t in self._threads:
            t.join(30)
            assert not t.is_alive()

    def wait_for(self, count: int, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while len(self.acknowledged) < count:
            assert time.monotonic() < end, f"{len(self.acknowledged)} of {count}: {self.refused}"
            time.sleep(0.05)

    def _send(self) -> None:
        deadline = time.monotonic() + 300
        try:
            with web.Client(self._port, web.DEFAULT_HOST, self._context, deadline) as client:
                while not self._ending.is_set():
                    self._deliver(client)
        except OSError as e:
            self.refused.append(web.explain(e))

    def _deliver(self, client: web.Client) -> None:
        nonce = secrets.token_hex(16)
        body = json.dumps({"nonce": nonce, "filling": "x" * 2000}).encode()
        headers = events.github_headers(self._secret, body, nonce, "rave-test")
        answer = client.post(events.GITHUB, body, headers)
        if answer.status == 202:
            self.acknowledged.append(json.loads(answer.body)["event_uuid"])
        else:
            self.refused.append(answer.status)


@contextlib.contextmanager
def api(tool: Tool) -> Iterator[Api]:
    found = tool.instance()
    token = tool.secret("dispatcher/api-token")
    with Api(found.endpoint().https_port, found.places.ca_cert, token, 300) as client:
        yield client


def stored(tool: Tool) -> set[str]:
    with api(tool) as client:
        return {
            e["event_uuid"] for e in client.items("/events", {"event_type": "rave-test"}, 10**6)
        }


def root(tool: Tool, script: str, code: int = 0) -> str:
    return tool("exec", "--", "sudo", "sh", "-c", script, code=code).stdout


def shown(tool: Tool, *names: str) -> list[str]:
    words = [w for n in names for w in ("-P", n)]
    return tool("exec", "--", "systemctl", "show", UNIT, *words).stdout.splitlines()


@pytest.fixture(scope="module")
def shell(machine: Tool) -> Iterator[Tool]:
    """The machine, in which an agent's prompt is a script: so a test says what it does."""
    machine("up", "--safe")
    shipped = machine("exec", "--", "cat", CONFIG).stdout
    config = yaml.safe_load(shipped)
    config["agents"]["ai-engineer"] |= {"command": ["/bin/sh"], "seconds": 20}
    config["tasks"]["max_attempts"] = 1
    configure(machine, yaml.safe_dump(config))
    yield machine
    machine("up", "--safe")
    configure(machine, shipped)


def configure(tool: Tool, text: str) -> None:
    tool("exec", "--", "sudo", "tee", CONFIG, stdin=text)
    root(tool, f"systemctl restart {UNIT}")


def run(tool: Tool, script: str, seconds: float = 90) -> tuple[dict[str, Any], str]:
    """The task at its end, and what it wrote."""
    with api(tool) as client:
        made = client.post("/tasks", {"agent_type": "ai-engineer", "prompt": script})
        end = time.monotonic() + seconds
        while True:
            task = client.get(f"/tasks/{made['task_id']}")
            if task["status"] in ("completed", "failed"):
                return dict(task), client.output(made["task_id"], 0)[0].decode()
            assert time.monotonic() < end, task
            time.sleep(0.3)


# --- tasks -----------------------------------------------------------------------------------


CONFINED = """\
echo "user $(id -un), $(pwd)"
sed -n -e '/CapEff/p' -e '/NoNewPrivs/p' /proc/self/status
for f in /etc/x /usr/x /home/rave/x /var/lib/rave-dispatcher/x
do touch $f 2>/dev/null && echo "wrote $f"
done
ls /run/secrets/ /home/rave 2>/dev/null
echo $(env | grep -c -i -E 'token|secret|key') secrets
timeout 3 bash -c 'echo >/dev/tcp/10.0.2.2/22' 2>/dev/null && echo "got out"
logger "a note of a task's" 2>/dev/null && echo "wrote to the journal"
ls /run/dbus /run/postgresql 2>/dev/null
python3 - <<'E'
import ctypes, errno, os, socket, stat
for folder, _, names in os.walk("/run"):
    for path in (os.path.join(folder, n) for n in names):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            continue
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            try:
                socket.socket(socket.AF_UNIX, kind).connect(path)
            except OSError:
                continue
            print("somebody listens at", path)
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {"bpf": 321, "perf_event_open": 298, "keyctl": 250, "userfaultfd": 323}.items():
    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1
    if ctypes.get_errno() != errno.EPERM:
        print(name, "is allowed")
E
echo kept >file && cat file
"""


def test_a_task_is_confined(shell: Tool) -> None:
    task, output = run(shell, CONFINED)
    assert output.splitlines() == [
        f"user agent, /home/agent/tasks/{task['task_id']}",
        "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "0 secrets", "kept",
    ]  # fmt: skip
    assert task["status"] == "completed"


def test_its_figures_are_those_of_its_unit(shell: Tool) -> None:
    script = (
        "dd if=/dev/zero of=/dev/null bs=40M count=1 2>/dev/null\n"
        "end=$(($(date +%s) + 3)); while [ $(date +%s) -lt $end ]; do :; done"
    )
    task, _ = run(shell, script)
    assert task["status"] == "completed"
    assert 2000 < task["metrics"]["duration_ms"] < 20_000
    assert 30 < task["metrics"]["memory_usage_mb"] < 100
    assert 20 < task["metrics"]["cpu_usage_percent"] <= 110


def test_a_memory_hog_is_ended_alone(shell: Tool) -> None:
    task, _ = run(shell, "head -c 900M /dev/zero | tail")
    assert task["outcome"] == "out-of-memory"
    assert shown(shell, "NRestarts", "ActiveState") == ["0", "active"]


def test_a_time_out_ends_the_whole_tree(shell: Tool) -> None:
    task, output = run(
        shell, "sleep 1001 & setsid sleep 1002 & (trap '' TERM; sleep 1003) & echo on; wait"
    )
    assert task["outcome"] == "timed-out"
    assert output == "on\n"
    assert root(shell, "pgrep -u agent -a || echo none") == "none\n"


def test_a_cancel_ends_it(shell: Tool) -> None:
    with api(shell) as client:
        made = client.post("/tasks", {"agent_type": "ai-engineer", "prompt": "echo on; sleep 1004"})
        end = time.monotonic() + 30
        while client.output(made["task_id"], 0)[0] != b"on\n":
            assert time.monotonic() < end
            time.sleep(0.3)
        client.post(f"/tasks/{made['task_id']}/cancel")
        while client.get(f"/tasks/{made['task_id']}")["status"] == "running":
            assert time.monotonic() < end
            time.sleep(0.3)
        assert client.get(f"/tasks/{made['task_id']}")["status"] == "failed"
    assert root(shell, "pgrep -u agent -a || echo none") == "none\n"


# --- the service -----------------------------------------------------------------------------


def test_a_shutdown_costs_a_task_no_attempt(shell: Tool) -> None:
    """Its unit, the launcher and the dispatcher are all told to end then; it has one attempt."""
    with api(shell) as client:
        made = client.post(
            "/tasks", {"agent_type": "ai-engineer", "prompt": "sleep 15; echo done"}
        )["task_id"]
        wait_until(client, made, "running")
        time.sleep(1)
    shell("down")
    shell("up", "--safe")
    with api(shell) as client:
        task = wait_until(client, made, "completed")
        assert (task["attempt"], task["outcome"]) == (1, "succeeded")
        assert client.output(made, 0)[0].endswith(b"done\n")


def wait_until(client: Api, task_id: str, status: str, seconds: float = 90) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (task := dict(client.get(f"/tasks/{task_id}")))["status"] != status:
        assert task["status"] in ("pending", "running"), task
        assert time.monotonic() < end, task
        time.sleep(0.3)
    return task


def test_its_units_are_sandboxed(machine: Tool) -> None:
    said = json.loads(root(machine, f"systemd-analyze security --no-pager --json=short {UNIT}"))
    text = machine("exec", "--", "systemd-analyze", "security", "--no-pager", UNIT).stdout
    overall = float(text.split("Overall exposure level for")[1].split(":")[1].split()[0])
    assert overall <= 2.0, [r for r in said if r.get("exposure")]


def test_a_restart_refuses_nobody_and_drains_in_time(machine: Tool) -> None:
    with Senders(machine, threads=2) as senders:
        senders.wait_for(20)
        for _ in range(2):
            root(machine, f"systemctl restart {UNIT}")
            senders.wait_for(len(senders.acknowledged) + 20)
        assert shown(machine, "Result", "NRestarts") == ["success", "0"]
    assert senders.refused == []
    assert set(senders.acknowledged) <= stored(machine)


def test_one_that_hangs_is_started_anew(machine: Tool) -> None:
    dropin = "/run/systemd/system/rave-dispatcher.service.d"
    root(
        machine,
        f"mkdir -p {dropin} && printf '[Service]\\nWatchdogSec=8s\\n' >{dropin}/test.conf && "
        f"systemctl daemon-reload && systemctl restart {UNIT}",
    )
    try:
        (pid,) = shown(machine, "MainPID")
        root(machine, f"kill -STOP {pid}")
        end = time.monotonic() + 90
        while shown(machine, "NRestarts", "ActiveState") != ["1", "active"]:
            assert time.monotonic() < end
            time.sleep(1)
        assert shown(machine, "MainPID") != [pid]
    finally:
        root(machine, f"rm -r {dropin} && systemctl daemon-reload && systemctl restart {UNIT}")


@pytest.mark.parametrize("count", [30, 150] if os.environ.get("RAVE_EVERY_STEP") else [150])
def test_a_power_cut_loses_nothing_that_was_acknowledged(machine: Tool, count: int) -> None:
    before = stored(machine)
    pid = machine.pid()
    assert pid is not None
    with Senders(machine, threads=8) as senders:
        senders.wait_for(count)
        os.kill(pid, signal.SIGKILL)
        machine.wait_for_no_qemu()
    assert len(senders.acknowledged) >= count
    machine("up", "--safe")
    after = stored(machine)
    assert not set(senders.acknowledged) - after, "acknowledged and lost"
    assert before <= after
    report = json.loads(machine("verify", "--check", "D2", "--json").stdout)
    assert [r["outcome"] for r in report["results"]] == ["passed"]
