"""One connection of a closed machine to its log receiver. QEMU starts this once for each.

Run by path, as a program: it imports nothing of ravectl, which may be gone by then. Standard
input is QEMU's end of the connection; the receiver is named by its arguments, host and port.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

CONNECT_SECONDS = 30.0
CHUNK = 2**16  # bytes


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Move bytes until `source` has no more, and say so to `sink`."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def main(host: str, port: int) -> int:
    """Join standard input with the receiver; 1 when that does not answer."""
    with socket.socket(fileno=0) as near:
        try:
            far = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        except OSError:
            return 1  # QEMU closes the machine's connection, and the machine tries again
        with far:
            far.settimeout(None)
            back = threading.Thread(target=pump, args=(far, near), daemon=True)
            back.start()
            pump(near, far)
            back.join()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
