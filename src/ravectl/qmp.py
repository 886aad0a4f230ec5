"""QMP: how QEMU is asked and told things, over a unix socket of the instance.

Synchronous and small on purpose: a command, its answer, a deadline. The protocol is QEMU's
docs/interop/qmp-spec.txt.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from ravectl.errors import DeadlineError, RavectlError

TIMEOUT_SECONDS = 10.0
MAX_MESSAGE = 2**20


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """A name for the socket `path` that fits in the 108 bytes of a unix address."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def listen(path: Path) -> socket.socket:
    """A listening unix socket at `path` (only its owner may connect), for QEMU to inherit."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    try:
        # through a private folder, so there is no moment at which others could connect
        with short_path(path) as name:
            sock.bind(name)
        path.chmod(0o600)
        sock.listen(4)
    except BaseException:
        sock.close()
        raise
    return sock


class Monitor:
    """A connection to a running QEMU; use as a context manager."""

    def __init__(self, path: Path, timeout: float = TIMEOUT_SECONDS) -> None:
        """Connect and shake hands within `timeout` seconds.

        Raises ConnectionError when nothing listens, RavectlError when what listens is no QMP,
        DeadlineError when it says nothing.
        """
        self._rest = b""
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(timeout)
        try:
            with short_path(path) as name:
                self._sock.connect(name)
            if "QMP" not in self._receive(time.monotonic() + timeout):
                raise _not_qmp()
            self.ask("qmp_capabilities", timeout=timeout)
        except TimeoutError:
            self._sock.close()
            raise _silent() from None
        except OSError as e:
            self._sock.close()
            raise ConnectionError(f"QEMU's monitor cannot be reached: {e.strerror}") from None
        except BaseException:
            self._sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sock.close()

    def ask(self, command: str, *, timeout: float = TIMEOUT_SECONDS, **arguments: Any) -> Any:
        """Run a QMP command and return what it answers.

        Raises RavectlError when QEMU refuses it, DeadlineError, ConnectionError when QEMU ends.
        """
        deadline = time.monotonic() + timeout
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
            while True:
                answer = self._receive(deadline)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    why = str(answer["error"].get("desc", "no reason given"))
                    raise RavectlError(f"QEMU refused {command}: {why}", "see qemu.log")
        except TimeoutError:
            raise _silent() from None
        except OSError as e:
            raise ConnectionError(f"QEMU's monitor is gone: {e.strerror or e}") from None

    def human(self, line: str) -> str:
        """Run a command of the human monitor, for what QMP has no command of its own."""
        arguments: dict[str, Any] = {"command-line": line}
        return str(self.ask("human-monitor-command", **arguments))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._sock.settimeout(left)
            data = self._sock.recv(65536)
            if not data:
                raise ConnectionError("QEMU closed its monitor")
            self._rest += data
            if len(self._rest) > MAX_MESSAGE:
                raise _not_qmp()
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            raise _not_qmp() from None
        if not isinstance(message, dict):
            raise _not_qmp()
        return message


def _not_qmp() -> RavectlError:
    return RavectlError("what answers on the monitor socket is not QEMU", "ravectl status")


def _silent() -> DeadlineError:
    return DeadlineError("QEMU does not answer on its monitor", "stop it: ravectl down")
