"""The nix engine decides: its command line, what a failure is called, what a lock says."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest

from ravectl import building, profile
from ravectl.engines import nix
from ravectl.engines.nixlog import Log
from ravectl.errors import RavectlError, UsageError
from ravectl.model import EngineName, ImageFormat, NixSettings
from ravectl.workspace import Workspace
from tests.plans import PLAN
from tests.unit.test_nixlog import lines

BUILD = nix.Build(Path("/flake"), "rave-safe", NixSettings())


def words(build: nix.Build, link: Path | None = None) -> str:
    return shlex.join(nix.arguments(build, link))


def test_the_command_line() -> None:
    text = words(BUILD, Path("/root"))
    assert "build 'path:/flake#packages.x86_64-linux.rave-safe'" in text
    assert "--log-format internal-json" in text
    assert "--max-jobs 1 --cores 2" in text
    assert "--out-link /root" in text
    assert "--no-update-lock-file" in text
    assert "substituters" not in text
    for option in ("--offline", "--rebuild", "--no-link"):
        assert option not in text
    assert words(BUILD).endswith("--no-link")


def test_what_a_profile_and_a_person_add() -> None:
    settings = NixSettings(4, 0, ("https://a.test", "file:///b"), ("a-1:key=",))
    text = words(nix.Build(Path("/f"), "x", settings, offline=True, rebuild=True))
    assert "--option extra-substituters 'https://a.test file:///b'" in text
    assert "--option extra-trusted-public-keys a-1:key=" in text
    assert text.endswith("--offline --rebuild")


def test_a_profile_says_how_nix_builds(tmp_path: Path) -> None:
    key = "cache.test-1:" + "A" * 43 + "="
    (tmp_path / "rave.yaml").write_text(
        "extends: full-pipe\n"
        f"nix: {{substituters: ['https://cache.test'], trusted_public_keys: ['{key}']}}\n"
    )
    settings = profile.select(None, {}, tmp_path / "rave.yaml").nix_settings()
    assert settings == NixSettings(2, 4, ("https://cache.test",), (key,))
    assert profile.select("safe", {}, None).nix_settings() == NixSettings(1, 2, (), ())


@pytest.mark.parametrize(
    "text",
    [
        "substituters: ['https://user:password@cache.test']",  # pragma: allowlist secret
        "substituters: ['ssh://host']",
        "substituters: ['https://a b']",
        "trusted_public_keys: [abc]",
        "max_jobs: 0",
    ],
)
def test_a_profile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rave.yaml").write_text(f"extends: safe\nnix: {{{text}}}\n")
    with pytest.raises(UsageError) as caught:
        profile.select(None, {}, tmp_path / "rave.yaml")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nix (Nix) 2.8.0", (2, 8, 0)),
        ("nix (Nix) 2.26.3", (2, 26, 3)),
        ("nix (Lix, like Nix) 2.91.1", (2, 91, 1)),
        ("nix (Nix) 2.24pre20240808_abc", (2, 24)),
    ],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert nix.version_in(text) == version


def test_no_version() -> None:
    with pytest.raises(RavectlError, match="does not say its version"):
        nix.version_in("nix: what?")


def test_attributes() -> None:
    assert nix.attribute("rave-safe", ImageFormat.QCOW2) == "rave-safe"
    assert nix.attribute("rave-safe", ImageFormat.RAW) == "rave-safe"
    assert nix.attribute("rave-safe", ImageFormat.RAW_EFI) == "rave-safe-raw-efi"
    # every format is one of either kind
    direct = {f.value for f in ImageFormat if f.boots_directly}
    assert direct | set(nix.FORMATS) == {f.value for f in ImageFormat}
    assert not direct & set(nix.FORMATS)


# --- failures -----------------------------------------------------------------------------------


def failure(name: str, build: nix.Build = BUILD) -> RavectlError:
    log = Log()
    for line in lines(name):
        log.feed(line)
    return nix.failure(log, build)


def test_a_failed_derivation() -> None:
    e = failure("failed")
    assert e.message == "building bad failed"
    assert "oh no" in e.details
    assert "-bad.drv" in e.details, "what `nix log` needs"
    assert "nix log" in e.hint


def test_a_file_that_none_makes() -> None:
    """Its derivation fails by intent; what is said of it is what to do."""
    e = failure("failed", dataclasses.replace(BUILD, held=("bad",)))
    assert e.message == "bad is not in Nix's store, and Nix cannot fetch it"
    assert "without --offline" in e.hint


def test_a_failed_evaluation() -> None:
    e = failure("not-evaluated")
    assert e.message == "nix build failed: no such thing"
    assert e.hint


@pytest.mark.parametrize("offline", [False, True])
def test_nothing_can_be_downloaded(offline: bool) -> None:
    log = Log()
    log.feed('@nix {"action":"msg","level":0,"msg":"error: unable to download \'x\': timeout"}')
    e = nix.failure(log, nix.Build(Path("/f"), "x", NixSettings(), offline=offline))
    assert e.message == "Nix could not download what it needs"
    assert ("--offline" in e.hint) is not offline
    assert "timeout" in e.details


def test_bits_that_differ() -> None:
    log = Log()
    text = "error: derivation '/nix/store/a-x.drv' may not be deterministic: output '/x' differs"
    log.feed("@nix " + json.dumps({"action": "msg", "level": 0, "msg": text}))
    assert nix.failure(log, BUILD).message == "two builds of the same inputs differ"


def test_nix_that_says_nothing() -> None:
    e = nix.failure(Log(), BUILD)
    assert e.message
    assert e.hint


# --- engines and formats ------------------------------------------------------------------------


def test_engines_by_name() -> None:
    assert building.engine_name("auto") is None
    assert building.engine_name("nix") is EngineName.NIX
    with pytest.raises(UsageError, match="no engine 'guix'") as caught:
        building.engine_name("guix")
    assert caught.value.hint == "use one of: auto, nix, debian"


def test_formats_by_name() -> None:
    assert building.image_format("raw-efi") is ImageFormat.RAW_EFI
    with pytest.raises(UsageError) as caught:
        building.image_format("vdi")
    for fmt in ImageFormat:
        assert fmt.value in caught.value.hint


def test_what_debian_does_not_make(tmp_path: Path) -> None:
    request = building.Request(PLAN, ImageFormat.ISO, engine=EngineName.DEBIAN)
    with pytest.raises(UsageError, match="the debian engine makes no iso") as caught:
        building.build(request, Workspace(tmp_path))
    assert "--engine nix" in caught.value.hint


@pytest.mark.parametrize("fmt", [ImageFormat.RAW, ImageFormat.VMWARE])
def test_what_cannot_be_compressed(tmp_path: Path, fmt: ImageFormat) -> None:
    request = building.Request(PLAN, fmt, compress=True, engine=EngineName.NIX)
    with pytest.raises(UsageError, match="--compress is for the format qcow2"):
        building.build(request, Workspace(tmp_path))


# --- the lock -----------------------------------------------------------------------------------


def test_the_lock_of_a_workspace(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    assert building.flake_lock(space) is None
    pins = building.lock_inputs(PLAN, space, update=False)
    assert [p.name for p in pins] == ["nixpkgs", "sops-nix"]
    path = tmp_path / "flake.lock"
    # another one is kept, and built from
    changed = path.read_text().replace(pins[0].revision, "f" * 40)
    path.write_text(changed)
    assert building.lock_inputs(PLAN, space, update=False)[0].revision == "f" * 40
    assert path.read_text() == changed
    request = building.Request(PLAN, engine=EngineName.NIX)
    inputs = building.resolve_nixos(request, space)
    assert inputs.tree.file("flake.lock").content == changed
    path.unlink()
    assert building.resolve_nixos(request, space).digest != inputs.digest


@pytest.mark.parametrize(
    "text", ["", "{}", '{"nodes": []}', '{"nodes": {"root": {"inputs": {"a": "b"}}}}']
)
def test_a_damaged_lock_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "flake.lock").write_text(text)
    with pytest.raises(RavectlError, match="is damaged") as caught:
        building.flake_lock(Workspace(tmp_path))
    assert "flake.lock" in caught.value.hint


def test_how_nix_builds_does_not_change_what_it_builds(tmp_path: Path) -> None:
    one, two = (
        building.resolve_nixos(
            building.Request(PLAN, engine=EngineName.NIX, nix=NixSettings(jobs)),
            Workspace(tmp_path),
        )
        for jobs in (1, 4)
    )
    assert one.digest == two.digest
