"""An instance's truth: its record, its process, how it ended."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ravectl import building, images, instance, lifecycle, profile
from ravectl.errors import RavectlError
from ravectl.instance import Instance
from ravectl.model import EngineName, InstanceState
from ravectl.plan import make_plan


@pytest.fixture
def found(tmp_path: Path) -> Instance:
    folder = tmp_path / "default"
    folder.mkdir()
    made = Instance(folder, "default")
    plan = make_plan(**profile.select("safe", {}, None).plan_arguments())
    made.save(instance.new_record(plan, EngineName.DEBIAN))
    return made


def test_the_record_is_read_back(found: Instance) -> None:
    changed = found.update(ports={"22": 2222}, up=True)
    assert found.record == changed
    assert (found.folder / "instance.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "cannot be read"), ('{"form": "99"}', "another version"), ("[]", "another version"),
     (f'{{"form": "{instance.FORM}", "uuid": 5}}', "is damaged")],
)  # fmt: skip
def test_a_damaged_record_is_named(found: Instance, text: str, said: str) -> None:
    (found.folder / "instance.json").write_text(text)
    with pytest.raises(RavectlError, match=said) as e:
        _ = found.record
    kept = f"qemu-img convert -O qcow2 {found.overlay} ELSEWHERE.qcow2"
    assert f"{kept}; then throw the instance away: rm -r {found.folder}" in e.value.hint


@pytest.mark.parametrize("how", ["gone", "a link to nothing"])
def test_a_disk_without_a_record_is_not_made_anew(
    found: Instance, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is its image taken for one that nobody uses."""
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tmp_path / "cache"))
    plan = found.require_record().plan
    found.overlay.write_text("the work of a person")
    record = found.folder / "instance.json"
    record.unlink()
    if how != "gone":
        record.symlink_to("gone")
    with pytest.raises(RavectlError) as e:
        lifecycle._prepare(found, plan, lambda: pytest.fail("an image is made"))
    assert f"qemu-img convert -O qcow2 {found.overlay} " in e.value.hint
    images.add_root("a-uuid", found.folder, "a" * 16)
    with pytest.raises(RavectlError):
        building.collect(dry_run=False)
    assert found.overlay.read_text() == "the work of a person"


def test_a_qemu_that_runs_on_a_disk_is_found_without_its_uuid(
    found: Instance, tmp_path: Path
) -> None:
    (found.folder / "instance.json").write_text("{")
    program = tmp_path / "qemu-system-x86_64"
    program.symlink_to(sys.executable)
    script = "import time; print(flush=True); time.sleep(60)"
    link = tmp_path / "by, another name"
    link.symlink_to(found.folder)
    named = str(link / found.overlay.name).replace(",", ",,")
    option = f"driver=file,node-name=file0,filename={named},discard=unmap"
    with subprocess.Popen([program, "-c", script, option], stdout=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        ours.stdout.readline()
        try:
            with pytest.raises(RavectlError) as e:
                _ = found.record
        finally:
            ours.kill()
    assert f"kill {ours.pid}" in e.value.hint


def test_how_it_ended_tells_stopped_from_crashed(found: Instance) -> None:
    assert found.state() is InstanceState.STOPPED
    found.update(up=True)
    found.console_log.write_text("login:\n")
    assert found.state() is InstanceState.CRASHED
    found.console_log.write_text(f"[  99.0] {instance.POWERED_OFF}\n")
    assert found.state() is InstanceState.STOPPED, "the guest shut itself down"
    found.update(up=False)
    found.console_log.write_text("login:\n")
    assert found.state() is InstanceState.STOPPED


def test_a_remedy_names_the_instance(tmp_path: Path) -> None:
    assert Instance(tmp_path, "default").verb("up") == "ravectl up"
    with pytest.raises(RavectlError) as e:
        Instance(tmp_path, "other").require_record()
    assert e.value.hint == "make it: ravectl up --name other"


def test_no_record_no_instance(tmp_path: Path) -> None:
    assert Instance(tmp_path, "none").state() is InstanceState.ABSENT
    with pytest.raises(RavectlError, match="there is no instance"):
        Instance(tmp_path, "none").require_record()


def test_a_process_that_only_names_our_uuid_is_not_ours(found: Instance) -> None:
    uuid = found.require_record().uuid
    script = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", script, "-uuid", uuid], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        try:
            assert instance.find_process(uuid) is None
            assert instance.wait_gone(uuid, 0)
        finally:
            other.kill()


def test_ours_is_found_with_its_start_and_ended(found: Instance, tmp_path: Path) -> None:
    # what counts is the program's name, our uid and the UUID
    uuid = found.require_record().uuid
    program = tmp_path / "qemu-system-x86_64"
    program.symlink_to(sys.executable)
    script = "import time; print(time.time(), flush=True); time.sleep(60)"
    with subprocess.Popen(
        [program, "-c", script, "-uuid", uuid], stdout=subprocess.PIPE, text=True
    ) as ours:
        assert ours.stdout is not None
        began = float(ours.stdout.readline())
        seen = instance.find_process(uuid)
        assert seen is not None
        assert seen.pid == ours.pid
        assert abs(seen.started - began) < 60
        assert found.state() is InstanceState.RUNNING
        assert not instance.wait_gone(uuid, 0.1)
        instance.send_signal(uuid, instance.signal.SIGTERM)
        ours.wait(timeout=20)
    assert instance.find_process(uuid) is None


def test_in_a_copy_of_a_workspace_the_machine_of_the_other_is_left_alone(
    found: Instance, tmp_path: Path
) -> None:
    found.overlay.touch()
    uuid = found.require_record().uuid
    image = tmp_path / "images" / "disk.qcow2"  # as the store calls it
    image.parent.mkdir()
    image.touch()
    program = tmp_path / "qemu-system-x86_64"
    program.symlink_to(sys.executable)
    script = (
        "import sys, time; held = [open(f) for f in sys.argv[3:]]; print(flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [program, "-c", script, "-uuid", uuid, image, found.overlay], stdout=subprocess.PIPE
    ) as ours:
        assert ours.stdout is not None
        ours.stdout.readline()
        try:
            copy = Instance(tmp_path / "copy", "copy")
            shutil.copytree(found.folder, copy.folder)
            assert found.state() is InstanceState.RUNNING
            for use in (copy.state, copy.process, lambda: lifecycle.reset(copy)):
                with pytest.raises(RavectlError, match=f"runs in {found.folder}"):
                    use()
            assert copy.overlay.exists()
            moved = Instance(found.folder.rename(tmp_path / "moved"), "default")
            assert moved.state() is InstanceState.RUNNING
            moved.overlay.unlink()
            assert moved.state() is InstanceState.RUNNING, "only its own disk is gone"
            assert ours.poll() is None
        finally:
            ours.kill()


def test_the_console_is_shown_without_control_characters(found: Instance) -> None:
    found.console_log.write_bytes(b"one\r\n\x1b[0;32mOK\x1b[0m\x07\x1b]104\x07 two\n\n\xff\n")
    assert found.console_tail(9) == "one\nOK two\n\N{REPLACEMENT CHARACTER}"
    assert found.console_tail(1) == "\N{REPLACEMENT CHARACTER}"


def test_panics_are_counted_and_shown(found: Instance) -> None:
    found.console_log.write_text("")
    assert (found.panics(), found.panic_text()) == (0, "")
    lines = [f"line {n}" for n in range(30)]
    lines[20] = f"{instance.PANIC}: no init"
    found.console_log.write_text("\n".join(lines))
    assert found.panics() == 1
    assert lines[20] in found.panic_text()
    assert "line 29" not in found.panic_text()


def test_two_commands_cannot_hold_it(found: Instance) -> None:
    again = Instance(found.folder, found.name)
    with (
        found.lock(),
        pytest.raises(RavectlError, match="in use by another ravectl"),
        again.lock(),
    ):
        pass


def test_records_differ_by_uuid(found: Instance) -> None:
    record = found.require_record()
    other = instance.new_record(record.plan, EngineName.DEBIAN)
    assert other.uuid != record.uuid
    assert dataclasses.replace(other, uuid=record.uuid) == record
