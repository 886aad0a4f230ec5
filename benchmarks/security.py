"""What others' tools say of the machine: the figures of docs/security.md.

A machine of its own is made and started. It sits on a second wire, too, which ends in a network
namespace: from there the ports are scanned, with a real address, past QEMU's port forwarding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ravectl import workspace
from ravectl.instance import Instance
from ravectl.qemu import NETDEV

ROOT = Path(__file__).parent.parent
TAP, OUTSIDE, MACHINE = "rave-outside", "10.0.2.77", "10.0.2.15"
NAMESPACE = f"rave-security-{os.getpid()}"
HARMLESS = {"OK", "INFO", "LOW"}
OWN = {"engine_problem"}  # what testssl.sh says of this host's OpenSSL
# what comes of the CA being the workspace's own
PRIVATE_CA = {
    "cert_trust",
    "cert_chain_of_trust",
    "cert_caIssuers",
    "cert_revocation",
    "overall_grade",
}
ROWS: list[tuple[str, str, str]] = []

# QEMU with the machine's card on a hub: its usual uplink and the wire are both there
WRAPPER = """\
#!{python}
import os, sys
words = sys.argv[1:]
card = next(i for i, w in enumerate(words) if w.endswith(",netdev={netdev}"))
words[card] = words[card].replace("netdev={netdev}", "netdev=port0")
words += [
    "-netdev", "hubport,id=port0,hubid=0", "-netdev", "hubport,id=port1,hubid=0,netdev={netdev}",
    "-netdev", "tap,id=wire0,ifname={tap},script=no,downscript=no",
    "-netdev", "hubport,id=port2,hubid=0,netdev=wire0",
]
os.execv({qemu!r}, [{qemu!r}, *words])
"""


def row(what: str, figure: object, target: str = "") -> None:
    """Print a line of the table as it is known."""
    ROWS.append((what, str(figure), target))
    print(f"{what:<52} {figure!s:>14}   {target}", flush=True)


def run(*argv: str, check: bool = True, **more: Any) -> str:
    """What a program prints."""
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False, **more)
    if check and done.returncode != 0:
        sys.exit(f"{argv[0]} failed ({done.returncode})")
    return done.stdout


class Machine:
    """The tool, in a workspace of its own, with QEMU on the wire."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        qemu = shutil.which("qemu-system-x86_64")
        if qemu is None:
            sys.exit("qemu-system-x86_64 is not installed")
        bin_ = folder / "bin"
        bin_.mkdir()
        wrapper = bin_ / "qemu-system-x86_64"
        wrapper.write_text(WRAPPER.format(python=sys.executable, qemu=qemu, tap=TAP, netdev=NETDEV))
        wrapper.chmod(0o755)
        (folder / "rave.yaml").write_text("extends: safe\nname: security\n")
        os.environ["RAVECTL_WORKSPACE"] = str(folder)
        os.environ["PATH"] = f"{bin_}:{os.environ['PATH']}"

    def __call__(self, *words: str, check: bool = True, **more: Any) -> str:
        return run(sys.executable, "-m", "ravectl", *words, check=check, **more)

    def root(self, script: str, check: bool = True, **more: Any) -> str:
        """What a script prints that root runs in the machine."""
        return self("exec", "--", "sudo", "bash", "-c", script, check=check, **more)

    @property
    def instance(self) -> Instance:
        """The machine that runs."""
        return Instance(workspace.find(override=self.folder).instance_dir("default"), "default")


@contextlib.contextmanager
def wire() -> Iterator[None]:
    """A tap whose other end is in a network namespace, once QEMU has it."""
    run("ip", "tuntap", "add", TAP, "mode", "tap")
    run("ip", "netns", "add", NAMESPACE)
    try:
        yield
    finally:
        run("ip", "netns", "delete", NAMESPACE)  # and the tap in it
        run("ip", "link", "delete", TAP, check=False, stderr=subprocess.DEVNULL)


def plug() -> None:
    """Put the wire's end into the namespace."""
    run("ip", "link", "set", TAP, "netns", NAMESPACE)
    inside = ("ip", "-netns", NAMESPACE)
    run(*inside, "addr", "add", f"{OUTSIDE}/24", "dev", TAP)
    run(*inside, "link", "set", TAP, "up")


# --- the tools ---------------------------------------------------------------------------------


@contextlib.contextmanager
def only_the_wire(machine: Machine) -> Iterator[None]:
    """Take the usual uplink off: its end hears all and answers for the machine, by resets."""

    def link(up: bool) -> None:
        with machine.instance.ask() as monitor:
            monitor.ask("set_link", name=NETDEV, up=up)

    link(up=False)
    try:
        yield
    finally:
        link(up=True)


def ports(machine: Machine) -> None:
    """Every TCP port and the usual UDP ports, from outside."""
    with only_the_wire(machine):
        _scan()


def _scan() -> None:
    xml = run(
        "ip", "netns", "exec", NAMESPACE, "nmap", "-oX", "-", "-Pn", "-n", "-sS", "-p-",
        "--min-rate", "1500", "--max-retries", "3", MACHINE,
    )  # fmt: skip
    row("open TCP ports, from outside (nmap)", ", ".join(open_ports(xml)) or "none", "22, 3002")
    xml = run(
        "ip", "netns", "exec", NAMESPACE, "nmap", "-oX", "-", "-Pn", "-n", "-sU",
        "--top-ports", "100", "--max-retries", "1", "--min-rate", "200", MACHINE,
    )  # fmt: skip
    row("open UDP ports, from outside (nmap)", ", ".join(open_ports(xml)) or "none", "none")


def open_ports(xml: str) -> list[str]:
    """The ports that answered as open."""
    found = ET.fromstring(xml).iter("port")
    return [
        str(p.get("portid")) for p in found
        if (state := p.find("state")) is not None and state.get("state") == "open"
    ]  # fmt: skip


def ssh(machine: Machine) -> None:
    """ssh-audit's policy-free rating of the server."""
    port = machine.instance.endpoint().ssh_port
    said = run("ssh-audit", "--json", "--skip-rate-test", "-p", str(port), "127.0.0.1", check=False)
    notes = [
        (level, f"{kind} {entry['algorithm']}: {text}")
        for kind in ("kex", "key", "enc", "mac")
        for entry in json.loads(said)[kind]
        for level in ("fail", "warn")
        for text in entry.get("notes", {}).get(level, [])
    ]
    for level, what in (("fail", "failures"), ("warn", "warnings")):
        row(f"ssh-audit: {what}", sum(found == level for found, _ in notes), "0")
    for level, text in notes:
        print(f"    {level}: {text}")


def tls(machine: Machine) -> None:
    """testssl.sh, with the workspace's CA added."""
    found = machine.instance
    out = machine.folder / "testssl.json"
    port = found.endpoint().https_port
    run(
        "testssl", "--quiet", "--color", "0", "--warnings", "off", "--ip", "127.0.0.1",
        "--add-ca", str(found.places.ca_cert), "--jsonfile", str(out), f"localhost:{port}",
        check=False, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    findings = json.loads(out.read_text())
    # releases before 3.1 give none
    grade = next((f["finding"] for f in findings if f["id"] == "overall_grade"), "not given")
    known = PRIVATE_CA | OWN
    bad = [f for f in findings if f["severity"] not in HARMLESS and f["id"] not in known]
    if not any(f["id"] == "TLS1_3" for f in findings):
        sys.exit("testssl.sh did not end")
    row("testssl.sh: findings above LOW, but the private CA", len(bad), "0")
    row("testssl.sh: grade", grade, "A+, or T for the private CA")
    for f in bad:
        print(f"    {f['severity']}: {f['id']}: {f['finding']}")


def units(machine: Machine) -> None:
    """systemd-analyze security of every service, and how many are over the Plan's limit."""
    said = machine.root("systemd-analyze security --no-pager --json=short")
    exposure = {u["unit"]: float(u["exposure"]) for u in json.loads(said)}
    plan = machine.instance.require_record().plan
    engine = machine.instance.require_record().engine
    over = 0
    for service in plan.services:
        unit = service.unit[engine]
        limit = getattr(service, "exposure", None)
        over += limit is not None and exposure.get(unit, 10.0) > limit
        print(f"    {unit:<40} {exposure.get(unit, float('nan')):.1f}   {limit or ''}")
    row("units over their exposure limit", over, "0")


# it takes longer under emulation than one command may
LYNIS = """\
mkdir -p /run/lynis && tar -C /run/lynis -xf - && cd /run/lynis/lynis && chown -R root:root . &&
systemd-run -q --unit=lynis --working-directory="$PWD" \
  ./lynis audit system --quick --no-colors --no-log --report-file /run/lynis/report
"""
LYNIS_SECONDS = 3600.0


def lynis(machine: Machine) -> None:
    """Lynis, carried into the machine and out again."""
    packed = machine.folder / "lynis.tar"
    with tarfile.open(packed, "w") as tar:
        tar.add("/usr/sbin/lynis", "lynis/lynis")
        for part in ("include", "db"):
            tar.add(f"/usr/share/lynis/{part}", f"lynis/{part}")
        tar.add("/etc/lynis/plugins", "lynis/plugins")
        tar.add("/etc/lynis/default.prf", "lynis/default.prf")
    with packed.open("rb") as stdin:
        machine.root(LYNIS, stdin=stdin)
    end = time.monotonic() + LYNIS_SECONDS
    while machine.root("systemctl is-active lynis", check=False).strip() == "active":
        if time.monotonic() > end:
            sys.exit("lynis did not end")
        time.sleep(10)
    report = machine.root("cat /run/lynis/report")
    index = re.search(r"^hardening_index=(\d+)", report, re.M)
    row("lynis: hardening index", index[1] if index else "none", ">= 85")
    for kind in ("warning", "suggestion"):
        notes = re.findall(rf"^{kind}\[\]=(.*)$", report, re.M)
        row(f"lynis: {kind}s", len(notes))
        for note in notes:
            print(f"    {note}")


def repository(_: Machine | None) -> None:
    """Secrets in the repository: gitleaks where it is installed, detect-secrets else."""
    if shutil.which("gitleaks"):
        said = run("gitleaks", "detect", "--no-banner", "--report-format", "json",
                   "--report-path", "/dev/stdout", "--exit-code", "0", cwd=ROOT)  # fmt: skip
        row("gitleaks: findings in the history", len(json.loads(said or "[]")), "0")
        return
    said = run("detect-secrets", "scan",
               "--disable-plugin", "KeywordDetector", "--disable-plugin", "HexHighEntropyString",
               "--disable-plugin", "Base64HighEntropyString", cwd=ROOT)  # fmt: skip
    found = [(name, n) for name, ns in json.loads(said)["results"].items() for n in ns]
    row("detect-secrets: findings in the tree", len(found), "0, or known")
    for name, note in found:
        print(f"    {note['type']}: {name}:{note['line_number']}")


TOOLS: dict[str, Callable[[Machine], None]] = {
    "ports": ports, "ssh": ssh, "tls": tls, "units": units, "lynis": lynis,
    "repository": repository,
}  # fmt: skip


def main() -> None:
    """Start a machine, ask each tool, print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("tools", nargs="*", choices=[*TOOLS, []], help="default: all")
    wanted = options.parse_args().tools or list(TOOLS)
    if wanted == ["repository"]:
        repository(None)
        return
    with tempfile.TemporaryDirectory() as folder, wire():
        machine = Machine(Path(folder))
        try:
            machine("up")
            plug()
            for name in wanted:
                TOOLS[name](machine)
        finally:
            machine("down", check=False)
    print(f"load of this host: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
