"""A machine is watched from this host, over a lost connection: nothing twice, no gap."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from tests.conftest import Tool

pytestmark = pytest.mark.vm


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What else it printed until Ctrl-C, which is no failure."""
    assert process.stdout is not None
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    # not communicate(): that passes over what readline() has read ahead
    out, err = process.stdout.read(), process.stderr.read()
    assert process.wait(20) == 0, err
    assert "Traceback" not in err
    return out, err


@contextlib.contextmanager
def started(machine: Tool, *words: str) -> Iterator[subprocess.Popen[str]]:
    process = machine.start(*words)
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def line(process: subprocess.Popen[str], seconds: float = 60) -> str:
    """The next line that it prints."""
    assert process.stdout is not None
    got: list[str] = []
    reader = threading.Thread(
        target=lambda stream: got.append(stream.readline()), args=(process.stdout,), daemon=True
    )
    reader.start()
    reader.join(seconds)
    assert got, "it said nothing"
    return got[0]


@pytest.mark.parametrize(
    "words", [("logs", "--follow"), ("status", "--watch", "--name", "default", "--interval", "1")]
)
def test_it_ends_when_nobody_reads_it(machine: Tool, words: tuple[str, ...]) -> None:
    with started(machine, *words) as process:
        line(process)
        assert process.stdout is not None
        process.stdout.close()
        for _ in range(3):
            machine("exec", "--", "logger", "-t", "tick", "again")
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert "no connection" not in process.stderr.read()


def test_logs_and_status_go_on_over_a_lost_connection(machine: Tool) -> None:
    machine("exec", "--", "logger", "-t", "tick", "number", "0")
    # the last lines are counted before they are filtered, as journalctl does while it follows
    words = ("logs", "--lines", "200", "--follow", "--grep", "number [0-9]+$")
    with (
        started(machine, *words) as logs,
        started(
            machine, "status", "--watch", "--name", "default", "--interval", "1", "--json"
        ) as status,
    ):
        assert "number 0" in line(logs)
        shown = line(status)
        assert shown, ended(status)
        first = json.loads(shown)
        # the connections end between two entries, as a restart of the machine ends them; [s]: the
        # shell that has this pattern in its own command line goes on
        write = "for i in $(seq {} {}); do logger -t tick number $i; done"
        cut = f"{write.format(1, 20)}; pkill -f '[s]shd-session: rave'"
        machine("exec", "--", "sudo", "systemd-run", "--quiet", "--wait", "sh", "-c",
                f"{cut}; {write.format(21, 40)}", code=None)  # fmt: skip
        shown, end = "", time.monotonic() + 60
        while "number 40\n" not in shown:
            assert time.monotonic() < end
            shown += line(logs)
        last = first
        while last["uptime_seconds"] < first["uptime_seconds"] + 5 or not last["tasks"]:
            assert time.monotonic() < end
            last = json.loads(line(status))
        out, err = ended(logs)
        _, said = ended(status)
    numbers = re.findall(r" tick\[\d+\]: number (\d+)$", shown + out, re.M)
    assert numbers == [str(n) for n in range(1, 41)]
    assert [text.count("no connection") for text in (err, said)] == [1, 1], err + said
    router = next(u for u in last["units"] if u["name"] == "router")
    assert router["state"] == "active"
    assert 0 < router["memory_bytes"] < router["memory_limit_bytes"]
    assert last["alerts"] is not None


def test_journald_keeps_to_the_profile(machine: Tool) -> None:
    said = machine("exec", "--", "systemd-analyze", "cat-config", "systemd/journald.conf").stdout
    for line in ("Storage=persistent", "SystemMaxUse=200M", "MaxRetentionSec=14day"):
        assert line in said.splitlines()
    wrong = machine("logs", "ruoter", code=2).stderr
    assert "did you mean 'router'?" in wrong
