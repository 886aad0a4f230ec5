"""What a server's first bytes say, from the real OpenSSH and from none."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from ravectl import ssh
from ravectl.verify import sshprobe


@pytest.fixture(scope="module")
def greeting(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The first bytes of an sshd (`sshd -i` speaks on its standard input and output)."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    assert sshd, "openssh-server is needed for the tests"
    folder = tmp_path_factory.mktemp("sshd")
    key = folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    config = folder / "config"
    config.write_text(
        f"HostKey {key}\nUsePAM no\nKexAlgorithms curve25519-sha256\n"
        "Ciphers aes256-gcm@openssh.com\nMACs hmac-sha2-512-etm@openssh.com\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd shuts itself in
    done = subprocess.run(
        [sshd, "-i", "-f", config], input=b"SSH-2.0-probe\r\n", capture_output=True, timeout=20,
        check=False,
    )  # fmt: skip
    assert done.stdout.startswith(b"SSH-2.0-OpenSSH"), done.stderr
    return done.stdout


def test_the_offer_is_read(greeting: bytes) -> None:
    offer = sshprobe.offered(greeting)
    assert offer is not None
    assert "curve25519-sha256" in offer["kexalgorithms"]
    assert offer["hostkeyalgorithms"] == ["ssh-ed25519"]
    assert offer["ciphers-in"] == offer["ciphers-out"] == ["aes256-gcm@openssh.com"]
    assert offer["macs-in"] == offer["macs-out"] == ["hmac-sha2-512-etm@openssh.com"]


def test_lines_may_come_first(greeting: bytes) -> None:
    assert sshprobe.offered(b"welcome\r\nbe good\r\n" + greeting) == sshprobe.offered(greeting)


def test_no_offer(greeting: bytes) -> None:
    start = greeting.index(b"\n") + 1
    for cut in range(start + 200):
        assert sshprobe.offered(greeting[:cut]) is None
    assert sshprobe.offered(b"HTTP/1.1 400 Bad Request\r\n\r\n") is None
    assert sshprobe.offered(b"x\n" * 20 + greeting) is None
    # lengths that lie
    body = bytearray(greeting)
    body[start + 22 : start + 26] = b"\xff\xff\xff\xff"
    assert sshprobe.offered(bytes(body)) is None


def test_who_is_blocked_is_told_when_to_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says what sshd says in place of its version, while it blocks an address."""
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    monkeypatch.setattr(ssh, "BLOCK_SECONDS", 1)
    monkeypatch.setattr(ssh, "BLOCKED_POLL_SECONDS", 0.1)
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    asked.append(1)
                    client.sendall(b"Not allowed at this time\r\n")
                    client.close()

        threading.Thread(target=refuse, daemon=True).start()
        public = key.with_suffix(".pub").read_text()
        target = ssh.Target(server.getsockname()[1], "rave", key, (public,))
        with pytest.raises(ssh.BlockedError, match="takes no SSH login now"):
            ssh.Connection(target, 5)
        row = sshprobe.try_stranger(target, "rave", 5)[1]
        server.shutdown(socket.SHUT_RDWR)
    assert len(asked) > 2, "it is tried again until the block should have ended"
    assert row["error"] == sshprobe.LOCKED_OUT
