"""Where a profile names a receiver, both engines send the journal there, and only there."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ravectl import credentials, images, profile, qemu
from ravectl.engines import debian
from ravectl.model import RELAY_ADDRESS, Plan, RenderedTree, SecretKind
from ravectl.plan import make_plan
from ravectl.render import write_tree
from tests import nixos

CA = credentials.ca_certificate(credentials.new_value(SecretKind.CA_KEY))
NAMED = "https://logs.example.org:19532"
HERE = "http://10.0.2.2:19999"
UPLOAD = "etc/systemd/journal-upload.conf.d/rave.conf"
UNIT = "etc/systemd/system/systemd-journal-upload.service.d/rave.conf"


def plan_for(folder: Path, url: str | None, *, egress: bool = False, ca: str | None = None) -> Plan:
    forward = None if url is None else {"url": url, "ca": ca}
    written = {
        "extends": "safe", "name": "sends", "network": {"egress": egress},
        "logs": {"forward": forward},
    }  # fmt: skip
    (folder / "rave.yaml").write_text(yaml.safe_dump(written))
    return make_plan(**profile.select(None, {}, folder / "rave.yaml").plan_arguments())


def ini(tree: RenderedTree, path: str) -> configparser.RawConfigParser:
    found = configparser.RawConfigParser()
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(tree.file(path).content)
    return found


def nix(folder: Path, plan: Plan) -> dict[str, Any]:
    write_tree(images.render_nixos((plan,)), folder / "flake")
    return nixos.evaluate(folder / "flake" / "modules" / plan.hostname)


CASES = [
    (NAMED, False, CA, NAMED, "logs.example.org"), (NAMED, False, None, NAMED, "logs.example.org"),
    (NAMED, True, CA, NAMED, None), (HERE, False, None, f"http://{RELAY_ADDRESS}:19999", None),
    (HERE, True, None, HERE, None),
]  # fmt: skip


@pytest.mark.parametrize(("url", "egress", "ca", "seen", "alias"), CASES)
def test_both_engines_send_it_there(
    tmp_path: Path, url: str, egress: bool, ca: str | None, seen: str, alias: str | None
) -> None:
    plan = plan_for(tmp_path, url, egress=egress, ca=ca)
    tree, values = images.render_debian(plan), nix(tmp_path, plan)
    ours, theirs = ini(tree, UPLOAD)["Upload"], values["services"]["journald"]["upload"]
    assert theirs["enable"] is True
    upload = theirs["settings"]["Upload"]
    assert ours["URL"] == upload["URL"] == seen
    # the certificate lies in another place on each
    trusted = ours.pop("TrustedCertificateFile", None), upload.pop("TrustedCertificateFile", None)
    assert dict(ours) == upload
    assert (None not in trusted) == url.startswith("https")
    if ca:
        assert tree.file((trusted[0] or "").lstrip("/")).content == ca
        name = (trusted[1] or "").rpartition("-")[2]
        folder = tmp_path / "flake" / "modules" / plan.hostname / "files"
        assert next(folder.glob(f"*{name}")).read_text() == ca

    unit = ini(tree, UNIT)
    service = values["systemd"]["services"]["systemd-journal-upload"]
    numbers = {"RestartSteps", "TasksMax", "OOMScoreAdjust"}
    expected = {k: int(v) if k in numbers else v for k, v in unit["Service"].items()}
    assert service["serviceConfig"] == expected
    assert service["startLimitIntervalSec"] == int(unit["Unit"]["StartLimitIntervalSec"]) == 0
    assert unit["Service"].get("IPAddressAllow") == (None if egress else RELAY_ADDRESS)

    line = f"{RELAY_ADDRESS} {alias}"
    assert (line in tree.file("etc/hosts").content.splitlines()) == bool(alias)
    hosts = values["networking"].get("hosts", {})
    assert hosts == ({RELAY_ADDRESS: [alias]} if alias else {})


def test_a_machine_that_sends_nothing_has_nothing_for_it(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, None)
    assert not [f.path for f in images.render_debian(plan).files if "upload" in f.path]
    values = nix(tmp_path, plan)
    assert "journald" not in values["services"]
    assert "systemd-journal-upload" not in values["systemd"]["services"]
    assert "systemd-journal-remote" not in debian.packages(forwarding=False)


def test_an_image_that_sends_has_another_base() -> None:
    assert debian.base_key(()) != debian.base_key((), forwarding=True)
    assert "systemd-journal-remote" in debian.packages(forwarding=True)


def test_the_relay_needs_nothing_of_ravectl(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", qemu.relay_file(), "127.0.0.1", "x"],
        cwd=tmp_path, env={}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ModuleNotFoundError" not in done.stderr
    assert "ValueError" in done.stderr, "it came as far as its arguments"
