"""Bad days of `up`: each for real, each ends in a line of cause and a line of remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest

from ravectl import console, images, kvm, lifecycle, plan, profile, workspace
from ravectl.errors import RavectlError
from ravectl.model import Image
from tests.conftest import Tool

pytestmark = pytest.mark.vm


def explained(stderr: str) -> bool:
    """A line of cause and a line of remedy."""
    return "error: " in stderr and "fix: " in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ravectl_dies_during_up(tool: Tool, number: signal.Signals) -> None:
    tool("build", "--safe")  # so that `up` comes to QEMU at once
    running = tool.start("up", "--safe")
    tool.wait_for_qemu()
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == (130 if number is signal.SIGINT else -signal.SIGKILL)
    tool.wait_for_no_qemu()
    assert tool.status()["state"] in {"crashed", "stopped"}
    assert "was not running" in tool("down").stderr


def test_a_demanded_port_that_is_taken(tool: Tool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tool.workspace / "rave.yaml").write_text(f"extends: safe\nnetwork:\n  ssh_port: {port}\n")
        done = tool("up", code=4)
    assert f"port {port} of this host is taken" in done.stderr
    assert explained(done.stderr)
    tool.wait_for_no_qemu()


def test_not_enough_memory(tool: Tool) -> None:
    (tool.workspace / "rave.yaml").write_text("extends: safe\nmachine:\n  memory: 900 GB\n")
    done = tool("up", code=None)
    assert done.returncode in {2, 4}
    assert explained(done.stderr)
    assert tool.pid() is None


def test_qemu_is_missing(tool: Tool, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for folder in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for path in Path(folder).iterdir():
            link = tools / path.name
            if not path.name.startswith("qemu-system") and not link.is_symlink():
                link.symlink_to(path)
    # find_tool adds the sbin folders, where no QEMU lies
    done = tool("up", "--safe", code=4, env={"PATH": str(tools)})
    assert "qemu-system-x86_64 is not installed" in done.stderr
    assert "apt-get install qemu-system-x86" in done.stderr


def stored_copy(tool: Tool, **changes: str) -> Path:
    """The tool's image store becomes a copy with one image, whose manifest has `changes`."""
    digest = Path(tool("build", "--safe").stdout.strip()).parent.name
    original = images.store_dir() / digest
    tool.cache = tool.workspace / "cache"
    copy = tool.cache / "images" / digest
    shutil.copytree(original, copy)
    # the base is needed to know what an image is made of; it is only read
    (tool.cache / "debian").symlink_to(images.store_dir().parent / "debian")
    manifest = json.loads((copy / "image.json").read_text())
    (copy / "image.json").write_text(json.dumps({**manifest, **changes}))
    tool("image", "sign", digest)  # what was changed here is meant
    return copy


def test_a_guest_that_panics(tool: Tool) -> None:
    # a kernel without a root file system panics; panic=-1 restarts it, again and again
    stored_copy(tool, cmdline="console=ttyS0 panic=-1 rdinit=/none root=/dev/none")
    done = tool("up", "--safe", code=1)
    # it restarts in 2 s, so on a busy host more than the two that are enough may be seen
    assert re.search(r"kernel panicked [2-9] times", done.stderr), done.stderr
    assert "Kernel panic - not syncing" in done.stderr
    assert explained(done.stderr)
    tool.wait_for_no_qemu()


def test_a_truncated_image(tool: Tool) -> None:
    copy = stored_copy(tool)
    tool("up", "--safe", "--timeout", "1", code=1)  # gives the instance its overlay
    disk = copy / "disk.qcow2"
    size = disk.stat().st_size
    os.truncate(disk, size // 2)
    done = tool("up", "--safe", code=1)
    assert "disk.qcow2 is truncated" in done.stderr
    assert explained(done.stderr)
    # the remedy it names makes the same image again, bit for bit
    done = tool("build", "--safe")
    assert "making it again" in done.stderr
    assert disk.stat().st_size == size


def test_kvm_that_opens_and_cannot_run(tool: Tool) -> None:
    if kvm.probe().works:
        pytest.skip("KVM works on this host")
    done = tool("up", "--safe", "--accel", "kvm", "--timeout", "60", code=4)
    assert "KVM stopped the machine" in done.stderr
    assert "--accel tcg" in done.stderr
    tool.wait_for_no_qemu()


def test_kvm_that_fails_after_the_probe(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kvm.probe().works:
        pytest.skip("KVM works on this host")
    tool("build", "--safe")
    # the real QEMU meets the real KVM; only what the probe found is kept from `up`
    monkeypatch.setattr(kvm, "probe", lambda: kvm.Verdict(True, "it is said to work"))
    notes: list[str] = []
    monkeypatch.setattr(console, "note", notes.append)
    space = workspace.find(override=tool.workspace)
    made = plan.make_plan(**profile.select("safe", {}, None).plan_arguments())
    # whether SSH came within these seconds is the host's affair; all services never do
    with pytest.raises(RavectlError, match="did not answer in time"):
        lifecycle.up(space, "default", made, lambda: stored_image(tool), timeout=12)
    assert any("once more, emulated (TCG)" in n for n in notes), notes
    assert tool.status()["accelerator"] == "tcg"
    tool.wait_for_no_qemu()


def stored_image(tool: Tool) -> Image:
    return images.find(Path(tool("build", "--safe").stdout.strip()).parent.name)


PANICS_ONCE = """\
[Unit]
After=ssh.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'test -e /var/lib/panicked && exit; touch /var/lib/panicked; sync; \
  sleep 4; echo c >/proc/sysrq-trigger'
[Install]
WantedBy=multi-user.target
"""


def test_a_guest_that_panics_once_while_its_services_start(machine: Tool) -> None:
    machine("up", "--safe")
    unit = "/etc/systemd/system/panics-once.service"
    machine("exec", "--", "sudo", "tee", unit, stdin=PANICS_ONCE)
    machine("exec", "--", "sudo", "systemctl", "enable", "panics-once.service")
    machine("down")
    said = machine("up").stderr
    assert "the machine's kernel panicked and restarts itself" in said
    assert machine.instance().panics() == 1
    machine("exec", "--", "test", "-e", "/var/lib/panicked")
    machine(
        "exec",
        "--",
        "sudo",
        "rm",
        unit,
        "/etc/systemd/system/multi-user.target.wants/panics-once.service",
    )


def test_two_machines_and_one_that_is_silent(machine: Tool) -> None:
    # 1 s is too little to boot: the second machine is left in the middle of it
    done = machine("up", "--name", "other", "--timeout", "1", "--keep-failed", code=1)
    assert "ravectl down --name other" in done.stderr
    first, second = machine.status(), machine.status("other")
    assert (first["state"], second["state"]) == ("running", "running")
    # the usual ports were taken by the first, so the second got others
    numbers = {m[k] for m in (first, second) for k in ("ssh_port", "https_port")}
    assert len(numbers) == 4
    pid = machine.pid("other")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    assert machine.status("other")["qemu"] == "does not answer"
    assert "ended by SIGKILL" in machine("down", "--name", "other", "--timeout", "1").stderr
    assert machine.pid("other") is None
    assert machine.status()["qemu"] == "running"
