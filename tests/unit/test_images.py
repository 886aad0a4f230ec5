"""The store: what is damaged is named, what is used is kept, a copy is whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from ravectl import building, images, profile
from ravectl.errors import RavectlError, UsageError
from ravectl.instance import Instance, new_record
from ravectl.model import EngineName, Image, Plan, to_json
from ravectl.plan import make_plan


@pytest.fixture
def plan() -> Plan:
    return make_plan(**profile.select("safe", {}, None).plan_arguments())


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tmp_path / "cache"))
    folder = images.store_dir()
    folder.mkdir(parents=True)
    return folder


def put(store: Path, digest: str, plan: Plan, *, age_seconds: float = 3600) -> Path:
    folder = store / digest
    folder.mkdir()
    for name in ("disk.qcow2", "vmlinuz", "initrd"):
        (folder / name).write_bytes(b"x" * 1000)
    manifest = {
        "digest": digest, "engine": "debian", "format": "qcow2", "cmdline": "quiet",
        "plan": to_json(plan), "packages": [], "hashes": {},
        "sizes": {"disk.qcow2": 1000, "vmlinuz": 1000, "initrd": 1000},
    }  # fmt: skip
    (folder / "image.json").write_text(json.dumps(manifest))
    then = folder.stat().st_mtime - age_seconds
    os.utime(folder, (then, then))
    return folder


def test_an_image_is_read_back(store: Path, plan: Plan) -> None:
    put(store, "a" * 16, plan)
    found = images.find("a" * 16)
    assert found.plan == plan
    assert found.disk.stat().st_size == 1000


def test_damage_is_named(store: Path, plan: Plan) -> None:
    folder = put(store, "a" * 16, plan)
    with pytest.raises(RavectlError, match="there is no image"):
        images.find("b" * 16)
    os.truncate(folder / "disk.qcow2", 999)
    with pytest.raises(RavectlError, match=r"disk\.qcow2 is truncated"):
        images.load(folder)
    (folder / "vmlinuz").unlink()
    with pytest.raises(RavectlError, match="damaged"):
        images.load(folder)
    (folder / "image.json").write_text('{"format": "qcow2"}')
    with pytest.raises(RavectlError, match="damaged manifest"):
        images.load(folder)
    (folder / "image.json").write_text("{")
    with pytest.raises(RavectlError, match="cannot be read"):
        images.load(folder)


def use(image: str, folder: Path, plan: Plan) -> Instance:
    folder.mkdir(parents=True)
    found = Instance(folder, folder.name)
    record = found.save(replace(new_record(plan, EngineName.DEBIAN), image=image))
    images.add_root(record.uuid, folder, image)
    return found


def test_gc_keeps_what_any_workspace_uses(store: Path, plan: Plan, tmp_path: Path) -> None:
    used, unused = put(store, "a" * 16, plan), put(store, "b" * 16, plan)
    recent = put(store, "c" * 16, plan, age_seconds=0)
    found = use("a" * 16, tmp_path / "elsewhere" / "default", plan)
    would = building.collect(dry_run=True)
    assert [path for path, _ in would] == [unused]
    assert would[0][1] > 0
    assert unused.exists(), "a dry run removes nothing"
    building.collect(dry_run=False)
    assert (used.exists(), unused.exists(), recent.exists()) == (True, False, True)
    found.update(image=None)
    building.collect(dry_run=False)
    assert not used.exists()


@pytest.mark.parametrize("another", ["", "begun", "of its own"])
def test_gc_keeps_the_image_of_an_instance_that_is_not_there(
    store: Path, plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str], another: str
) -> None:
    """Its workspace may be moved, or on a disk that is not mounted."""
    used, unused = put(store, "a" * 16, plan), put(store, "b" * 16, plan)
    found = use("a" * 16, tmp_path / "elsewhere" / "default", plan)
    found.folder.rename(tmp_path / "moved")
    if another:  # that was made in the place of it
        Instance(found.folder, "default").folder.mkdir()
        if another == "of its own":
            Instance(found.folder, "default").save(new_record(plan, EngineName.DEBIAN))
    for dry_run in (True, False):
        building.collect(dry_run=dry_run)
        assert used.exists()
        said = capsys.readouterr().err
        assert f"was in {found.folder} is not there; its image {'a' * 16} is kept" in said
    assert not unused.exists()
    subprocess.run(["sh", "-euc", said.partition("gone for good: ")[2]], check=True)
    assert images.roots() == []
    building.collect(dry_run=False)
    assert not used.exists()


def test_an_instance_that_was_moved_is_one_root_and_a_copy_is_another(
    store: Path, plan: Plan, tmp_path: Path
) -> None:
    found = use("a" * 16, tmp_path / "one", plan)
    uuid = found.require_record().uuid
    found.folder.rename(tmp_path / "two")
    images.add_root(uuid, tmp_path / "two", "a" * 16)
    assert [r.folder for r in images.roots()] == [tmp_path / "two"]
    (tmp_path / "copy").mkdir()
    images.add_root(uuid, tmp_path / "copy", "b" * 16)
    kept = {(r.folder, r.image) for r in images.roots()}
    assert kept == {(tmp_path / "two", "a" * 16), (tmp_path / "copy", "b" * 16)}


def test_gc_removes_nothing_while_an_absent_instance_may_need_it(
    store: Path, plan: Plan, tmp_path: Path
) -> None:
    """A link that an earlier ravectl made names no image."""
    unused = put(store, "b" * 16, plan)
    roots = store.parent / "roots"
    roots.mkdir()
    (roots / "a-uuid").symlink_to(tmp_path / "gone")
    with pytest.raises(RavectlError, match="its image is not known") as e:
        building.collect(dry_run=False)
    assert unused.exists()
    subprocess.run(["sh", "-euc", e.value.hint.partition("gone for good: ")[2]], check=True)
    building.collect(dry_run=False)
    assert not unused.exists()


@pytest.mark.parametrize("record", ["{", '{"form": "99"}', None])
def test_gc_asks_the_disk_where_the_record_cannot_say(
    store: Path, plan: Plan, tmp_path: Path, record: str | None
) -> None:
    """So that one machine of another ravectl's does not let the store grow for ever."""
    used, unused = put(store, "a" * 16, plan), put(store, "b" * 16, plan)
    found = use("a" * 16, tmp_path / "elsewhere" / "default", plan)
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2",
         "-b", used / "disk.qcow2", found.overlay, "1M"],
        check=True,
    )  # fmt: skip
    (found.folder / "instance.json").unlink()
    if record is not None:
        (found.folder / "instance.json").write_text(record)
    building.collect(dry_run=False)
    assert (used.exists(), unused.exists()) == (True, False)
    with found.overlay.open("r+b") as f:
        f.write(b"another")
    unused.mkdir()
    os.utime(unused, (0, 0))
    with pytest.raises(RavectlError, match="default"):
        building.collect(dry_run=False)
    assert unused.exists(), "nobody knows which image the disk needs"


def test_a_copy_is_whole_or_not_there(store: Path, plan: Plan, tmp_path: Path) -> None:
    image: Image = images.load(put(store, "a" * 16, plan))
    building.export(image, tmp_path / "out.qcow2")
    assert (tmp_path / "out.qcow2").read_bytes() == image.disk.read_bytes()
    with pytest.raises(UsageError, match="is a folder"):
        building.export(image, tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        building.export(image, tmp_path / "none" / "out.qcow2")
    image.disk.unlink()
    with pytest.raises((RavectlError, OSError)):
        building.export(image, tmp_path / "half.qcow2")
    assert not [p for p in tmp_path.iterdir() if "half" in p.name]


def test_two_trees_are_compared(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "d").mkdir(parents=True)
        (tmp_path / name / "d" / "same").write_text("same")
        (tmp_path / name / "link").symlink_to("same")
    assert building.tree_differences(tmp_path / "one", tmp_path / "two") == []
    (tmp_path / "two" / "d" / "same").write_text("else")
    (tmp_path / "two" / "link").unlink()
    (tmp_path / "two" / "link").symlink_to("other")
    (tmp_path / "one" / "only").mkdir(mode=0o700)
    differ = building.tree_differences(tmp_path / "one", tmp_path / "two")
    assert differ == ["d/same", "link", "only"]
