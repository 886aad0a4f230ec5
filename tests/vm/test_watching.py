"""A machine is watched from this host, across a restart of the guest: nothing twice, no gap."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import Tool

pytestmark = pytest.mark.vm


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.3)


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


def answers(machine: Tool) -> bool:
    return machine("exec", "--timeout", "20", "--", "true", code=None).returncode == 0


def test_logs_and_status_go_on_across_a_restart(machine: Tool) -> None:
    write = "for i in $(seq {} {}); do logger -t tick number $i; done; {}"
    machine("exec", "--", "logger", "-t", "tick", "number", "0")
    # the last lines are counted before they are filtered, as journalctl does while it follows
    words = ("logs", "--lines", "200", "--follow", "--grep", "number [0-9]+$")
    with (
        started(machine, *words) as logs,
        started(machine, "status", "--watch", "--interval", "1", "--json") as status,
    ):
        assert "number 0" in line(logs)
        first = last = json.loads(line(status))
        ticks = write.format(1, 20, "sync; systemctl reboot")
        machine("exec", "--", "sudo", "sh", "-c", ticks, code=None)
        wait_for(lambda: not answers(machine), 30)
        wait_for(lambda: answers(machine), 90)
        machine("exec", "--", "sh", "-c", write.format(21, 40, ""))
        end = time.monotonic() + 60
        while last["boot_id"] == first["boot_id"]:
            assert time.monotonic() < end
            last = json.loads(line(status))
        shown = line(logs)
        while "number 40" not in shown:
            assert time.monotonic() < end + 30
            shown += line(logs)
        out, err = ended(logs)
        ended(status)
    assert [int(n) for n in re.findall(r"tick: number (\d+)$", shown + out, re.M)] == list(
        range(1, 41)
    )
    assert err.count("no connection") == 1, err
    units = {u["name"]: u for u in first["units"]}
    assert units["router"]["state"] == "active"
    assert 0 < units["router"]["memory_bytes"] < units["router"]["memory_limit_bytes"]
    assert first["alerts"] is not None
    assert first["tasks"] is not None


def test_journald_keeps_to_the_profile(machine: Tool) -> None:
    said = machine("exec", "--", "systemd-analyze", "cat-config", "systemd/journald.conf").stdout
    for line in ("Storage=persistent", "SystemMaxUse=200M", "MaxRetentionSec=14day"):
        assert line in said.splitlines()
    wrong = machine("logs", "ruoter", code=2).stderr
    assert "did you mean 'router'?" in wrong
