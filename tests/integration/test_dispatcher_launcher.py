"""The way of a task from the dispatcher's runner through the launcher to its unit and back.

systemd does not run where these tests do: fake `systemd-run` and `systemctl` stand in for it, which
run the command with the files that the unit names, and kill its processes. What the real ones do
with the unit's limits, only a machine shows.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rave_dispatcher.adapters.runners import launcher
from rave_dispatcher.adapters.runners.systemd import SystemdRunner
from rave_dispatcher.application.ports import Job, Ran, RunnerUnavailableError
from rave_dispatcher.config import Agent, Config, RunnerConfig
from rave_dispatcher.domain.events import Trace
from rave_dispatcher.domain.tasks import AgentType, Outcome

FAKE_RUN = """#!/usr/bin/env python3
import json, os, subprocess, sys, time
words = sys.argv[1:]
at = words.index("--")
options = dict(w.lstrip("-").split("=", 1) for w in words[:at] if "=" in w)
properties = dict(w.split("=", 2)[1:] for w in words[:at] if w.startswith("--property="))
environment = dict(w.split("=", 2)[1:] for w in words[:at] if w.startswith("--setenv="))
state = os.path.join(os.environ["FAKE_SYSTEMD"], options["unit"])
path = lambda name: properties[name].removeprefix("file:")
if os.path.exists(state):
    sys.exit("Unit was already loaded")
if os.fork():
    while not os.path.exists(state):
        time.sleep(0.01)
    sys.exit(0)
os.setsid()
null = os.open(os.devnull, os.O_RDWR)
for fd in (0, 1, 2):  # systemd's units are not children of systemd-run
    os.dup2(null, fd)
child = subprocess.Popen(
    words[at + 1:], stdin=open(path("StandardInput")), stdout=open(path("StandardOutput"), "w"),
    stderr=subprocess.STDOUT, cwd=properties["WorkingDirectory"],
    env={"PATH": os.environ["PATH"], **environment})
def say(**fields):
    with open(state + ".new", "w") as f:
        f.write("".join(f"{k}={v}\\n" for k, v in fields.items()))
    os.rename(state + ".new", state)
say(ActiveState="active", SubState="running", Pid=os.getpid())
code = child.wait()
say(ActiveState="active" if code == 0 else "failed", SubState="exited" if code == 0 else "failed",
    Result="success" if code == 0 else "exit-code", ExecMainCode=1, ExecMainStatus=code,
    MemoryPeak=1048576, CPUUsageNSec=1000000, ExecMainStartTimestampMonotonic=1000,
    ExecMainExitTimestampMonotonic=5000, Pid=os.getpid())
"""
FAKE_CTL = """#!/usr/bin/env python3
import os, signal, sys, time
state = os.path.join(os.environ["FAKE_SYSTEMD"], sys.argv[2])
text = open(state).read() if os.path.exists(state) else "ActiveState=inactive\\nSubState=dead\\n"
if sys.argv[1] == "show":
    print(text, end="")
elif sys.argv[1] == "reset-failed" and os.path.exists(state):
    os.remove(state)
elif sys.argv[1] == "stop" and "Pid=" in text:
    pid = int(text.split("Pid=")[1].split()[0])
    open(state + ".stopped", "w").close()
    time.sleep(float(os.environ.get("FAKE_STOP_SECONDS", 0)))
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
TASK = "01a20fd0-8a31-717b-8313-d720ca1794d8"


@pytest.fixture
def fake_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("systemd-run", FAKE_RUN), ("systemctl", FAKE_CTL)):
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SYSTEMD", str(tmp_path))
    monkeypatch.setattr(launcher, "RUN", tmp_path / "run")
    return tmp_path


@pytest.fixture
def listening(fake_systemd: Path) -> Iterator[Path]:
    """The launcher's socket: as systemd does it, one launcher for each connection."""
    if os.geteuid() != 0:
        pytest.skip("the launcher is root's")
    agents = {
        AgentType.BACKEND_ARCHITECT: Agent(
            command=("sh", "-c", "cat; echo; echo $TRACEPARENT; pwd")
        ),
        AgentType.AI_ENGINEER: Agent(command=("sh", "-c", "echo begun; sleep 545")),
        AgentType.FRONTEND_DEVELOPER: Agent(
            command=("sh", "-c", "head -c 300000 /dev/zero; exit 3")
        ),
    }
    config = Config(agents=agents, runner=RunnerConfig(user="root", home=fake_systemd / "home"))
    (fake_systemd / "home").mkdir()
    path = fake_systemd / "launcher.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    def serve(connection: socket.socket) -> None:
        with connection:
            launcher.serve(connection, config)

    threading.Thread(target=accept, daemon=True).start()
    yield path
    server.close()


def run(
    path: Path, kind: AgentType, prompt: str = "", cancel_at: bytes | None = None
) -> tuple[Ran | None, bytes]:
    output = b""
    seen = asyncio.Event()

    async def on_output(data: bytes) -> None:
        nonlocal output
        output += data
        if cancel_at is not None and cancel_at in output:
            seen.set()

    async def go() -> Ran | None:
        job = Job(TASK, 1, kind, prompt, Trace("a" * 32, "b" * 16))
        running = asyncio.create_task(SystemdRunner(path).run(job, on_output))
        if cancel_at is None:
            return await running
        await asyncio.wait_for(seen.wait(), 10)
        running.cancel()
        await asyncio.wait([running])
        return None

    return asyncio.run(go()), output


def test_a_task_gets_its_prompt_and_its_output_comes_back(listening: Path) -> None:
    prompt = "ünd ein langer Prompt\n" * 2000
    ran, output = run(listening, AgentType.BACKEND_ARCHITECT, prompt)
    workdir = listening.parent / "home" / "tasks" / TASK
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    assert output.decode() == f"{prompt}\n{trace}\n{workdir}\n"
    assert ran is not None
    assert ran.outcome is Outcome.SUCCEEDED
    assert (ran.usage.duration_ms, ran.usage.memory_usage_mb, ran.usage.cpu_usage_percent) == (
        4,
        1.0,
        25.0,
    )
    assert list((listening.parent / "run").iterdir()) == [], "the prompt is gone"
    assert (listening.parent / f"rave-task-{TASK}.service.stopped").exists()


def test_a_failure_comes_back_with_all_of_its_output(listening: Path) -> None:
    ran, output = run(listening, AgentType.FRONTEND_DEVELOPER)
    assert ran is not None
    assert (ran.outcome, ran.detail) == (Outcome.ERROR, "exit code 3")
    assert output == b"\0" * 300_000


def test_a_launcher_that_cannot_begin_is_told_apart(tmp_path: Path) -> None:
    """No task could be run then, and none is at fault."""
    with pytest.raises(RunnerUnavailableError, match="cannot be reached: No such file"):
        run(tmp_path / "none.sock", AgentType.AI_ENGINEER)
    path = tmp_path / "launcher.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def hang_up() -> None:  # as systemd does when the launcher's unit cannot start
            connection, _ = server.accept()
            connection.recv(65536)
            connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(RunnerUnavailableError, match="ended without a word"):
            run(path, AgentType.AI_ENGINEER)


def test_hanging_up_ends_the_task(listening: Path) -> None:
    run(listening, AgentType.AI_ENGINEER, cancel_at=b"begun\n")
    end = time.monotonic() + 10
    while not (listening.parent / f"rave-task-{TASK}.service.stopped").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    while any(b"545" in p.read_bytes() for p in _commands()):
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.05)


def _commands() -> list[Path]:
    return [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists() and _is_sleep(p)]


def _is_sleep(path: Path) -> bool:
    try:
        return path.read_bytes() == b"sleep\x00545\x00"
    except OSError:
        return False


def test_the_next_attempt_waits_until_the_former_is_gone(
    listening: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of the dispatcher hangs up and begins anew at once; units take a while to stop."""
    monkeypatch.setenv("FAKE_STOP_SECONDS", "1.5")
    run(listening, AgentType.AI_ENGINEER, cancel_at=b"begun")
    ran, output = run(listening, AgentType.BACKEND_ARCHITECT, "again")
    assert ran is not None
    assert (ran.outcome, ran.detail) == (Outcome.SUCCEEDED, "")
    assert output.startswith(b"again\n")
    end = time.monotonic() + 10
    while list(launcher.RUN.iterdir()):  # nothing stays
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["tasks", f"tasks/{TASK}"])
def test_root_follows_no_link_of_an_agents(listening: Path, name: str) -> None:
    outside = listening.parent / "outside"
    outside.mkdir()
    before = outside.stat()
    link = listening.parent / "home" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    ran, _ = run(listening, AgentType.BACKEND_ARCHITECT, "x")
    assert ran is not None
    assert ran.outcome is Outcome.NOT_STARTED
    assert ran.detail == "the task's folder is no folder"
    assert list(outside.iterdir()) == []
    assert outside.stat().st_uid == before.st_uid
