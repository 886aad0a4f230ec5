"""Secrets of a NixOS machine: a bundle of ours, unpacked by its helper, changed while it runs.

The bundle, sops, age and the helper (the rendered script, in a mount namespace of its own) are
real, and so is the manifest that Nix makes of the modules; sops-install-secrets is a stand-in.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ravectl import sops, vault
from ravectl.model import EngineName
from tests import nixos
from tests.integration.test_nix_modules import run_nix
from tests.plans import PLAN

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace needs root")

GIVEN = "agents/anthropic-api-key"
ENTER = """
mount --bind "$1" /run; mount --bind "$2" /var/lib
mount --bind "$3/passwd" /etc/passwd; mount --bind "$3/group" /etc/group
shift 3; exec "$@"
"""


@functools.cache
def manifest() -> str:
    """What the modules have sops-install-secrets unpack, as Nix builds it."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "result"
        run_nix(
            Path(folder), "build", f"path:{nixos.flake()}#rave-safe", "--out-link", str(link),
            "--no-write-lock-file",
        )  # fmt: skip
        (system,) = (link / "store-paths").read_text().split()
        configuration = json.loads((Path(system) / "configuration.json").read_text())
        unit = configuration["systemd"]["services"]["sops-install-secrets"]
        helper = unit["serviceConfig"]["ExecStart"][0].removesuffix(" boot")
        found = re.search(r"^export SECRETS_MANIFEST=(\S+)$", Path(helper).read_text(), re.M)
        assert found is not None
        return Path(found[1]).read_text()


@dataclasses.dataclass
class Machine:
    """Its /run and /var/lib, its accounts, and what it was handed over."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("run/credentials/@system", "lib", "etc", "bin"):
            (self.folder / name).mkdir(parents=True)
        tool = self.folder / "bin" / "sops-install-secrets"
        tool.write_text(
            f"#!/bin/sh\nexec {sys.executable} "
            f'{nixos.STANDINS / "standin_sops_install_secrets.py"} "$@"\n'
        )
        tool.chmod(0o755)
        (self.folder / "manifest.json").write_text(manifest())
        names = {n for s in PLAN.delivered() for n in (s.owner, s.group)}
        for kind, form in (("passwd", "{0}:x:{1}:{1}::/:/bin/sh\n"), ("group", "{0}:x:{1}:\n")):
            text = Path("/etc", kind).read_text()
            known = {line.split(":")[0] for line in text.splitlines()}
            ours = (form.format(n, 4000 + i) for i, n in enumerate(sorted(names - known)))
            (self.folder / "etc" / kind).write_text(text + "".join(ours))
        identity, self.recipient = sops.new_identity()
        self.credential("age-identity").write_text(identity + "\n")

    def credential(self, name: str) -> Path:
        return self.folder / "run/credentials/@system" / f"rave.{name}"

    def hand_over(self, values: dict[str, str], serial: int) -> None:
        bundle = vault.bundle_for(EngineName.NIX, PLAN, values, serial, self.recipient)
        self.credential("bundle").write_bytes(bundle)

    def __call__(self, *words: str, stdin: bytes = b"", code: int = 0) -> str:
        helper = nixos.flake() / "modules" / "rave-safe" / "scripts" / "secrets.sh"
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-euc", ENTER, "sh", self.folder / "run",
             self.folder / "lib", self.folder / "etc", "bash", helper, *words],
            env={
                # sops is beside the Python that runs us
                "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SECRETS_MANIFEST": str(self.folder / "manifest.json"),
                "HOME": "/var/empty",
            },
            input=stdin, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return (done.stdout if code == 0 else done.stderr).decode().strip()

    def stage(self, values: dict[str, str], serial: int, code: int = 0) -> str:
        bundle = vault.bundle_for(EngineName.NIX, PLAN, values, serial, self.recipient)
        return self("stage", stdin=bundle, code=code)

    def reboot(self) -> None:
        """The guest's own: QEMU hands over what it did at its start."""
        for path in (self.folder / "run").iterdir():
            if path.name != "credentials":
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
        self("boot")

    def files(self) -> dict[str, str]:
        """What readers find, with owners and modes held to the Plan's."""
        root = self.folder / "run/secrets.d" / (self.folder / "run/secrets").readlink().name
        found = {}
        for path in root.rglob("*"):
            if path.is_file():
                name = str(path.relative_to(root))
                s = vault.declared(PLAN, name)
                seen = self.look(path)
                assert seen == (s.owner, s.group, s.mode), name
                found[name] = path.read_text()
        return found

    def look(self, path: Path) -> tuple[str, str, str]:
        names = {}
        for kind in ("passwd", "group"):
            rows = [r.split(":") for r in (self.folder / "etc" / kind).read_text().splitlines()]
            names[kind] = {int(r[2]): r[0] for r in reversed(rows)}
        state = path.stat()
        mode = f"{state.st_mode & 0o7777:04o}"
        return names["passwd"][state.st_uid], names["group"][state.st_gid], mode

    def generations(self) -> set[str]:
        return {p.name for p in (self.folder / "run/secrets.d").iterdir()}


VALUES = {name: f"value of {name}\nits second line\n" for name in vault.required(PLAN)}
NEXT = {**VALUES, "ccr/api-key": "another\n"}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.hand_over(VALUES, 7)
    return made


def test_what_was_handed_over_is_there(machine: Machine) -> None:
    machine("boot")
    assert machine.files() == VALUES
    assert machine("state") == "7 0 0"
    assert machine.generations() == {"7"}, "no copy of the identity is left"
    # what nobody gave is not there, but the folder that its reader looks into is
    assert (machine.folder / "run/secrets.d/7/agents").is_dir()


def test_what_is_given_and_what_is_still_accepted(machine: Machine) -> None:
    grace = {"dispatcher/gitlab-token.previous": "old\n",
             "dispatcher/gitlab-token.previous-until": "1795558612\n"}  # fmt: skip
    values = {**VALUES, GIVEN: 'with "quotes", \\ and\ttabs: ü\n', **grace}
    machine.hand_over(values, 8)
    machine("boot")
    assert machine.files() == values


def test_a_rotation(machine: Machine) -> None:
    machine("boot")
    machine.stage(NEXT, 9)
    assert machine("state") == "7 0 9"
    assert machine.files() == VALUES, "readers see nothing of it yet"
    machine("activate", "9")
    assert machine.files() == NEXT
    machine("commit", "9")
    assert machine("state") == "9 9 0"
    assert machine.generations() == {"9"}
    # it is newer than what was handed over
    machine.reboot()
    assert machine.files() == NEXT
    # a new start hands over what is newer still
    machine.hand_over(VALUES, 10)
    machine.reboot()
    assert machine.files() == VALUES
    assert machine("state") == "10 0 0"


@pytest.mark.parametrize("activated", [False, True])
def test_a_rotation_that_is_taken_back(machine: Machine, activated: bool) -> None:
    machine("boot")
    machine.stage(NEXT, 9)
    if activated:
        machine("activate", "9")
    machine("discard", "9")
    assert machine.files() == VALUES
    assert machine("state") == "7 0 0"
    machine.reboot()
    assert machine.files() == VALUES


def test_a_reboot_in_the_middle_forgets_it(machine: Machine) -> None:
    machine("boot")
    machine.stage(NEXT, 9)
    machine("activate", "9")
    machine.reboot()
    assert machine.files() == VALUES
    assert machine("state") == "7 0 0"


def test_a_bundle_for_somebody_else(machine: Machine) -> None:
    machine("boot")
    _, machine.recipient = sops.new_identity()
    said = machine.stage(NEXT, 9, code=1)
    assert "could not be unpacked: another identity" in said
    assert machine.files() == VALUES
    assert machine.generations() == {"7"}
    assert "there is no generation 9" in machine("activate", "9", code=1)


def test_a_damaged_bundle(machine: Machine) -> None:
    machine("boot")
    bundle = vault.bundle_for(EngineName.NIX, PLAN, NEXT, 9, machine.recipient)
    broken = bundle.replace(b"data:", b"data:A", 1)
    assert "could not be unpacked" in machine("stage", stdin=broken, code=1)
    assert "what was sent is no bundle" in machine("stage", stdin=b"hello\n", code=1)
    assert machine.files() == VALUES


def test_a_bundle_tells_nothing(machine: Machine) -> None:
    bundle = machine.credential("bundle").read_bytes()
    assert bundle.startswith(f"{vault.MAGIC} 7\n".encode())
    for value in VALUES.values():
        assert value.splitlines()[0].encode() not in bundle


def test_nothing_was_handed_over(machine: Machine) -> None:
    machine.credential("bundle").unlink()
    assert "no secrets were handed over" in machine("boot", code=1)
    machine.hand_over(VALUES, 7)
    machine.credential("age-identity").unlink()
    assert "no identity was handed over" in machine("boot", code=1)
