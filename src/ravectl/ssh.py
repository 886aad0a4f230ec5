"""SSH to a machine whose host key is known before the first packet (paramiko).

The host key is pinned: it was made on this side and handed to the guest, so there is no
"trust on first use" and nothing is ever added. One connection serves any number of commands,
also in parallel, because a new one costs over a second under TCG.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import paramiko

from ravectl.errors import DeadlineError, RavectlError
from ravectl.model import BLOCK_SECONDS

# paramiko logs a traceback for every handshake that fails, and a booting machine fails some;
# what went wrong is in the exceptions that we raise
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)

HOST = "127.0.0.1"
# What sshd's MaxSessions allows on one connection by default (sshd_config(5)), less a margin.
MAX_CHANNELS = 8
MAX_ERROR = 2**14  # bytes that are kept of what a streamed command says to stderr
POLL_SECONDS = 0.1
BLOCKED_POLL_SECONDS = 1.0  # what is refused costs the guest next to nothing
MAX_RECORDED = 65536  # bytes
UNANNOUNCED_SECONDS = 8.0  # between blind attempts, for machines that announce nothing
ANNOUNCED_PATIENCE = 30.0  # a handshake takes 1.2 s under TCG, more on a loaded host


class RefusedError(RavectlError):
    """Our machine answers and does not let our key in."""


class HostKeyError(RavectlError):
    """Something else than our machine answers on its port."""


class BlockedError(RavectlError):
    """Our machine takes no new login for a while, since too many failed (PerSourcePenalties)."""


@dataclass(frozen=True)
class RemoteResult:
    """What a remote command left."""

    command: str
    returncode: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class RemoteEnd:
    """How a streamed command ended. A returncode of -1: its connection did."""

    returncode: int
    stderr: str


@dataclass(frozen=True)
class Target:
    """Where to connect, as whom, with which key, and which host keys may answer."""

    port: int
    user: str
    key_file: Path
    host_keys: tuple[str, ...]  # "ssh-ed25519 AAAA..."; several while they are rotated
    flag: str = ""  # what a command line needs so that this machine is meant

    @property
    def known_hosts(self) -> str:
        """The lines that OpenSSH's known_hosts needs for this machine."""
        return "".join(f"[{HOST}]:{self.port} {' '.join(k.split()[:2])}\n" for k in self.host_keys)


class Connection:
    """An authenticated connection; use as a context manager."""

    def __init__(self, target: Target, timeout: float = 15.0) -> None:
        """Connect within `timeout` seconds, and those that a block after failed logins lasts.

        Raises ConnectionError (the machine does not answer yet), HostKeyError, BlockedError, or
        RavectlError (it answers and refuses us).
        """
        self.target = target
        self._slots = threading.BoundedSemaphore(MAX_CHANNELS)
        self._transport = _connect_unblocked(target, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; no error when it is gone already."""
        with contextlib.suppress(Exception):
            self._transport.close()

    @property
    def alive(self) -> bool:
        """Whether the connection still stands."""
        return self._transport.is_active()

    def relay(
        self,
        command: str,
        on_out: Callable[[bytes], None],
        on_err: Callable[[bytes], None],
        *,
        stdin: bytes | Callable[[], bytes] = b"",
        timeout: float = 60.0,
    ) -> int:
        """Run a command, pass on what it prints as it comes, and return its exit code.

        `stdin` may be a function that reads a piece of it, empty at the end, for what is large
        or comes slowly; nobody waits for it when the command has ended. Raises DeadlineError,
        ConnectionError when the connection breaks, RavectlError when `stdin` raises an OSError.
        """
        deadline = time.monotonic() + timeout
        with self._slots, self._channel(timeout) as channel:
            channel.exec_command(command)
            broken: list[OSError] = []
            feeder = threading.Thread(target=_feed, args=(channel, stdin, broken), daemon=True)
            feeder.start()
            _pump(channel, on_out, on_err, deadline, command)
            if broken:
                raise RavectlError(
                    f"the command's input broke off: {broken[0].strerror}",
                    "it had a part of it only: see to where the rest is, and run it again",
                )
            return channel.recv_exit_status()

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout: float = 60.0,
        check: bool = False,
    ) -> RemoteResult:
        """Run a command (a list is quoted for the remote shell) and return what it printed.

        `timeout` is in seconds. Raises DeadlineError, ConnectionError when the connection
        breaks, and RavectlError when the command fails and `check` is set.
        """
        text = command if isinstance(command, str) else shlex.join(command)
        started = time.monotonic()
        out, err = bytearray(), bytearray()
        code = self.relay(text, out.extend, err.extend, stdin=stdin, timeout=timeout)
        result = RemoteResult(
            text, code, out.decode(errors="replace"), err.decode(errors="replace"),
            time.monotonic() - started,
        )  # fmt: skip
        if check and code != 0:
            raise RavectlError(
                f"a command in the machine failed (exit {code}): {text[:120]}",
                "look at the machine's journal: ravectl logs",
                details="\n".join((result.stderr or result.stdout).splitlines()[-15:]),
            )
        return result

    def stream(
        self,
        command: str,
        on_line: Callable[[str], bool],
        *,
        deadline: float = math.inf,
        stdin: bytes = b"",
        silence: float = math.inf,
    ) -> RemoteEnd | None:
        """Run a command and hand each line of its output to `on_line` until that returns False.

        `deadline` is a time.monotonic() value; DeadlineError when it passes. The command's
        standard input stays open after `stdin`, so it sees its end when nobody listens any
        more. When nothing comes for `silence` seconds, or the connection breaks, that is a
        ConnectionError. Returns how the command ended, None when it was left.
        """
        rest = bytearray()
        wanted = True
        heard = time.monotonic()

        def take(data: bytes) -> None:
            nonlocal wanted, heard
            heard = time.monotonic()
            rest.extend(data)
            while wanted and (end := rest.find(b"\n")) >= 0:
                line = rest[:end].decode(errors="replace")
                del rest[: end + 1]
                wanted = on_line(line)

        def goes_on() -> bool:
            if time.monotonic() - heard > silence:
                raise ConnectionError(f"the machine said nothing for {silence:.0f} s")
            return wanted

        error = bytearray()

        def keep(data: bytes) -> None:
            error.extend(data)
            del error[:-MAX_ERROR]

        patience = min(max(deadline - time.monotonic(), 0.1), ANNOUNCED_PATIENCE)
        with self._slots, self._channel(patience) as channel:
            channel.exec_command(command)
            if stdin:
                channel.sendall(stdin)
            _pump(channel, take, keep, deadline, command, goes_on)
            if not wanted:
                return None
            return RemoteEnd(channel.recv_exit_status(), error.decode(errors="replace"))

    @contextlib.contextmanager
    def _channel(self, timeout: float) -> Iterator[paramiko.Channel]:
        try:
            channel = self._transport.open_session(timeout=timeout)
        except (paramiko.SSHException, OSError, EOFError) as e:
            raise ConnectionError(f"the SSH connection is gone: {e}") from None
        try:
            yield channel
        except (paramiko.SSHException, EOFError) as e:
            raise ConnectionError(f"the SSH connection broke: {e}") from None
        finally:
            channel.close()


def connect_when_ready(
    target: Target, deadline: float, announced: Callable[[], bool]
) -> Connection:
    """Connect to a machine that is booting; `deadline` is a time.monotonic() value.

    `announced` tells whether the machine has said that its SSH server listens; it is called
    often and may raise to end the wait. QEMU accepts connections long before the guest does
    and hands every one of them over later, each then costing the guest a process: so there
    are few attempts before the announcement. Raises DeadlineError, HostKeyError, or
    RavectlError when the machine refuses us.
    """
    next_try = time.monotonic() + UNANNOUNCED_SECONDS
    while (now := time.monotonic()) < deadline:
        said = announced()
        if not said and now < next_try:
            time.sleep(POLL_SECONDS)
            continue
        patience = ANNOUNCED_PATIENCE if said else UNANNOUNCED_SECONDS
        try:
            return Connection(target, min(patience, max(deadline - now, 1.0)))
        except ConnectionError:
            next_try = time.monotonic() + UNANNOUNCED_SECONDS
            time.sleep(POLL_SECONDS)
    raise DeadlineError(
        f"no SSH server answered on port {target.port} in time",
        f"see what the machine says: ravectl console{target.flag}",
    )


def is_pinned(target: Target, seen: paramiko.PKey) -> bool:
    """Whether a server's key is one that must answer."""
    return f"{seen.get_name()} {seen.get_base64()}" in {
        " ".join(k.split()[:2]) for k in target.host_keys
    }


def _connect_unblocked(target: Target, timeout: float) -> paramiko.Transport:
    """Connect, waiting for a block's end: behind QEMU's network everybody's is ours, too."""
    end = time.monotonic() + BLOCK_SECONDS
    while True:
        try:
            return _connect(target, timeout)
        except BlockedError:
            if time.monotonic() > end:
                raise
        time.sleep(BLOCKED_POLL_SECONDS)


class RecordingSocket:
    """A socket that keeps the first bytes it receives: paramiko shows neither the server's KEXINIT
    nor what it says in place of its version."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.received = b""

    def recv(self, size: int) -> bytes:
        """What socket.recv() returns."""
        data = self._sock.recv(size)
        if len(self.received) < MAX_RECORDED:
            self.received += data
        return data

    @property
    def blocked(self) -> bool:
        """Whether sshd has said that it refuses this address for a while."""
        return b"Not allowed at this time" in self.received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _connect(target: Target, timeout: float) -> paramiko.Transport:
    sock = RecordingSocket(socket.create_connection((HOST, target.port), timeout=timeout))
    transport = paramiko.Transport(sock)  # type: ignore[arg-type]
    transport.banner_timeout = timeout
    transport.auth_timeout = timeout
    transport.get_security_options().key_types = tuple({k.split()[0] for k in target.host_keys})
    try:
        transport.start_client(timeout=timeout)
        seen = transport.get_remote_server_key()
        if not is_pinned(target, seen):
            raise HostKeyError(
                f"port {target.port} is answered by a machine with another SSH host key",
                _taken(target),
            )
        key = paramiko.Ed25519Key.from_private_key_file(str(target.key_file))
        transport.auth_publickey(target.user, key)
    except paramiko.AuthenticationException:
        transport.close()
        raise RefusedError(
            f"the machine refused the key of {target.user}",
            "end a rotation that was cut short: ravectl secrets deliver; else hand the key of "
            f"today over: ravectl down{target.flag}; ravectl up{target.flag}",
        ) from None
    except paramiko.ssh_exception.IncompatiblePeer as e:
        transport.close()
        raise HostKeyError(
            f"port {target.port} is answered by a machine without our SSH host key ({e})",
            _taken(target),
        ) from None
    except (paramiko.SSHException, OSError, EOFError) as e:
        transport.close()
        if sock.blocked:
            raise BlockedError(
                "the machine takes no SSH login now: several failed shortly before",
                f"end what tries to log in to 127.0.0.1:{target.port}, then try again in "
                f"{BLOCK_SECONDS} s; sessions that are open go on",
            ) from None
        raise ConnectionError(f"no SSH on port {target.port}: {e}") from None
    except BaseException:
        transport.close()
        raise
    transport.set_keepalive(15)
    return transport


def _taken(target: Target) -> str:
    flag = target.flag
    return f"another program has taken the port: ravectl down{flag}, then ravectl up{flag}"


def _feed(
    channel: paramiko.Channel, data: bytes | Callable[[], bytes], broken: list[OSError]
) -> None:
    pieces = iter([data] if data else []) if isinstance(data, bytes) else iter(data, b"")
    while True:
        try:
            piece = next(pieces, None)
        except OSError as e:
            broken.append(e)  # the command takes it for the end: SSH has no word for this
            piece = None
        with contextlib.suppress(OSError):
            if piece is not None:
                channel.sendall(piece)
                continue
            channel.shutdown_write()
        return


def _pump(
    channel: paramiko.Channel,
    on_out: Callable[[bytes], None],
    on_err: Callable[[bytes], None],
    deadline: float,
    what: str,
    wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Move output until the command ends, nobody wants more, or the deadline passes."""
    while wanted():
        moved = False
        if channel.recv_ready():
            on_out(channel.recv(65536))
            moved = True
        if channel.recv_stderr_ready():
            on_err(channel.recv_stderr(65536))
            moved = True
        if moved:
            continue
        if channel.exit_status_ready() and (channel.eof_received or channel.closed):
            if not channel.recv_ready() and not channel.recv_stderr_ready():
                return
            continue
        if channel.closed:
            raise ConnectionError("the SSH connection broke while a command ran")
        if time.monotonic() > deadline:
            raise DeadlineError(
                f"a command in the machine did not finish in time: {what[:80]}",
                "look at the machine's load: ravectl status",
            )
        channel.status_event.wait(0.005)
