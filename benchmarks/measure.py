"""The figures of docs/benchmarks.md: builds, boots and checks, each as a new user meets it.

Every figure is of this run on this host; the load beside it tells what it is worth. Nothing here
is a test: scripts/test never looks at a duration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ravectl import kvm
from ravectl.engines import debian

SSH_PORT_DEBVM = 22822
BOOT_LIMIT_SECONDS = 300.0
ROWS: list[tuple[str, str, str]] = []


def row(what: str, figure: str, target: str) -> None:
    ROWS.append((what, figure, target))
    print(f"{what:<52} {figure:>14}   {target}", flush=True)


class Ravectl:
    """The tool under measurement, in a workspace and cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.workspace.mkdir()
        self.environment = {
            **os.environ,
            "RAVECTL_CACHE_DIR": str(folder / "cache"),
            "RAVECTL_WORKSPACE": str(self.workspace),
        }

    def __call__(self, *words: str, check: bool = True) -> tuple[float, str, str]:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ravectl", *words],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            sys.exit(f"ravectl {' '.join(words)} failed:\n{done.stderr}")
        return time.monotonic() - began, done.stdout, done.stderr


def measure_builds(ravectl: Ravectl) -> None:
    took, _, _ = ravectl("build")
    row("build, cold (nothing cached)", f"{took:.1f} s", "<= 90 s")
    # one line of the profile, so that the configuration layer and the disk are made anew
    profile = ravectl.workspace / "rave.yaml"
    profile.write_text("extends: safe\nretention:\n  metrics: 4 days\n")
    took, _, _ = ravectl("build")
    row("build, configuration changed", f"{took:.1f} s", "<= 10 s")
    profile.unlink()
    took = min(ravectl("build")[0] for _ in range(3))
    row("build, nothing changed", f"{took:.2f} s", "<= 0.5 s")
    took, out, _ = ravectl("build", "--compress")
    size = Path(out.strip()).stat().st_size / 2**20
    row("image as compressed qcow2", f"{size:.0f} MB", "<= 450 MB")


def measure_machine(ravectl: Ravectl) -> float:
    _, _, err = ravectl("up")
    found = re.search(r"first SSH command after (\d+) s, every service up after (\d+) s", err)
    assert found, err
    row("up, to the first SSH command", f"{found[1]} s", "<= 20 s")
    row("up, to every service healthy", f"{found[2]} s", "<= 45 s")
    try:
        _, out, _ = ravectl("status", "--json")
        row("accelerator", json.loads(out)[0]["accelerator"], "")
        time.sleep(20)  # let the start-up work end: what is wanted is the idle machine
        took, out, _ = ravectl("verify", "--json", check=False)
        report = json.loads(out)
        held = sum(r["outcome"] == "passed" for r in report["results"])
        row(f"verify ({held} of {len(report['results'])} checks hold)", f"{took:.1f} s", "<= 15 s")
        _, out, _ = ravectl("exec", "--", "free", "-m")
        row("memory used in the machine, idle", f"{out.split()[8]} MB", "<= 600 MB")
    finally:
        took, _, _ = ravectl("down")
    row("down", f"{took:.1f} s", "")
    return float(found[1])


def measure_help(ravectl: Ravectl) -> None:
    program = Path(sys.executable).with_name("ravectl")
    times = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run(
            [program, "--help"], env=ravectl.environment, capture_output=True, check=True
        )
        times.append(time.monotonic() - began)
    row("ravectl --help (best of 5)", f"{min(times):.2f} s", "<= 0.2 s")


# --- beside it: debvm ----------------------------------------------------------------------------


def measure_debvm(folder: Path, our_ssh: float, our_accelerator: str) -> None:
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    image = folder / "debvm.ext4"
    packages = [p for p in debian.PACKAGES if p != "linux-image-cloud-amd64"]
    began = time.monotonic()
    subprocess.run(
        ["debvm-create", "-k", f"{key}.pub", "-o", image, "-r", debian.SUITE, "-z", "4GB", "--",
         debian.host_mirror(), f"--include={','.join(packages)}"],
        check=True, capture_output=True,
    )  # fmt: skip
    row("debvm-create, same packages", f"{time.monotonic() - began:.1f} s", "")
    accelerator = ["-machine", "accel=tcg", "-cpu", "max"] if our_accelerator == "tcg" else []
    with debvm(image, accelerator) as began:
        took = first_command(key, began)
    row("debvm-run, to the first SSH command", f"{took:.0f} s", "")
    row("ravectl / debvm, to the first SSH command", f"{our_ssh / took:.2f}", "<= 0.6")


@contextlib.contextmanager
def debvm(image: Path, accelerator: list[str]) -> Iterator[float]:
    began = time.monotonic()
    process = subprocess.Popen(
        ["debvm-run", "-i", image, "-s", str(SSH_PORT_DEBVM), "--", "-m", "2048", *accelerator],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield began
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def first_command(key: Path, began: float) -> float:
    """Seconds until a command runs, asked as debvm-waitssh does: again and again."""
    while time.monotonic() - began < BOOT_LIMIT_SECONDS:
        done = subprocess.run(
            ["ssh", "-F", "none", "-i", key, "-p", str(SSH_PORT_DEBVM),
             "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
             "-o", "ConnectTimeout=10", "-o", "LogLevel=ERROR", "root@127.0.0.1", "true"],
            capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return time.monotonic() - began
        time.sleep(0.5)
    sys.exit("debvm's machine did not come up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-debvm", action="store_true", help="leave the comparison out")
    options = parser.parse_args()
    accelerator = "kvm" if kvm.probe().works else "tcg"
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} CPUs, load {load:.2f} at the start, accelerator {accelerator}\n")
    with tempfile.TemporaryDirectory(prefix="ravectl-bench.", dir="/var/tmp") as name:
        folder = Path(name)
        ravectl = Ravectl(folder)
        measure_help(ravectl)
        measure_builds(ravectl)
        our_ssh = measure_machine(ravectl)
        if not options.no_debvm and shutil.which("debvm-create"):
            measure_debvm(folder, our_ssh, accelerator)
    print(f"\nload {os.getloadavg()[0]:.2f} at the end")


if __name__ == "__main__":
    main()
