"""The relay as QEMU starts it: a socket as standard input, a real connection on the other side."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading

from ravectl import qemu


def relay(port: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-I", "-S", qemu.relay_file(), "127.0.0.1", str(port)]
    with theirs:
        return subprocess.Popen(words, stdin=theirs, stdout=theirs), ours


def test_bytes_and_ends_pass_both_ways() -> None:
    asked, data = bytearray(), bytes(range(256)) * 4096
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            far, _ = server.accept()
            with far:
                while piece := far.recv(65536):
                    asked.extend(piece)
                far.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        process, ours = relay(server.getsockname()[1])
        with ours:
            ours.settimeout(20)
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
            got = bytearray()
            while piece := ours.recv(65536):
                got.extend(piece)
        thread.join(20)
        assert process.wait(20) == 0
    assert bytes(asked) == bytes(got) == data


def test_a_receiver_that_is_away_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process, ours = relay(port)
    with ours:
        ours.settimeout(20)
        assert ours.recv(1) == b""
    assert process.wait(20) == 1
