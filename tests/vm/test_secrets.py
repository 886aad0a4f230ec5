"""Secrets on a real machine: delivered, rotated, interrupted at every step, and never seen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks import rotation

from ravectl import credentials, delivery, journal, lifecycle, rotate, sops, vault
from ravectl.model import SecretKind
from tests.conftest import Tool

pytestmark = pytest.mark.vm

ROTATED = (
    "ccr/api-key", "ingress/password", "postgres/exporter-password", "ingress/tls-key",
)  # fmt: skip
# each as `rotate.reached` names it, in the order in which they come
STEPS = (
    "connected", "prepared", "staged", "activated", "applied", "proven", "verified", "committed",
    "replaced", "kept", "looked for the former", "closed",
)  # fmt: skip


def kept(step: str, what: str) -> bool:
    """Whether a change that was cut short there is finished, or taken back."""
    # the machine is not asked any more between "verified" and the commit: its loss is seen later
    decided = "committed" if what == "ravectl" else "verified"
    return STEPS.index(step) >= STEPS.index(decided)


# ravectl in which something is lost the moment that a step was reached
LOSING = """
import os, signal, sys
from ravectl import delivery, rotate
step, what, qemu = sys.argv[1:4]
guests = []
class Guest(delivery.Guest):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        guests.append(self)
rotate.Guest = Guest
def reached(name):
    if name == step and what == "ravectl":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == step and what == "qemu":
        os.kill(int(qemu), signal.SIGKILL)
    if name == step and what == "connection":
        for guest in guests:
            guest.connection.close()
rotate.reached = reached
sys.argv = ["ravectl", *sys.argv[4:]]
from ravectl.cli import main
main()
"""


@pytest.fixture
def running(machine: Tool) -> Iterator[Tool]:
    machine("up")
    yield machine
    # a test that failed must not decide those after it
    if journal.read(machine.workspace / ".rave"):
        machine("secrets", "deliver", code=None)


def losing(tool: Tool, step: str, what: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", LOSING, step, what, str(tool.pid() or 0), *words]
    return subprocess.run(
        argv, env=tool.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def values(tool: Tool) -> dict[str, str]:
    """Every value that the files hold."""
    found, identity = tool.instance(), sops.find_identity()
    paths = (found.places.shared, found.places.machine(found.folder))
    return {n: v for p in paths for n, v in vault.read(p, identity).values.items()}


def assert_all_authenticate(tool: Tool) -> None:
    """The same in a third of the time, for the walks: by one connection, without `verify`."""
    assert journal.read(tool.workspace / ".rave") is None
    found = tool.instance()
    change = rotate.Change(found.workspace, sops.find_identity(), "test")
    with lifecycle.connection_to(found) as connection:
        guest = delivery.Guest(found, connection)
        good = change.values(change.load(), found.name, found.places.operator_key)
        assert len(good.files) > 10
        guest.prove(good, None, good.files)
        state = guest.state()
        assert state.staged == 0, "nothing is left staged"
        generations = connection.run(["sudo", "ls", "/run/secrets.d"]).stdout.split()
    assert generations == [str(state.active)], "no other generation is left"


STATE = """\
set -e
umask 077
trap 'rm -f /run/secrets.d/.test' EXIT
pass=/run/secrets.d/.test
password=$(cat /run/secrets/postgres/exporter-password)
printf '127.0.0.1:5432:*:exporter:%s\\n' "$password" >$pass
PGPASSFILE=$pass psql -X -w -h 127.0.0.1 -U exporter -d postgres -Atc 'select 42'
rm -f $pass
/usr/lib/rave/secrets state
echo $(ls /run/secrets.d)
"""


def assert_agreement(tool: Tool) -> None:
    """Host and guest hold the same, nothing is under way, and every service authenticates."""
    assert journal.read(tool.workspace / ".rave") is None
    assert not journal.folder(tool.workspace / ".rave").exists()
    checks = ("S2", "H1", "H2", "X4", "D6")
    report = json.loads(
        tool("verify", "--json", *(w for c in checks for w in ("--check", c))).stdout
    )
    assert all(r["outcome"] == "passed" for r in report["results"]), report
    done = tool("exec", "--", "sudo", "bash", "-s", stdin=STATE)
    database, state, generations = done.stdout.splitlines()
    assert database == "42"
    active, _, staged = state.split()
    assert staged == "0", "nothing is left staged"
    assert generations.split() == [active], "no other generation is left"


# --- delivery ------------------------------------------------------------------------------------


def test_secrets_are_there_again_after_a_reboot_of_the_guest(running: Tool) -> None:
    """QEMU hands over what it was started with; what was rotated since must win over that."""
    running("rotate-secrets", "ccr/api-key", "postgres/exporter-password")
    boot = running("exec", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout
    running("exec", "--", "sudo", "systemctl", "reboot", code=None)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        done = running("exec", "--", "cat", "/proc/sys/kernel/random/boot_id", code=None)
        if done.returncode == 0 and done.stdout != boot:
            break
        time.sleep(2)
    while running("verify", "--check", "S2", "--check", "H1", code=None).returncode != 0:
        assert time.monotonic() < deadline, "the machine did not come back"
        time.sleep(2)
    assert_agreement(running)


def test_nothing_private_is_left_of_what_was_handed_over(running: Tool) -> None:
    folder = running.instance().folder
    names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert not names & {"age-identity", "bundle"}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "disk.qcow2":
            text = path.read_text(errors="replace")
            assert "AGE-SECRET-KEY" not in text, path
            assert "PRIVATE KEY" not in text, path


def test_a_missing_secret_stops_its_reader_alone_and_is_named(running: Tool) -> None:
    """The machine starts without one file: who reads it does not, and the journal says why."""
    script = """
set -e
target=$(readlink -f /run/secrets)
mv "$target/ccr/api-key" /run/secrets.d/.aside
systemctl stop nginx
systemctl start nginx || true
systemctl is-active nginx ssh postgresql@17-main || true
journalctl -q -b -u nginx -o cat --no-pager | tail -5
mv /run/secrets.d/.aside "$target/ccr/api-key"
systemctl reset-failed nginx || true
systemctl start nginx
"""
    said = running("exec", "--", "sudo", "bash", "-s", stdin=script).stdout
    assert said.startswith("inactive\nactive\nactive\n")
    assert "secret ccr/api-key is missing" in said
    assert_agreement(running)


def test_a_full_tmpfs_changes_nothing(running: Tool) -> None:
    before = values(running)
    fill = "head -c 8M /dev/zero >/run/secrets.d/.full; true"
    running("exec", "--", "sudo", "sh", "-c", fill)
    try:
        done = running("rotate-secrets", "ccr/api-key", code=1)
    finally:
        running("exec", "--", "sudo", "rm", "/run/secrets.d/.full")
    assert "No space left" in done.stderr or "is full" in done.stderr
    assert "fix:" in done.stderr
    assert values(running) == before
    assert_agreement(running)


# --- rotation ------------------------------------------------------------------------------------


def test_everything_is_rotated_and_the_old_is_refused(running: Tool) -> None:
    before = values(running)
    done = json.loads(running("rotate-secrets", "--all", "--ssh", "--no-grace", "--json").stdout)
    after = values(running)
    changed = {n for n in after if after[n] != before[n]}
    assert set(done["names"]) == changed | {"ssh/operator-key"}
    # a new key would make unreadable what a person entered into Grafana
    kept = {"ca/key", "ca/cert", "grafana/secret-key"}
    assert {n for n in after if n not in changed} == kept
    assert_agreement(running)
    rows = json.loads(running("rotate-secrets", "--history", "--json").stdout)
    assert rows[-1]["outcome"] == "committed"
    assert set(rows[-1]["names"]) == set(done["names"])
    text = (running.workspace / ".rave" / "audit.jsonl").read_text()
    assert not [n for n, v in {**before, **after}.items() if v in text]
    assert running("ssh", "--", "true").returncode == 0


ROUTER_CONFIG = "/run/claude-code-router/.claude-code-router/config.json"


def test_what_brings_no_new_value_is_brought_too(running: Tool) -> None:
    """A pulled file, a key, a certificate, a value taken away: nothing to look for afterwards."""
    found, identity = running.instance(), sops.find_identity()
    shared = vault.read(found.places.shared, identity)
    pulled = shared.with_value(
        "ccr/api-key", credentials.new_value(SecretKind.PASSWORD), vault.now()
    )
    vault.write(found.places.shared, pulled, found.places.recipients())
    rows = json.loads(running("secrets", "diff", "--json").stdout)
    # and the file that tells Prometheus how old each is
    assert {r["path"] for r in rows if r["change"] != "same"} == {
        "/run/secrets/ccr/api-key", "/run/secrets/monitoring/secrets.prom",
    }  # fmt: skip
    assert "brought to: default" in running("secrets", "deliver").stderr
    running("rotate-secrets", "ssh/operator-key")
    running("rotate-secrets", "ingress/tls-cert")
    given = 'sk-ant-"quoted"\\given'
    running("secrets", "set", "agents/anthropic-api-key", stdin=given)
    config = json.loads(running("exec", "--", "sudo", "cat", ROUTER_CONFIG).stdout)
    assert {p["api_key"] for p in config["Providers"]} == {given}
    running("secrets", "set", "agents/anthropic-api-key", "--unset")
    assert given not in running("exec", "--", "sudo", "cat", ROUTER_CONFIG).stdout
    assert_agreement(running)


@pytest.mark.parametrize("text", [b"", b"garbage\n", b"\xff\xfe"])
def test_pins_that_are_damaged_are_learnt_again(running: Tool, text: bytes) -> None:
    (running.instance().folder / "ssh_host_keys.pub").write_bytes(text)
    done = running("exec", "--", "true", code=1)
    assert "is not known" in done.stderr
    assert "fix: ravectl up learns it" in done.stderr
    running("up")
    running("exec", "--", "true")


def test_a_stopped_machine_gets_it_at_its_next_start(running: Tool) -> None:
    running("down")
    before = values(running)
    done = running("rotate-secrets", "--all", "--ssh")
    assert "no running machine" in done.stderr
    assert values(running)["ssh/host-key"] != before["ssh/host-key"]
    running("up")
    assert_agreement(running)


def test_a_reader_that_fails_takes_it_back(running: Tool) -> None:
    """nginx cannot reload: the rotation says so, and the old values go on working."""
    before = values(running)
    running("exec", "--", "sudo", "sh", "-c", "echo broken >>/etc/nginx/nginx.conf")
    try:
        done = running("rotate-secrets", "ingress/tls-key", "ccr/api-key", code=1)
    finally:
        mend = "sed -i '$d' /etc/nginx/nginx.conf && systemctl restart nginx"
        running("exec", "--", "sudo", "sh", "-c", mend)
    assert "taking the change back" in done.stderr
    assert values(running) == before
    running("secrets", "deliver")
    assert_agreement(running)


# Between the others nothing changes hands. test_rotation_states.py walks all of them with the real
# helper, sops and age; RAVE_EVERY_STEP=1 has this machine walk them, too (15 minutes more).
HANDS = ("staged", "activated", "verified", "committed", "closed")
EVERY_STEP = bool(os.environ.get("RAVE_EVERY_STEP"))


@pytest.mark.parametrize(
    ("what", "step"),
    [(w, s) for w in ("ravectl", "connection") for s in STEPS]
    if EVERY_STEP
    else [
        *(("ravectl", s) for s in HANDS),
        ("connection", "activated"),
        ("connection", "verified"),
    ],
)
def test_cut_short_at_every_step(running: Tool, what: str, step: str) -> None:
    before = values(running)
    done = losing(running, step, what, "rotate-secrets", *ROTATED)
    if what == "ravectl":
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert "Traceback" not in done.stderr
    running("secrets", "deliver")
    after = values(running)
    for name in ROTATED:
        assert (after[name] != before[name]) is kept(step, what), name
    assert_all_authenticate(running)


@pytest.mark.parametrize("step", HANDS if EVERY_STEP else ("activated",))
def test_the_machine_dies_on_the_way(running: Tool, step: str) -> None:
    before = values(running)
    done = losing(running, step, "qemu", "rotate-secrets", *ROTATED)
    assert "Traceback" not in done.stderr
    running.wait_for_no_qemu()
    running("up")
    after = values(running)
    for name in ROTATED:
        assert (after[name] != before[name]) is kept(step, "qemu"), name
    assert_all_authenticate(running)


@pytest.mark.parametrize("step", ["activated", "committed"])
def test_ssh_keys_cut_short(running: Tool, step: str) -> None:
    before = values(running)["ssh/host-key"]
    losing(running, step, "ravectl", "rotate-secrets", "--ssh")
    # whatever was reached, the person is not locked out
    assert running("exec", "--", "true").returncode == 0
    running("secrets", "deliver")
    assert (values(running)["ssh/host-key"] != before) is (step == "committed")
    assert_agreement(running)


# --- never seen ----------------------------------------------------------------------------------

SAMPLER = """
import glob, sys, time
seen = set()
end = time.monotonic() + float(sys.argv[1])
while time.monotonic() < end:
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, "rb") as f:
                seen.add(f.read())
        except OSError:
            pass
    time.sleep(0.05)
sys.stdout.buffer.write(b"\\n".join(seen))
"""


def test_no_value_is_seen_while_it_is_rotated(running: Tool, tmp_path: Path) -> None:
    """Arguments and environments of every process, on the host and in the guest, at 50 ms."""
    before = values(running)
    stop, seen = threading.Event(), set()

    def sample() -> None:
        while not stop.wait(0.05):
            for path in Path("/proc").glob("[0-9]*"):
                for name in ("cmdline", "environ"):
                    try:
                        seen.add((path / name).read_bytes())
                    except OSError:
                        continue

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    inside = subprocess.Popen(
        [sys.executable, "-m", "ravectl", "exec", "--", "sudo", "python3", "-", "40"],
        env=running.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert inside.stdin is not None
    inside.stdin.write(SAMPLER.encode())
    inside.stdin.close()
    done = running("--verbose", "rotate-secrets", "--all", "--ssh")
    stop.set()
    thread.join()
    assert inside.stdout is not None
    guest = inside.stdout.read()
    assert inside.wait(timeout=120) == 0
    assert len(guest) > 1000
    after = values(running)
    lines = [
        line.encode()
        for held in (before, after)
        for name, value in held.items()
        if not name.endswith("cert")
        for line in value.splitlines()
        if "-----" not in line and len(line) > 12
    ]
    host = b"\n".join(seen)
    said = (done.stdout + done.stderr).encode()
    for place, text in {"host": host, "guest": guest, "what ravectl says": said}.items():
        assert not [x for x in lines if x in text], f"a value is seen: {place}"
    show = "journalctl --no-pager -o export | tr -cd '[:print:]\\n'"
    journal_text = running("exec", "--", "sudo", "sh", "-c", show).stdout
    assert len(journal_text) > 10_000
    state = "".join(
        p.read_text(errors="replace")
        for p in (running.workspace / ".rave").rglob("*")
        if p.is_file() and p.name not in ("disk.qcow2", "id_ed25519")
    )
    disk = running.instance().overlay.read_bytes()
    for place, text in {"journal": journal_text.encode(), "state": state.encode(),
                        "disk": disk}.items():  # fmt: skip
        assert not [x for x in lines if x in text], f"a value is seen: {place}"


def test_verify_finds_a_leaked_value(running: Tool) -> None:
    plant = (
        "cp /run/secrets/dispatcher/api-token /var/tmp/leak; sync; "
        "chmod 640 /run/secrets/ccr/api-key"
    )
    running("exec", "--", "sudo", "sh", "-c", plant)
    try:
        report = json.loads(running("verify", "--check", "X4", "--json", code=3).stdout)
        (row,) = report["results"]
        assert "dispatcher/api-token is on the machine's disk" in row["seen"]
        assert "ccr/api-key is root root 640, not root root 600" in row["seen"]
        # a leak must not keep anybody from rotating what leaked
        running("exec", "--", "sudo", "chmod", "600", "/run/secrets/ccr/api-key")
        done = running("rotate-secrets", "dispatcher/api-token")
        assert "values from before this rotation" in done.stderr
    finally:
        running("exec", "--", "sudo", "rm", "-f", "/var/tmp/leak")
    assert_agreement(running)


def test_requests_are_not_lost_while_everything_is_rotated(running: Tool) -> None:
    # so that webhooks are rotated, too, whatever was done before
    running("rotate-secrets", "dispatcher/gitlab-token", "dispatcher/github-secret", "--no-grace")
    figures: dict[str, Any] = rotation.measure(running.workspace, os.environ | running.environment)
    assert figures["sent"] > 100
    assert figures["lost"] == {}, figures
    assert figures["webhooks"] > 50
    assert_agreement(running)
