"""Building for real: what an image holds, and what bad days leave behind (nothing)."""

from __future__ import annotations

import contextlib
import http.server
import json
import mmap
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from ravectl import files, images
from ravectl.engines import debian
from tests.conftest import Tool

COMPRESSED_BYTES = 450 * 2**20


def debugfs(raw: Path, *requests: str) -> str:
    words = [w for r in requests for w in ("-R", r)]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/sbin", "DEBUGFS_PAGER": "cat"}
    done = subprocess.run(
        ["debugfs", *words, raw], env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_an_image_is_made_once_and_named_part_by_part(tool: Tool) -> None:
    first = tool("build", "--safe")
    disk = Path(first.stdout.strip())
    assert disk.is_file()
    again = tool("build", "--safe")
    assert again.stdout == first.stdout
    assert "was there already" in again.stderr
    lock = json.loads((tool.workspace / "rave.lock").read_text())
    parts = {row[0]: row for row in lock["packages"] + lock["npm"]}
    assert {"nginx", "postgresql-17", "openssh-server", "vibe-kanban"} <= set(parts)
    assert re.fullmatch(r"[0-9a-f]{64}", parts["nginx"][2])
    assert tool("build", "--safe", "--locked").stdout == first.stdout
    report = json.loads(tool("build", "--safe", "--json").stdout)
    assert report["hashes"]["disk.qcow2"] == files.digest_file(disk)


def test_an_image_holds_nothing_of_its_own(tool: Tool) -> None:
    raw = Path(tool("build", "--safe", "--format", "raw").stdout.strip())
    assert "File not found" in debugfs(raw, "stat /etc/ssh/ssh_host_ed25519_key")
    assert "Size: 0" in debugfs(raw, "stat /etc/machine-id")
    assert debugfs(raw, "ls -p /run/secrets").count("File not found") == 1
    assert "File not found" in debugfs(raw, "stat /etc/ssl/private/ssl-cert-snakeoil.key")
    # no account has a password
    rows = [line.split(":") for line in debugfs(raw, "cat /etc/shadow").splitlines()]
    hashes = [row[1] for row in rows if len(row) == 9]
    assert len(hashes) > 15
    assert set(hashes) <= {"*", "!", "!*"}


def test_an_image_holds_no_private_key(tool: Tool) -> None:
    disk = Path(tool("build", "--safe").stdout.strip())
    key = b"-----BEGIN OPENSSH PRIVATE KEY-----\n"  # pragma: allowlist secret
    with disk.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert data.find(b"rave-safe") > 0, "the disk is not compressed, so it can be searched"
        # programs name the marker; a key has a line of base64 below it
        at = data.find(key)
        while at >= 0:
            assert not re.match(rb"[A-Za-z0-9+/]{60}", data[at + len(key) : at + len(key) + 60])
            at = data.find(key, at + 1)


def test_the_same_inputs_give_the_same_bits(tool: Tool, tmp_path: Path) -> None:
    disk = Path(tool("build", "--safe").stdout.strip())
    # the store's image, made again in a cache of its own on the same base
    tool.cache = tmp_path / "cache"
    tool.cache.mkdir()
    (tool.cache / "debian").symlink_to(disk.parents[2] / "debian")
    again = Path(tool("build", "--safe").stdout.strip())
    assert again != disk
    assert files.digest_file(again) == files.digest_file(disk)
    # so whoever signed the one vouches for the other
    manifests = [(d.parent / "image.json").read_bytes() for d in (disk, again)]
    assert manifests[0] == manifests[1]


def test_an_image_that_nobody_signed_is_made_again(tool: Tool, tmp_path: Path) -> None:
    disk = Path(tool("build", "--safe").stdout.strip())
    tool.cache = tmp_path / "cache"
    copy = tool.cache / "images" / disk.parent.name
    shutil.copytree(disk.parent, copy)
    (tool.cache / "debian").symlink_to(disk.parents[2] / "debian")
    for path in (copy / "signatures").iterdir():
        path.unlink()
    with (copy / "vmlinuz").open("r+b") as f:
        f.write(b"evil")
    done = tool("build", "--safe")
    assert done.stderr.count(f"image {copy.name} is not signed: making it again") == 1
    assert (copy / "vmlinuz").read_bytes() == (disk.parent / "vmlinuz").read_bytes()
    assert "signed by this workspace" in tool("image", "verify", copy.name).stdout
    # what was signed and is another now is evidence, and stays
    with (copy / "vmlinuz").open("r+b") as f:
        f.write(b"evil")
    refused = tool("build", "--safe", code=1)
    assert "vmlinuz is not what was signed" in refused.stderr
    assert f"mv {copy} ELSEWHERE" in refused.stderr
    assert (copy / "vmlinuz").read_bytes()[:4] == b"evil"


def test_a_compressed_image_is_small(tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "rave.qcow2"
    tool("build", "--safe", "--compress", "-o", str(out))
    assert out.stat().st_size <= COMPRESSED_BYTES
    subprocess.run(["qemu-img", "check", "-q", out], check=True)


def test_a_lock_of_other_parts_is_held_against_the_mirror(tool: Tool) -> None:
    tool("build", "--safe")
    lock = tool.workspace / "rave.lock"
    locked = json.loads(lock.read_text())
    row = next(r for r in locked["packages"] if r[0] == "nginx")
    row[1] = "1.0-never"
    lock.write_text(json.dumps(locked))
    done = tool("build", "--safe", "--locked", code=1)
    assert re.search(r"\| nginx: 1\.0-never -> \d", done.stderr)
    assert "1 part of the image drifted" in done.stderr
    assert "fix:" in done.stderr
    assert json.loads(lock.read_text()) == locked, "a refused build changes nothing"
    # the cache is as good as before
    assert "was there already" in tool("build", "--safe").stderr


# --- bad days ------------------------------------------------------------------------------------


@pytest.fixture
def cold(tool: Tool, tmp_path: Path) -> Tool:
    tool.cache = tmp_path / "cache"
    return tool


def leftovers(cache: Path) -> list[str]:
    """What of a build is still there: mounts, processes, half-made folders."""
    found = [str(m) for m in files.mount_points() if cache in m.parents]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if str(cache) in words and "ravectl build" not in words:
                    found.append(words)
    published = [*cache.glob("debian/base-*"), *cache.glob("images/*/disk.*")]
    return found + [str(p) for p in published]


def wait_until(what: str, happened: object, seconds: float = 120) -> None:
    assert callable(happened)
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ravectl_dies_during_a_build(cold: Tool, number: signal.Signals) -> None:
    cache = cold.cache
    assert cache is not None
    running = cold.start("build", "--safe")
    # in the middle of it: packages are being unpacked
    wait_until("unpacking", lambda: any(cache.glob("debian/making.*/base/root/usr/bin/dpkg")))
    running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == (130 if number is signal.SIGINT else -signal.SIGKILL)
    wait_until("the end of everything", lambda: not leftovers(cache), 20)
    if number is signal.SIGINT:
        assert not list(cache.glob("debian/making.*"))
        return
    # what the killed one could not clear away, the next one does
    refused = cold("build", "--safe", code=1, env={"RAVECTL_DEBIAN_MIRROR": "http://127.0.0.1:9/"})
    assert "mmdebstrap failed" in refused.stderr
    assert not list(cache.glob("debian/making.*"))


@contextlib.contextmanager
def silent_mirror() -> Iterator[str]:
    """A server that takes connections and requests and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        taken = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept())

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/debian"
        listener.shutdown(socket.SHUT_RDWR)
        for connection, _ in taken:
            connection.close()


def test_a_mirror_that_stops_answering(cold: Tool) -> None:
    with silent_mirror() as mirror:
        done = cold(
            "build", "--safe", code=1, seconds=400,
            env={"RAVECTL_DEBIAN_MIRROR": mirror, "no_proxy": "127.0.0.1"},
        )  # fmt: skip
    assert re.search("mmdebstrap failed|the mirror sent nothing", done.stderr)
    assert "check that the mirror answers" in done.stderr
    assert cold.cache is not None
    assert not leftovers(cold.cache)


@contextlib.contextmanager
def failing_mirror(packages: int) -> Iterator[tuple[str, list[str]]]:
    """The host's mirror, but after some packages it says nothing more; what was asked for."""
    asked: list[str] = []
    over = threading.Event()

    class Relay(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            if sum(p.endswith(".deb") for p in asked) > packages:
                over.wait()
                return
            try:
                with urllib.request.urlopen(debian.host_mirror() + self.path, timeout=60) as answer:
                    body, code = answer.read(), answer.status
            except urllib.error.HTTPError as e:
                body, code = e.read(), e.code
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            over.set()
            server.shutdown()


def test_a_mirror_that_stops_in_the_middle(cold: Tool) -> None:
    with failing_mirror(20) as (mirror, asked):
        done = cold(
            "build", "--safe", code=1, seconds=150,
            env={"RAVECTL_DEBIAN_MIRROR": mirror, "no_proxy": "127.0.0.1"},
        )  # fmt: skip
    assert sum(p.endswith(".deb") for p in asked) > 20
    assert "the mirror sent nothing for" in done.stderr
    assert "check that the mirror answers" in done.stderr
    assert cold.cache is not None
    assert not leftovers(cold.cache)


def test_a_full_disk(cold: Tool, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", small], check=True)
    try:
        cold.cache = small / "cache"
        done = cold("build", "--safe", code=4)
    finally:
        subprocess.run(["umount", small], check=True)
    assert "needs 3072 MB on the disk" in done.stderr
    assert "RAVECTL_CACHE_DIR" in done.stderr


def test_without_rights(cold: Tool) -> None:
    # in a user namespace of one ordinary user: root's files stay readable, rights are gone
    probe = ["unshare", "--user", "--map-user=1000", "true"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("this host allows no user namespaces")
    assert cold.cache is not None
    done = subprocess.run(
        ["unshare", "--user", "--map-user=1000", "--", sys.executable, "-m", "ravectl", "build"],
        env=cold.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "needs root" in done.stderr
    assert "sudo" in done.stderr


@pytest.mark.parametrize("program", ["mmdebstrap", "npm"])
def test_a_program_is_missing(cold: Tool, tmp_path: Path, program: str) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for path in Path("/usr/bin").iterdir():
        if path.name != program:
            (tools / path.name).symlink_to(path)
    done = cold("build", "--safe", code=4, env={"PATH": str(tools)})
    assert f"{program} is not installed" in done.stderr
    assert "ravectl doctor" in done.stderr


def test_two_builds_at_once_make_one_image(tool: Tool, tmp_path: Path) -> None:
    disk = Path(tool("build", "--safe").stdout.strip())
    tool.cache = tmp_path / "cache"
    tool.cache.mkdir()
    (tool.cache / "debian").symlink_to(disk.parents[2] / "debian")
    running = [tool.start("build") for _ in range(2)]
    said = [r.communicate(timeout=300) for r in running]
    assert [r.returncode for r in running] == [0, 0], said
    assert said[0][0] == said[1][0]
    made = [bool(re.search(r"^image \w+ is made$", err, re.M)) for _, err in said]
    assert sorted(made) == [False, True]
    folder = Path(said[0][0].strip()).parent
    assert images.load(folder).digest == folder.name
