"""Secrets in files, re-read when they change: a rotation needs no restart.

NAME holds the value, NAME.previous the one before the last rotation, which counts until the
time in NAME.previous-until (seconds of the epoch).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_Signature = tuple[tuple[int, int, int] | None, ...]


class SecretFiles:
    """The secrets below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._root = folder, str(folder)
        self._known: dict[str, tuple[_Signature, bytes | None, bytes | None, float]] = {}

    def current(self, name: str) -> bytes | None:
        """The value, or None when there is none."""
        return self._read(name)[0]

    def accepted(self, name: str) -> tuple[bytes, ...]:
        """All values that count now, the current one first."""
        value, previous, until = self._read(name)
        found = (value,) if value else ()
        return (*found, previous) if previous and time.time() < until else found

    def _read(self, name: str) -> tuple[bytes | None, bytes | None, float]:
        base = f"{self._folder}/{name}"  # plain text: this is asked for each request
        # files are only ever replaced, which shows in their folder
        signature = (_signature(base), _signature(self._root))
        known = self._known.get(name)
        if known is None or known[0] != signature:
            ends_of = ("", ".previous", ".previous-until")
            value, previous, until = (_content(base + end) for end in ends_of)
            ends = float(until) if until and until.isdigit() else 0.0
            known = self._known[name] = (signature, value, previous, ends)
        return known[1:]


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return (state.st_ino, state.st_mtime_ns, state.st_size)


def _content(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes().strip() or None
    except OSError:
        return None
