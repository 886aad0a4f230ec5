"""A machine is watched from this host, across a restart of the guest: nothing twice, no gap."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.conftest import Tool

pytestmark = pytest.mark.vm


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.3)


def ended(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it printed until Ctrl-C, which is no failure."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out, err


def answers(machine: Tool) -> bool:
    return machine("exec", "--timeout", "20", "--", "true", code=None).returncode == 0


def test_logs_and_status_go_on_across_a_restart(machine: Tool) -> None:
    write = "for i in $(seq {} {}); do logger -t tick number $i; done; {}"
    machine("exec", "--", "logger", "-t", "tick", "number", "0")
    logs = machine.start("logs", "--lines", "1", "--follow", "--grep", "number")
    status = machine.start("status", "--watch", "--interval", "1", "--json")
    assert logs.stdout is not None
    assert status.stdout is not None
    assert "number 0" in logs.stdout.readline()
    first = json.loads(status.stdout.readline())
    ticks = write.format(1, 20, "sync; systemctl reboot")
    machine("exec", "--", "sudo", "sh", "-c", ticks, code=None)
    wait_for(lambda: not answers(machine), 30)
    wait_for(lambda: answers(machine), 90)
    machine("exec", "--", "sh", "-c", write.format(21, 40, ""))
    last = first
    while last["boot_id"] == first["boot_id"]:
        last = json.loads(status.stdout.readline())
    time.sleep(3)
    out, err = ended(logs)
    assert [int(n) for n in re.findall(r"tick: number (\d+)$", out, re.M)] == list(range(1, 41))
    assert err.count("no connection") == 1, err
    ended(status)
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
