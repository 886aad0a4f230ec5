"""Signed images: every way in which one may be another than what was signed, by real ssh-keygen."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from ravectl import building, credentials, files, images, lifecycle, profile, signing, sops, vault
from ravectl.errors import RavectlError
from ravectl.instance import Instance, new_record
from ravectl.model import EngineName, Plan, to_json
from ravectl.plan import SECRETS, make_plan
from ravectl.workspace import Workspace
from tests.conftest import Tool

DIGEST = "a" * 16


@dataclass
class Site:
    """An account with a workspace and a store in which it has made an image."""

    space: Workspace
    folder: Path
    plan: Plan

    def verify(self, space: Workspace | None = None) -> str:
        return signing.verify(space or self.space, images.load(self.folder))


def put(folder: Path, plan: Plan) -> Path:
    """An image as an engine leaves it, but for what its files hold."""
    folder.mkdir(parents=True)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", folder / "disk.qcow2", "1G"], check=True
    )
    for name in ("vmlinuz", "initrd"):
        (folder / name).write_bytes(name.encode() * 500)
    parts = [folder / n for n in ("disk.qcow2", "vmlinuz", "initrd")]
    manifest = {
        "digest": folder.name, "engine": "debian", "format": "qcow2", "cmdline": "quiet",
        "plan": to_json(plan), "packages": [],
        "hashes": {p.name: files.digest_file(p) for p in parts},
        "sizes": {p.name: p.stat().st_size for p in parts},
    }  # fmt: skip
    (folder / "image.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    plan = make_plan(**profile.select("safe", {}, None).plan_arguments())
    folder = put(images.store_dir() / DIGEST, plan)
    (tmp_path / "ws").mkdir()
    space = Workspace(tmp_path / "ws")
    signing.sign(space, folder)
    return Site(space, folder, plan)


def other_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace of another account, which knows nothing of this one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config-of-another"))
    (tmp_path / "other").mkdir()
    return Workspace(tmp_path / "other")


# --- who is trusted --------------------------------------------------------------------------


def test_its_maker_takes_it(site: Site) -> None:
    assert site.verify() == "this workspace"


def test_keys_are_private_and_known_to_openssh(site: Site) -> None:
    key = signing.key_file(site.space)
    assert key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    assert signing.account_signers().stat().st_mode & 0o777 == 0o600
    public = subprocess.run(
        ["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True
    ).stdout
    assert signing.public_key(key) == " ".join(public.split()[:2])


def test_another_workspace_of_the_account_takes_it(site: Site, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    assert site.verify(Workspace(tmp_path / "second")) == "another workspace of this account"


def test_nobody_else_takes_it(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = other_workspace(tmp_path, monkeypatch)
    with pytest.raises(signing.UntrustedError, match="signed by nobody") as e:
        site.verify(other)
    assert "ravectl build" in e.value.hint


def test_a_team_takes_what_its_ci_signed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = signing.signer_line(site.space, "ci@example.org")
    other = other_workspace(tmp_path, monkeypatch)
    (other.root / "allowed_signers").write_text(f"# ours\n{line}\n")
    assert site.verify(other) == "ci@example.org"


@pytest.mark.parametrize("option", ['namespaces="git"', 'valid-before="20200101"'])
def test_a_key_of_other_use_or_time_is_none(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    public = signing.public_key(signing.key_file(site.space))
    other = other_workspace(tmp_path, monkeypatch)
    (other.root / "allowed_signers").write_text(f"ci@example.org {option} {public}\n")
    with pytest.raises(signing.UntrustedError):
        site.verify(other)


def test_a_line_that_cannot_be_read_is_told(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = signing.signer_line(site.space, "ci@example.org")
    other = other_workspace(tmp_path, monkeypatch)
    (other.root / "allowed_signers").write_text(f"ci@example.org ssh-ed25519 AAAA\n{line}\n")
    assert site.verify(other) == "ci@example.org"
    (other.root / "allowed_signers").write_text(line.replace("AAAAC3", "AAAAC4"))
    with pytest.raises(signing.UntrustedError) as e:
        site.verify(other)
    assert "allowed_signers:1" in e.value.details


def test_a_signature_for_another_purpose_is_none(site: Site) -> None:
    key = signing.key_file(site.space)
    (signature,) = (site.folder / "signatures").iterdir()
    done = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-n", "git", "-f", key],
        input=(site.folder / "image.json").read_bytes(), capture_output=True, check=True,
    )  # fmt: skip
    signature.write_bytes(done.stdout)
    with pytest.raises(signing.UntrustedError):
        site.verify()


def test_a_key_from_elsewhere(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "ci_key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", key], check=True)
    (tmp_path / "ci_key.pub").unlink()
    monkeypatch.setenv("RAVECTL_SIGNING_KEY", str(key))
    signing.sign(site.space, site.folder)
    assert len(list((site.folder / "signatures").iterdir())) == 2
    monkeypatch.delenv("RAVECTL_SIGNING_KEY")
    other = other_workspace(tmp_path, monkeypatch)
    monkeypatch.setenv("RAVECTL_SIGNING_KEY", str(key))
    assert site.verify(other) == "this workspace"


@pytest.mark.parametrize("phrase", [None, "a passphrase"], ids=["missing", "locked"])
def test_a_key_that_cannot_be_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phrase: str | None
) -> None:
    key = tmp_path / "ci_key"
    if phrase:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", key], check=True)
    monkeypatch.setenv("RAVECTL_SIGNING_KEY", str(key))
    with pytest.raises(RavectlError, match=r"names no file|cannot be used") as e:
        signing.sign(site.space, site.folder)
    assert e.value.hint


# --- what was changed ------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change one byte and keep size and times, as who hides it does."""
    before = path.stat()
    with path.open("r+b") as f:
        f.seek(before.st_size // 2)
        byte = f.read(1)
        f.seek(before.st_size // 2)
        f.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def set_cmdline(folder: Path) -> None:
    text = (folder / "image.json").read_text()
    (folder / "image.json").write_text(text.replace('"quiet"', '"init=/bin/sh"'))


CHANGES: dict[str, Callable[[Path], None]] = {
    "disk": lambda f: flip(f / "disk.qcow2"),
    "kernel": lambda f: flip(f / "vmlinuz"),
    "initrd": lambda f: flip(f / "initrd"),
    "manifest": set_cmdline,
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("known", [False, True], ids=["new", "measured"])
def test_a_changed_byte(
    site: Site, monkeypatch: pytest.MonkeyPatch, what: str, known: bool
) -> None:
    if known:
        measured(site, monkeypatch)
    CHANGES[what](site.folder)
    with pytest.raises(signing.AlteredError, match="changed after it was signed") as e:
        site.verify()
    assert f"mv {site.folder} ELSEWHERE" in e.value.hint


def test_of_a_changed_image_below_a_disk_the_disk_is_saved_first(site: Site) -> None:
    """It lies on this very image, and no other can replace that."""
    flip(site.folder / "disk.qcow2")
    made = Instance(site.space.instance_dir("default"), "default")
    with pytest.raises(signing.AlteredError) as e:
        lifecycle._verify_below(made, images.find(DIGEST))
    kept = e.value.hint.index(f"qemu-img convert -O qcow2 {made.overlay}")
    assert kept < e.value.hint.index(f"mv {site.folder}")
    assert "rm -r" not in e.value.hint


def test_another_images_signed_manifest(site: Site) -> None:
    moved = site.folder.rename(site.folder.with_name("b" * 16))
    with pytest.raises(signing.AlteredError, match=f"is that of {DIGEST}"):
        signing.verify(site.space, images.load(moved))


def test_a_signed_manifest_that_leaves_a_file_out(site: Site) -> None:
    manifest = json.loads((site.folder / "image.json").read_text())
    del manifest["hashes"]["vmlinuz"]
    (site.folder / "image.json").write_text(json.dumps(manifest))
    signing.sign(site.space, site.folder)
    with pytest.raises(signing.AlteredError, match="no hash of vmlinuz"):
        site.verify()


def test_an_image_of_before_signatures(site: Site) -> None:
    shutil.rmtree(site.folder / "signatures")
    with pytest.raises(signing.UntrustedError, match="is not signed") as e:
        site.verify()
    assert "make it again: ravectl build" in e.value.hint


def test_a_broken_signature_beside_a_good_one(site: Site) -> None:
    (site.folder / "signatures" / "0.sig").write_text("junk")
    assert site.verify() == "this workspace"


def test_a_changed_manifest_in_a_copied_image_of_ci(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = signing.signer_line(site.space, "ci@example.org")
    other = other_workspace(tmp_path, monkeypatch)
    (other.root / "allowed_signers").write_text(line + "\n")
    set_cmdline(site.folder)
    with pytest.raises(signing.AlteredError):
        site.verify(other)


# --- what was measured -----------------------------------------------------------------------


def measured(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the image's files measured and the result kept."""
    if files.filesystem_of(site.folder) not in signing.STAMPING:
        pytest.skip("the tests' folder is on a file system that does not stamp every change")
    monkeypatch.setattr(signing, "SETTLED_NS", -1)
    site.verify()
    assert len(json.loads((site.space.state / "measured.json").read_text())) == 3


def test_files_are_measured_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(site, monkeypatch)
    monkeypatch.setattr(files, "digest_file", lambda _: pytest.fail("measured again"))
    assert site.verify() == "this workspace"


def test_a_file_that_was_just_written_is_measured_again(site: Site) -> None:
    site.verify()
    records = json.loads((site.space.state / "measured.json").read_text())
    assert records == {}, "a change within the clock's grain would not show"


def map_and_flip(path: Path) -> None:
    with path.open("r+b") as f, mmap.mmap(f.fileno(), 0) as data:
        data[100] ^= 1


def test_a_byte_changed_through_a_mapping(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(site, monkeypatch)
    map_and_flip(site.folder / "vmlinuz")
    with pytest.raises(signing.AlteredError, match="vmlinuz"):
        site.verify()


def test_on_a_tmpfs_nothing_is_taken_as_measured(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounts")
    monkeypatch.setattr(signing, "SETTLED_NS", -1)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", site.folder], check=True)
    try:
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        put(tmp_path / "again" / DIGEST, site.plan)
        shutil.copytree(tmp_path / "again" / DIGEST, site.folder, dirs_exist_ok=True)
        signing.sign(site.space, site.folder)
        site.verify()
        before = signing.stamp_of(site.folder / "vmlinuz")
        map_and_flip(site.folder / "vmlinuz")
        assert signing.stamp_of(site.folder / "vmlinuz") == before, "else this test shows nothing"
        with pytest.raises(signing.AlteredError, match="vmlinuz"):
            site.verify()
    finally:
        subprocess.run(["umount", site.folder], check=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', '{"x": []}'])
def test_a_damaged_record_only_costs_time(site: Site, text: str) -> None:
    (site.space.state / "measured.json").write_text(text)
    assert site.verify() == "this workspace"


# --- up and the command line -----------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False], ids=["its disk is there", "a new machine"])
@pytest.mark.parametrize("what", [*CHANGES, "unsigned"])
def test_up_refuses(site: Site, what: str, existing: bool) -> None:
    identity = sops.find_identity()
    vault.init(site.space, SECRETS, identity)
    found = Instance(site.space.instance_dir("default"), "default")
    if existing:
        found.folder.mkdir(parents=True)
        record = new_record(site.plan, EngineName.DEBIAN)
        found.save(replace(record, image=DIGEST))
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b",
             site.folder / "disk.qcow2", found.overlay], check=True,
        )  # fmt: skip
    if what == "unsigned":
        shutil.rmtree(site.folder / "signatures")
    else:
        CHANGES[what](site.folder)
    with pytest.raises((signing.AlteredError, signing.UntrustedError)):
        lifecycle.up(
            site.space, "default", site.plan, lambda: images.find(DIGEST), identity=identity
        )
    assert found.process() is None
    assert existing or not found.overlay.exists()


def test_an_export_and_gc_know_signatures(site: Site, tmp_path: Path) -> None:
    building.export(images.load(site.folder), tmp_path / "out.qcow2")
    os.utime(site.folder, (1, 1))
    building.collect(dry_run=False)
    assert not site.folder.exists()


def test_the_command_line(site: Site) -> None:
    tool = Tool(site.space.root, files.cache_dir())
    said = tool("image", "verify", DIGEST)
    assert said.stdout == f"{DIGEST}  signed by this workspace\n"
    line = tool("image", "key", "ci@example.org").stdout
    assert line == signing.signer_line(site.space, "ci@example.org") + "\n"
    set_cmdline(site.folder)
    done = tool("image", "verify", "--json", DIGEST, "f" * 16, code=3)
    altered, absent = json.loads(done.stdout)
    assert (altered["ok"], altered["signer"]) == (False, None)
    assert "changed after it was signed" in altered["cause"]
    assert "there is no image" in absent["cause"]
    assert tool("image", "verify", code=2).stderr.count("fix:") == 1
    # a person may vouch for it
    tool("image", "sign", DIGEST)
    assert "signed by" in tool("image", "verify", DIGEST).stdout
    flip(site.folder / "initrd")
    assert "initrd" in tool("image", "sign", DIGEST, code=1).stderr


def test_init_makes_the_key(site: Site, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    tool = Tool(tmp_path / "new")
    tool("init")
    key = tmp_path / "new" / ".rave" / "signing" / "id_ed25519"
    assert credentials.ensure_signing_key(key.parent).file == key
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o644)
    assert "id_ed25519" in tool("secrets", "check", code=3).stdout
