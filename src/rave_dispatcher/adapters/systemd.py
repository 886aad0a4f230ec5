"""What systemd offers a service: readiness, the watchdog, sockets that outlive it."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

FIRST_FD = 3
CONSOLE = "console"  # the name of the descriptor


class Notifier:
    """sd_notify(3). Says nothing where systemd does not listen."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog = os.environ.pop("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(watchdog) / 1e6 if watchdog.isdigit() else None

    def say(self, *lines: str) -> None:
        """Send lines such as READY=1."""
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):
            address = "\0" + address[1:]
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s,
        ):
            s.sendto("\n".join(lines).encode(), address)


@dataclass(frozen=True)
class Sockets:
    """Where the service listens: for all, and for the ingress on behalf of who signed in."""

    api: list[socket.socket]
    console: list[socket.socket]


def inherited_sockets() -> Sockets:
    """The listening sockets that systemd handed over (sd_listen_fds_with_names(3)).

    The console's is told by its name, FileDescriptorName= in its unit: what comes without a
    name is never taken for it.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    found = Sockets([], [])
    if pid != str(os.getpid()) or not count.isdigit():
        return found
    for number in range(int(count)):
        os.set_inheritable(FIRST_FD + number, False)
        s = socket.socket(fileno=FIRST_FD + number)
        console = names[number : number + 1] == [CONSOLE] and s.family == socket.AF_UNIX
        (found.console if console else found.api).append(s)
    return found


def bind_private(path: Path) -> socket.socket:
    """A listening unix socket of our own, which only our user can open."""
    path.unlink(missing_ok=True)
    s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        s.bind(str(path))
    finally:
        os.umask(before)
    s.listen(128)
    return s


def bind(host: str, port: int) -> socket.socket:
    """A listening socket of our own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((host, port))
    s.listen(1024)
    return s
