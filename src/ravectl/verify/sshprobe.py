"""What a stranger learns from the machine's SSH server, and that it lets none in.

The algorithms are read from the server's own KEXINIT packet (RFC 4253, 7.1), so they are those
of the daemon that runs, whatever its configuration file says by now.
"""

from __future__ import annotations

import contextlib
import io
import secrets
import socket
import struct
from collections.abc import Callable
from typing import Any

import paramiko
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from ravectl.ssh import HOST, RecordingSocket, Target, is_pinned

KEXINIT = 20
NAME_LISTS = (
    "kexalgorithms", "hostkeyalgorithms", "ciphers-in", "ciphers-out", "macs-in", "macs-out",
)  # fmt: skip
REFUSED, LET_IN = "refused", "let in"
LOCKED_OUT = "sshd refuses this host for some seconds, as it does after failed logins"


def offered(received: bytes) -> dict[str, list[str]] | None:
    """The algorithms that a server offers, from the first bytes it sent; None: not SSH."""
    rest = received
    for _ in range(10):  # lines may come before the version (RFC 4253, 4.2)
        line, newline, rest = rest.partition(b"\n")
        if not newline:
            return None
        if line.startswith(b"SSH-"):
            break
    else:
        return None
    try:
        length, padding, kind = struct.unpack_from(">IBB", rest)
        body = rest[6 : 4 + length - padding]
        if kind != KEXINIT or len(rest) < 4 + length:
            return None
        lists, at = [], 16  # after the cookie
        for _ in NAME_LISTS:
            (size,) = struct.unpack_from(">I", body, at)
            if at + 4 + size > len(body):
                return None
            lists.append(body[at + 4 : at + 4 + size].decode("ascii").split(","))
            at += 4 + size
    except (struct.error, UnicodeDecodeError):
        return None
    return dict(zip(NAME_LISTS, lists, strict=True))


def try_password(target: Target, user: str, timeout: float) -> list[dict[str, object]]:
    """Try a password that is not one, then the key: records of the offer and of the answer.

    The key comes last because sshd locks out, for a while, the address of a connection that
    ends with nothing but failures (PerSourcePenalties), and all hosts look the same to a guest.
    """

    def attempt(transport: paramiko.Transport, row: dict[str, object]) -> None:
        row["methods"] = _methods(transport, user)
        password = secrets.token_urlsafe(16)
        row["outcome"] = _answer(transport.auth_password, user, password, None, False)
        if row["outcome"] == REFUSED:
            row["key"] = _answer(transport.auth_publickey, user, _key(target))

    return _attempt(target, "password", user, attempt, timeout)


def try_key(target: Target, user: str, timeout: float) -> list[dict[str, object]]:
    """Try to log in as `user` with the operator's key."""

    def attempt(transport: paramiko.Transport, row: dict[str, object]) -> None:
        row["outcome"] = _answer(transport.auth_publickey, user, _key(target))

    return _attempt(target, "key", user, attempt, timeout)


def try_stranger(target: Target, user: str, timeout: float) -> list[dict[str, object]]:
    """Try to log in as `user` with a key that nobody knows: a failed login, or a blocked one."""

    def attempt(transport: paramiko.Transport, row: dict[str, object]) -> None:
        key = ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
        stranger = paramiko.Ed25519Key.from_private_key(io.StringIO(key.decode()))
        row["outcome"] = _answer(transport.auth_publickey, user, stranger)

    return _attempt(target, "stranger", user, attempt, timeout)


def _key(target: Target) -> paramiko.PKey:
    return paramiko.Ed25519Key.from_private_key_file(str(target.key_file))


def _methods(transport: paramiko.Transport, user: str) -> list[str]:
    """The methods that the server offers `user` (RFC 4252, 5.2); none when it lets us in."""
    try:
        transport.auth_none(user)
    except paramiko.BadAuthenticationType as e:
        return sorted(e.allowed_types)
    return []


def _answer(authenticate: Any, *arguments: object) -> str:
    """What the server says to credentials; an SSHException when it says nothing."""
    try:
        further = authenticate(*arguments)
    except paramiko.BadAuthenticationType:
        return REFUSED
    except paramiko.AuthenticationException as e:
        # paramiko raises the same when the answer does not come, with another text
        if str(e) == "Authentication failed.":
            return REFUSED
        raise
    return f"let in, and then asked for {', '.join(further)}" if further else LET_IN


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _attempt(
    target: Target,
    how: str,
    user: str,
    attempt: Callable[[paramiko.Transport, dict[str, object]], None],
    timeout: float,
) -> list[dict[str, object]]:
    row: dict[str, object] = {"try": how, "user": user}
    offer: dict[str, object] = {"offer": None}
    sock = RecordingSocket(socket.create_connection((HOST, target.port), timeout=timeout))
    transport = paramiko.Transport(sock)  # type: ignore[arg-type]
    try:
        transport.banner_timeout = transport.auth_timeout = timeout
        transport.start_client(timeout=timeout)
        offer["offer"] = offered(sock.received)
        seen = transport.get_remote_server_key()
        pinned = is_pinned(target, seen)
        row["host_key"] = "pinned" if pinned else "other"
        if pinned:
            attempt(transport, row)
    except (paramiko.SSHException, OSError, EOFError) as e:
        row["error"] = LOCKED_OUT if sock.blocked else _text(e)
    finally:
        with contextlib.suppress(Exception):
            transport.close()
        sock.close()
    return [offer, row]
