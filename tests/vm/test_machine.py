"""The machine lives: in and out, crash, down, up, reset. The tests run in this order."""

from __future__ import annotations

import os
import signal
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from ravectl import sops, ssh, vault
from ravectl.model import CONSOLE_SOCKET
from tests.conftest import Tool

pytestmark = pytest.mark.vm


def test_a_stopped_service_fails_its_checks(machine: Tool) -> None:
    machine("exec", "--", "sudo", "systemctl", "stop", "prometheus-node-exporter")
    try:
        done = machine("verify", "--check", "S2", "--check", "O1", "--format", "junit", code=3)
    finally:
        machine("exec", "--", "sudo", "systemctl", "start", "prometheus-node-exporter")
    cases = {c.get("name", "")[:2]: c for c in ET.fromstring(done.stdout).iter("testcase")}
    assert cases["S2"].find("failure") is not None
    assert "node-exporter" in ET.tostring(cases["S2"], encoding="unicode")


def test_up_again_says_so_and_succeeds(machine: Tool) -> None:
    before = machine.pid()
    assert "is running already" in machine("up", "--safe").stderr
    assert machine.pid() == before


def test_commands_go_in_and_results_come_out(machine: Tool) -> None:
    assert machine("exec", "--", "uname", "-s").stdout == "Linux\n"
    assert machine("exec", "--", "sh", "-c", "exit 7", code=7).stdout == ""
    assert machine("exec", "--", "cat", stdin="through\n").stdout == "through\n"
    assert machine("exec", "--", "sh", "-c", "echo oops >&2").stderr == "oops\n"


def test_files_are_copied_both_ways(machine: Tool, tmp_path: Path) -> None:
    (tmp_path / "a:b c").write_text("content")
    machine("cp", str(tmp_path / "a:b c"), "vm:/home/rave/copied")
    machine("cp", "vm:/home/rave/copied", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "content"
    assert "one of the two" in machine("cp", "a", "b", code=2).stderr


def test_logs_and_console_speak(machine: Tool) -> None:
    assert "Loaded JSON config" in machine("logs", "router").stdout
    assert "rave: ssh listens" in machine("console").stdout


def test_who_did_not_sign_in_cannot_ask_for_the_console(machine: Tool) -> None:
    """Of all accounts only the ingress's opens the socket; the dispatcher's port has no console."""
    ask = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "20")
    at = ("--unix-socket", CONSOLE_SOCKET, "http://console/console/status")

    def as_user(user: str, *words: str) -> subprocess.CompletedProcess[str]:
        return machine("exec", "--", "sudo", "-u", user, *ask, *words, code=None)

    assert as_user("www-data", *at).stdout == "200"
    accounts = [a.name for a in machine.instance().require_record().plan.accounts]
    assert "agent" in accounts
    for name in accounts:
        assert as_user(name, *at).stdout == "000", name
    own = as_user("rave-dispatcher", "http://127.0.0.1:3001/console/status")
    assert own.stdout == "404"


def test_the_host_key_is_pinned(machine: Tool, tmp_path: Path) -> None:
    target = machine.instance().target()
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    wrong = ssh.Target(
        target.port, target.user, target.key_file, (other.with_suffix(".pub").read_text(),)
    )
    with pytest.raises(ssh.HostKeyError):
        ssh.Connection(wrong)
    with ssh.Connection(target) as connection:
        assert connection.run("true").returncode == 0


def values_of(tool: Tool) -> dict[str, str]:
    """What is secret in each value: of a key its lines, of a derived one what it is made of."""
    found = tool.instance()
    identity = sops.find_identity()
    vaults = [
        vault.read(p, identity) for p in (found.places.shared, found.places.machine(found.folder))
    ]
    parts = {}
    for held in vaults:
        for name, value in held.values.items():
            if name not in ("ca/cert", "ingress/tls-cert"):
                for number, line in enumerate(value.splitlines()):
                    if "-----" not in line:
                        parts[f"{name} {number}"] = line
    return parts


def test_no_secret_is_seen(machine: Tool) -> None:
    found = machine.instance()
    secrets = [v for v in values_of(machine).values() if len(v) > 10]
    assert len(secrets) > 4
    pid = machine.pid()
    places = {
        "QEMU's arguments": Path(f"/proc/{pid}/cmdline").read_text(errors="replace"),
        "QEMU's environment": Path(f"/proc/{pid}/environ").read_text(errors="replace"),
        "the console": found.console_log.read_text(errors="replace"),
        "the journal": machine("exec", "--", "sudo", "journalctl", "-b", "--no-pager").stdout,
        "status": machine("status", "--json").stdout,
        "what up says": machine("up").stdout,
    }
    for place, text in places.items():
        assert not [s for s in secrets if s in text], f"{place} shows a secret"
    for path in found.folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0 or path.suffix in {".crt", ".pub"}, path


def test_an_instance_that_is_not_there(machine: Tool) -> None:
    done = machine("status", "--json", "--name", "never-made", code=1)
    assert "there is no instance 'never-made'" in done.stderr


def test_two_commands_on_one_instance(machine: Tool) -> None:
    with machine.instance().lock():
        done = machine("up", "--safe", code=1)
    assert "is in use by another ravectl" in done.stderr
    assert "fix:" in done.stderr


def test_killed_qemu_is_a_crash_and_data_is_kept(machine: Tool) -> None:
    machine("exec", "--", "sh", "-c", "echo kept >~/kept; sync")
    pid = machine.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    machine.wait_for_no_qemu()
    assert machine.status()["state"] == "crashed"
    ports = machine.status()["ssh_port"]
    machine("up", "--safe")
    assert machine("exec", "--", "cat", "/home/rave/kept").stdout == "kept\n"
    assert machine.status()["ssh_port"] == ports


def test_down_shuts_the_guest_down(machine: Tool) -> None:
    assert "the guest shut down" in machine("down").stderr
    assert machine.status()["state"] == "stopped"
    assert machine.pid() is None
    check = ["qemu-img", "check", "-q", machine.instance().overlay]
    # 3: sound, and a power cut of an earlier test left clusters that nobody uses
    assert subprocess.run(check, check=False).returncode in (0, 3)
    assert "was not running" in machine("down").stderr


def test_a_stale_number_is_nobody(machine: Tool) -> None:
    # another process with our UUID on its command line, but not QEMU
    record = machine.instance().require_record()
    with subprocess.Popen(["sh", "-c", "sleep 60; true", "-uuid", record.uuid]) as other:
        try:
            assert machine.status()["state"] == "stopped"
            machine("down")
            assert other.poll() is None
        finally:
            other.kill()


def test_a_service_that_never_starts_is_named(machine: Tool) -> None:
    # written into the stopped machine's disk by its own next boot would need a boot more; so
    # the running machine is broken, and started again
    machine("up", "--safe")
    script = (
        "mkdir -p /etc/systemd/system/vibe-kanban.service.d && "
        'printf \'[Service]\\nExecStart=\\nExecStart=/bin/sh -c "echo broken on purpose; exit 1"\\n'
        "Restart=no\\n' >/etc/systemd/system/vibe-kanban.service.d/break.conf && sync"
    )
    machine("exec", "--", "sudo", "sh", "-c", script)
    machine("down")
    done = machine("up", "--safe", code=1)
    assert "service kanban (vibe-kanban.service) failed" in done.stderr
    assert "broken on purpose" in done.stderr
    assert "fix:" in done.stderr
    assert machine.pid() is None


def test_reset_gives_a_fresh_disk(machine: Tool) -> None:
    machine("reset", "--yes")
    machine("up", "--safe")
    assert machine("exec", "--", "ls", "-A", "/home/rave/kept", code=2).stdout == ""
