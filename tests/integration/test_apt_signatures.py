"""Packages come only from lists that Debian signed: real mmdebstrap and apt, a real repository."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ravectl.engines import debian
from tests.conftest import Tool

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mmdebstrap makes a root as root")

RELEASE = """\
Origin: Debian
Label: Debian
Suite: stable
Codename: trixie
Date: Thu, 01 Jan 2026 00:00:00 UTC
Architectures: amd64
Components: main
SHA256:
 {digest} {size} main/binary-amd64/Packages
"""
OTHER_KEY = "a key that is none of Debian's"


class Repository:
    """A repository of no packages, and a key of its own to sign it by."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # the agent's socket is in it, whose path may have 107 bytes
        self.home = Path(tempfile.mkdtemp(prefix="gnupg-"))
        self.dists = folder / "www" / "dists" / debian.SUITE
        (self.dists / "main" / "binary-amd64").mkdir(parents=True)
        (self.dists / "main" / "binary-amd64" / "Packages").write_bytes(b"")
        digest = hashlib.sha256(b"").hexdigest()
        (self.dists / "Release").write_text(RELEASE.format(digest=digest, size=0))
        self.gpg("--quick-gen-key", "--passphrase", "", OTHER_KEY, "ed25519", "sign", "never")
        self.keyring = folder / "keyring.gpg"
        self.gpg("--output", str(self.keyring), "--export")

    def gpg(self, *words: str) -> None:
        base = [
            "gpg",
            "--homedir",
            str(self.home),
            "--batch",
            "--quiet",
            "--pinentry-mode=loopback",
        ]
        subprocess.run([*base, *words], check=True, capture_output=True)

    def sign(self) -> None:
        release = str(self.dists / "Release")
        self.gpg("--clearsign", "--output", str(self.dists / "InRelease"), release)

    @contextlib.contextmanager
    def serve(self) -> Iterator[str]:
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *words: object) -> None:
                pass

        handler = functools.partial(Quiet, directory=str(self.folder / "www"))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()

    def end(self) -> None:
        home = {**os.environ, "GNUPGHOME": str(self.home)}
        subprocess.run(["gpgconf", "--kill", "all"], env=home, check=False)
        shutil.rmtree(self.home, ignore_errors=True)  # an agent that ends removes its own


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    made = Repository(tmp_path / "repository")
    yield made
    made.end()


def build(tool: Tool, mirror: str, tmp_path: Path, **more: str) -> str:
    tool.cache = tmp_path / "cache"
    own = {"RAVECTL_DEBIAN_MIRROR": mirror, "no_proxy": "127.0.0.1", **more}
    done = tool("build", "--safe", code=None, env=own, seconds=200)
    assert done.returncode in (1, 2, 4), done.stderr
    assert not list(tool.cache.glob("debian/base-*"))
    return done.stderr


def alter(repository: Repository) -> None:
    repository.sign()
    signed = repository.dists / "InRelease"
    signed.write_text(signed.read_text().replace("Label: Debian", "Label: Debiam"))


WAYS: dict[str, tuple[Callable[[Repository], None], bool]] = {
    "another's key": (Repository.sign, False),
    "changed after it was signed": (alter, True),
    "not signed at all": (lambda _: None, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_lists_that_debian_did_not_sign(
    tool: Tool, repository: Repository, tmp_path: Path, way: str
) -> None:
    prepare, own_key = WAYS[way]
    prepare(repository)
    keys = {"RAVECTL_DEBIAN_KEYRING": str(repository.keyring)} if own_key else {}
    with repository.serve() as mirror:
        said = build(tool, mirror, tmp_path, **keys)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert f"the mirror {mirror} is not signed by a key of" in errors[0]
    assert said.count("fix: ") == 1


def test_lists_that_a_named_keyring_signed_are_taken(
    tool: Tool, repository: Repository, tmp_path: Path
) -> None:
    """The other tests fail by the signature, not by the repository."""
    repository.sign()
    with repository.serve() as mirror:
        said = build(tool, mirror, tmp_path, RAVECTL_DEBIAN_KEYRING=str(repository.keyring))
    assert "is not signed" not in said
    assert "mmdebstrap failed" in said  # it has no packages


@pytest.mark.parametrize(
    "value",
    ["deb [trusted=yes] http://127.0.0.1:9/debian trixie main", "[trusted=yes] http://h/debian",
     "/etc/apt/sources.list", "http://h/debian trixie main\ndeb [trusted=yes] http://h/d x"],
)  # fmt: skip
def test_a_mirror_is_a_uri_and_no_options(tool: Tool, tmp_path: Path, value: str) -> None:
    said = build(tool, value, tmp_path)
    assert "is no URI of a mirror" in said
    assert said.count("fix: ") == 1


def test_a_host_without_the_keyring(tool: Tool, tmp_path: Path) -> None:
    said = build(tool, "http://127.0.0.1:9/debian", tmp_path, RAVECTL_DEBIAN_KEYRING="/none.gpg")
    assert "there is no keyring /none.gpg" in said
    assert "apt-get install debian-archive-keyring" in said


def test_nothing_that_runs_apt_trusts_by_option() -> None:
    source = Path(debian.__file__).parents[1]
    for path in source.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "trusted=yes" in line or "allow-insecure" in line:
                assert line.lstrip().startswith("#"), f"{path.name}:{number}"
