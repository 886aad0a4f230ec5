"""Up and down, as far as they go without a machine: its disk, and what QEMU says of it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ravectl import images, lifecycle, qmp, signing
from ravectl.cli import machine
from ravectl.errors import RavectlError
from ravectl.instance import Instance, new_record
from ravectl.model import EngineName, Image, ImageFormat
from ravectl.workspace import Workspace
from tests.plans import PLAN


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Instance:
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tmp_path / "cache"))
    found = Instance(Workspace(tmp_path).prepare().instance_dir("default"), "default")
    found.folder.mkdir(parents=True)
    found.save(new_record(PLAN, EngineName.DEBIAN))
    return found


def on_image(found: Instance, store: Path, digest: str) -> Path:
    """A disk on an image of a store."""
    disk = store / digest / "disk.qcow2"
    disk.parent.mkdir(parents=True)
    for argv in (
        ["create", "-q", "-f", "qcow2", disk, "1M"],
        ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk, found.overlay],
    ):
        subprocess.run(["qemu-img", *argv], check=True)
    return disk.parent


def test_an_image_in_the_cache_of_before_is_found(made: Instance, tmp_path: Path) -> None:
    """`ravectl reset` would throw the disk away for nothing."""
    digest = "a" * 16
    folder = on_image(made, tmp_path / "it's old" / "images", digest)
    with pytest.raises(RavectlError, match="is in another cache") as e:
        lifecycle._image_of(made, digest)
    assert "reset" not in e.value.hint
    subprocess.run(["sh", "-euc", e.value.hint.partition("bring it here: ")[2]], check=True)
    assert not folder.exists()
    assert (images.store_dir() / digest / "disk.qcow2").exists()
    with pytest.raises(RavectlError, match="cannot be used"):
        lifecycle._image_of(made, digest)


def test_a_disk_that_another_program_has_is_not_called_damaged(
    made: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = on_image(made, images.store_dir(), "a" * 16)
    made.update(image="a" * 16)
    (folder / "image.json").write_text("{}")
    image = Image(
        "a" * 16, EngineName.DEBIAN, ImageFormat.QCOW2, folder, folder / "disk.qcow2",
        folder / "vmlinuz", folder / "initrd", "", PLAN, {}, {}, "",
    )  # fmt: skip
    monkeypatch.setattr(images, "find", lambda digest: image)
    monkeypatch.setattr(signing, "verify", lambda workspace, image: "us")
    assert lifecycle._prepare(made, PLAN, lambda: pytest.fail("it is made anew")) == image
    with made.overlay.open("rb") as held:
        # as QEMU's block layer says of a file that it writes to
        for byte in (100, 101, 103, 200, 201, 203):
            fcntl.lockf(held, fcntl.LOCK_SH, 1, byte)
        with pytest.raises(RavectlError) as e:
            lifecycle._prepare(made, PLAN, lambda: pytest.fail("it is made anew"))
    assert f"qemu-img check {made.overlay}" in e.value.hint
    assert "reset" not in e.value.hint


@contextlib.contextmanager
def monitor(found: Instance, states: list[str]) -> Iterator[list[str]]:
    """In QEMU's place: it tells these states in turn, and what it was asked."""
    asked: list[str] = []

    def serve() -> None:
        near, _ = server.accept()
        with near, near.makefile("rw") as lines:
            print('{"QMP": {}}', file=lines, flush=True)
            for line in lines:
                asked.append(json.loads(line)["execute"])
                told = {"status": states.pop(0)} if asked[-1] == "query-status" else {}
                print(json.dumps({"return": told}), file=lines, flush=True)

    with qmp.listen(found.monitor) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join(timeout=20)


@pytest.mark.parametrize("state", ["io-error", "paused"])
def test_a_machine_that_qemu_stopped_goes_on(
    made: Instance, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(lifecycle, "GO_ON_SECONDS", 0)
    with monitor(made, [state, "running"]) as asked:
        lifecycle._go_on(made)
    assert "cont" in asked
    with monitor(made, [state, state]), pytest.raises(RavectlError, match=rf"again .*{state}") as e:
        lifecycle._go_on(made)
    assert f"df -h {made.folder}" in e.value.hint
    with monitor(made, ["running"]) as asked:
        lifecycle._go_on(made)
    assert "cont" not in asked


def test_status_tells_a_machine_that_qemu_stopped() -> None:
    row = {
        "name": "default", "state": "running", "qemu": "io-error", "profile": "safe",
        "ssh_port": 2222, "https_port": 3002, "uptime_seconds": 60, "kernel_panics": 0,
    }  # fmt: skip
    assert machine._line(row).endswith("1 min  QEMU: io-error")
    assert machine._line({**row, "qemu": "running"}).endswith("1 min")
