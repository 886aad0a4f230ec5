"""What Nix says while it builds (`--log-format internal-json`), as progress and as errors. Pure.

A line is `@nix` and a JSON object: an activity starts, has results, stops; or a message. The
numbers are those of Nix's logging.hh, the same since 2.4. Whatever is not understood is passed
over: a newer Nix may say more.
"""

from __future__ import annotations

import json
import re
from collections import deque
from dataclasses import dataclass, field
from typing import Any

PREFIX = "@nix "
TAIL_LINES = 15  # of a derivation's log, in an error
MAX_ENDED = 256  # activities remembered after they stopped

# kinds of activities
FILE_TRANSFER, REALISE, COPY_PATHS, BUILDS, BUILD, SUBSTITUTE = 101, 102, 103, 104, 105, 108
# kinds of results
BUILD_LOG_LINE, SET_PHASE, PROGRESS, SET_EXPECTED = 101, 104, 105, 106

ERROR, WARNING = 0, 1  # levels of messages
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Activity:
    """Something that Nix is at."""

    kind: int
    path: str  # of the derivation, or what is fetched
    phase: str = ""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))

    @property
    def name(self) -> str:
        """Its name for people: without folder and hash."""
        return derivation_name(self.path)


@dataclass
class Count:
    """How much of something is done."""

    done: int = 0
    expected: int = 0

    def __str__(self) -> str:
        return f"{self.done} of {self.expected}"


class Log:
    """What was said so far; `feed` takes the next line."""

    def __init__(self) -> None:
        self.built = Count()
        self.fetched = Count()  # paths
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.other: deque[str] = deque(maxlen=TAIL_LINES)  # lines that are not in the format
        self.failed: list[Activity] = []
        self._running: dict[int, Activity] = {}
        # that a derivation failed may be said after it stopped
        self._ended: deque[Activity] = deque(maxlen=MAX_ENDED)
        self._bytes: dict[int, int] = {}  # by transfer
        self._expected_bytes = 0

    def feed(self, line: str) -> None:
        """Take a line of Nix's stderr."""
        if not line.startswith(PREFIX):
            if text := plain(line):
                self.other.append(text)
            return
        try:
            event = json.loads(line.removeprefix(PREFIX))
            self._take(event)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return

    def _take(self, event: dict[str, Any]) -> None:
        match event["action"]:
            case "start":
                fields = event.get("fields") or [""]
                self._running[event["id"]] = Activity(event["type"], str(fields[0]))
            case "stop":
                if ended := self._running.pop(event["id"], None):
                    self._ended.append(ended)
            case "result":
                self._result(event["id"], event["type"], event["fields"])
            case "msg":
                # the cause alone where Nix says it apart; `msg` has a trace before it
                text = plain(str(event.get("raw_msg") or event["msg"]))
                if text.strip():
                    self._message(event["level"], text)

    def _result(self, number: int, kind: int, fields: list[Any]) -> None:
        activity = self._running.get(number)
        if activity is None:
            return
        if kind == BUILD_LOG_LINE:
            activity.lines.append(plain(str(fields[0])))
        elif kind == SET_PHASE:
            activity.phase = str(fields[0])
        elif kind == PROGRESS and activity.kind == BUILDS:
            self.built = Count(int(fields[0]), int(fields[1]))
        elif kind == PROGRESS and activity.kind == COPY_PATHS:
            self.fetched = Count(int(fields[0]), int(fields[1]))
        elif kind == PROGRESS and activity.kind == FILE_TRANSFER:
            self._bytes[number] = int(fields[0])
        elif kind == SET_EXPECTED and activity.kind == REALISE and fields[0] == FILE_TRANSFER:
            # it shrinks as transfers end
            self._expected_bytes = max(self._expected_bytes, int(fields[1]))

    def _message(self, level: int, text: str) -> None:
        if level == ERROR:
            self.errors.append(text.removeprefix("error: "))
            builds = [a for a in (*self._running.values(), *self._ended) if a.kind == BUILD]
            self.failed += [a for a in builds if f"'{a.path}'" in text]
        elif level == WARNING:
            self.warnings.append(text.removeprefix("warning: "))

    @property
    def downloaded(self) -> Count:
        """Bytes, of those that Nix expects to download."""
        done = sum(self._bytes.values())
        return Count(done, max(done, self._expected_bytes))

    def status(self) -> str:
        """One line of what is done and what goes on."""
        parts = []
        if self.built.expected:
            parts.append(f"built {self.built}")
        if self.fetched.expected:
            mb = Count(*(n // 2**20 for n in (self.downloaded.done, self.downloaded.expected)))
            parts.append(f"fetched {self.fetched} ({mb} MB)")
        builds = [a for a in self._running.values() if a.kind == BUILD]
        fetches = [a for a in self._running.values() if a.kind == SUBSTITUTE]
        if builds:
            last = builds[-1]
            parts.append(last.name + (f" ({last.phase})" if last.phase else ""))
        elif fetches:
            parts.append(fetches[-1].name)
        return ", ".join(parts)

    def tail(self) -> str:
        """The last lines of the derivation that failed first; else what else was said."""
        if self.failed:
            return "\n".join(self.failed[0].lines)
        return "\n".join(self.other)


def derivation_name(path: str) -> str:
    """`vibe-kanban-0.1` of `/nix/store/<hash>-vibe-kanban-0.1.drv`."""
    base = path.rpartition("/")[2].removesuffix(".drv")
    return re.sub(r"^[0-9a-z]{32}-", "", base)


def plain(text: str) -> str:
    """A text without colours."""
    return _ESCAPES.sub("", text).rstrip()
