"""A connection's streams, with the real OpenSSH at the other end."""

from __future__ import annotations

import dataclasses
import errno
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ravectl import credentials, ssh
from ravectl.errors import DeadlineError, RavectlError
from ravectl.model import SecretKind

OTHER_KEY = credentials.ssh_public(credentials.new_value(SecretKind.SSH_KEY))


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ssh.Connection]:
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    assert sshd, "openssh-server is needed for the tests"
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
        subprocess.run(argv, check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "config"
    config.write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder / 'host'}\nUsePAM no\n"
        f"PermitRootLogin yes\nStrictModes no\nAuthorizedKeysFile {folder / 'user.pub'}\n"
        "PidFile none\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd shuts itself in
    host_key = (folder / "host.pub").read_text()
    target = ssh.Target(port, getpass.getuser(), folder / "user", (host_key,))
    with subprocess.Popen([sshd, "-D", "-e", "-f", config], stderr=subprocess.DEVNULL) as server:
        try:
            with ssh.connect_when_ready(target, time.monotonic() + 60, lambda: True) as made:
                yield made
        finally:
            server.terminate()


def run(connection: ssh.Connection, command: str, fd: int, timeout: float) -> tuple[int, bytes]:
    out = bytearray()
    read = lambda: os.read(fd, 2**16)  # noqa: E731
    code = connection.relay(command, out.extend, out.extend, stdin=read, timeout=timeout)
    return code, bytes(out)


def test_a_command_does_not_wait_for_the_end_of_a_pipe(connection: ssh.Connection) -> None:
    near, far = os.pipe()
    try:
        assert run(connection, "exit 3", near, 60) == (3, b"")
        with pytest.raises(DeadlineError):
            run(connection, "cat", near, 0.5)
    finally:
        os.close(far)  # ends those who read
        time.sleep(0.1)
        os.close(near)


def test_a_remedy_names_the_machine(connection: ssh.Connection) -> None:
    other = dataclasses.replace(connection.target, flag=" --name two", host_keys=(OTHER_KEY,))
    with pytest.raises(ssh.HostKeyError) as e:
        ssh.Connection(other)
    assert e.value.hint.endswith("ravectl down --name two, then ravectl up --name two")


def test_what_is_piped_arrives_whole(connection: ssh.Connection, tmp_path: Path) -> None:
    with (tmp_path / "large").open("w+b") as file:
        file.truncate(5 * 2**20)
        assert run(connection, "wc -c", file.fileno(), 60)[1].strip() == str(5 * 2**20).encode()
    assert connection.run("cat", stdin=b"words").stdout == "words"
    assert connection.run("cat").stdout == ""


def test_half_of_the_input_is_not_taken_for_all_of_it(connection: ssh.Connection) -> None:
    pieces = iter([b"half"])

    def read() -> bytes:
        for piece in pieces:
            return piece
        raise OSError(errno.EIO, "Input/output error")

    out = bytearray()
    with pytest.raises(RavectlError, match="input broke off: Input/output error"):
        connection.relay("cat", out.extend, out.extend, stdin=read, timeout=60)
    assert out == b"half"
