"""The machine's journal, line by line, also across a lost connection: nothing twice, no gap.

journalctl prints JSON, whose entries carry their cursor; after a break it goes on behind the
last cursor that was seen whole. Everything but `show` and `find_unit` is pure.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ravectl import lifecycle, reconnect, ssh
from ravectl.errors import RavectlError, UsageError
from ravectl.instance import Instance
from ravectl.model import EngineName, Plan

# what a line for a person is made of; journalctl adds cursor and times itself
FIELDS = ("MESSAGE", "SYSLOG_IDENTIFIER", "_COMM", "_PID", "SYSLOG_PID", "_HOSTNAME")
PRIORITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
CURSOR_LINE = "-- cursor: "
TO_THE_END_SECONDS = 3600.0  # a journal of 1 GB takes minutes under TCG
UNITS_SECONDS = 60.0
_REMEDY = (
    "write times as 'today', '-1h' or '2026-01-31 12:00', priorities as 'err', --grep as a "
    "regular expression: man journalctl"
)


@dataclass(frozen=True)
class Query:
    """What of the journal is wanted, as journalctl's options of the same names take it."""

    unit: str | None = None
    lines: int | None = 100  # None: all
    follow: bool = False
    since: str | None = None
    until: str | None = None
    priority: str | None = None
    grep: str | None = None
    as_json: bool = False


def check(query: Query) -> None:
    """Raise UsageError for a priority that no journalctl would take. Pure.

    A machine's own journalctl says it better; this is for one that does not run.
    """
    for level in (query.priority or "err").split("..", 1):
        if level not in PRIORITIES and not re.fullmatch("[0-7]", level):
            raise UsageError(f"{level!r} is no priority: {', '.join(PRIORITIES)}", _REMEDY)


def arguments(query: Query, after: str | None = None) -> list[str]:
    """The journalctl command; `after` is the cursor behind which it goes on."""
    argv = ["journalctl", "--no-pager", "--quiet", "--all", "--output=json"]
    if not query.as_json:
        argv.append(f"--output-fields={','.join(FIELDS)}")
    named = {
        "unit": query.unit, "until": query.until, "priority": query.priority, "grep": query.grep,
        # of what comes after a cursor all is wanted
        "since": None if after else query.since, "after-cursor": after,
    }  # fmt: skip
    argv += [f"--{name}={value}" for name, value in named.items() if value is not None]
    if query.follow:
        argv.append("--follow")
    argv.append("--no-tail" if after or query.lines is None else f"--lines={query.lines}")
    # --no-tail is about --follow; without it journalctl shows all anyway
    return argv if query.follow else [word for word in argv if word != "--no-tail"]


def command(query: Query, after: str | None = None) -> str:
    """What runs in the machine; before it follows it says where the journal ends now."""
    text = f"sudo -n {shlex.join(arguments(query, after))}"
    if query.follow and after is None:
        # so that a break before the first line loses nothing either
        return f"sudo -n journalctl --quiet --lines=0 --show-cursor; exec {text}"
    return f"exec {text}"


class Reader:
    """Takes journalctl's output and passes on what is to be shown; knows where to go on."""

    def __init__(self, query: Query, put: Callable[[str], None]) -> None:
        self._query, self._put = query, put
        self.cursor: str | None = None

    def take(self, line: str) -> bool:
        """Take a whole line. True: go on."""
        if line.startswith(CURSOR_LINE):
            self.cursor = line.removeprefix(CURSOR_LINE).strip()
            return True
        try:
            entry = json.loads(line)
            cursor = str(entry["__CURSOR"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return True  # not an entry: journalctl's own remark
        self._put(line if self._query.as_json else text_of(entry))
        # only now: what could not be shown was not seen
        self.cursor = cursor
        return True


def text_of(entry: dict[str, Any]) -> str:
    """An entry as journalctl's `short` output has it, in UTC and without control characters."""
    try:
        when = time.gmtime(int(entry.get("__REALTIME_TIMESTAMP", 0)) / 1e6)
        stamp = time.strftime("%b %d %H:%M:%S", when)
    except (ValueError, OverflowError, OSError, TypeError):
        stamp = "-"
    who = _field(entry, "SYSLOG_IDENTIFIER") or _field(entry, "_COMM") or "unknown"
    pid = _field(entry, "SYSLOG_PID") or _field(entry, "_PID")
    head = f"{stamp} {_field(entry, '_HOSTNAME')} {who}{f'[{pid}]' if pid else ''}: "
    first, *more = _field(entry, "MESSAGE", lines=True).split("\n")
    return "\n".join([head + first, *(" " * len(head) + line for line in more)])


def _field(entry: dict[str, Any], name: str, *, lines: bool = False) -> str:
    value = entry.get(name)
    if isinstance(value, list):
        # bytes that are no UTF-8 or not printable, or a field that is there several times
        if all(isinstance(b, int) and 0 <= b < 256 for b in value):
            value = bytes(value).decode(errors="replace")
        else:
            value = value[0]
    text = value if isinstance(value, str) else ""
    kept = "\n\t" if lines else ""
    return "".join(
        c if c in kept or unicodedata.category(c)[0] != "C" else "\ufffd" for c in text.rstrip("\n")
    )


def show(
    instance: Instance,
    query: Query,
    put: Callable[[str], None],
    lost: Callable[[reconnect.Lost], None],
) -> None:
    """Show what the query asks for; one that follows ends by Ctrl-C only.

    Raises RavectlError when journalctl refuses, such as a time that it cannot read.
    """
    reader = Reader(query, put)

    def work(connection: ssh.Connection, worked: Callable[[], None]) -> None:
        def take(line: str) -> bool:
            worked()
            with reconnect.output():
                return reader.take(line)

        end = connection.stream(command(query, reader.cursor), take)
        if end is None or end.returncode < 0 or end.returncode > 128:
            raise ConnectionError("the machine ended the connection")
        raise refusal(end.stderr)

    if query.follow:
        reconnect.stay(instance, work, lost)
    with lifecycle.connection_to(instance) as connection:
        end = connection.stream(
            command(query), reader.take, deadline=time.monotonic() + TO_THE_END_SECONDS
        )
    if end is not None and end.returncode != 0 and end.stderr.strip():
        raise refusal(end.stderr)


def refusal(stderr: str) -> RavectlError:
    """What journalctl said when it would not."""
    said = stderr.strip().splitlines()
    return UsageError(
        f"the machine's journalctl says: {said[-1] if said else 'nothing, and ended'}", _REMEDY
    )


# --- units -------------------------------------------------------------------------------------


def find_unit(instance: Instance, name: str) -> str:
    """The unit that is meant: a service of the Plan, or one that the machine knows.

    Raises UsageError that names the nearest when there is no such unit.
    """
    record = instance.require_record()
    planned = planned_unit(record.plan, record.engine, name)
    if planned is not None or any(c in name for c in "*?["):
        return planned or name
    unit = name if "." in name else f"{name}.service"
    with lifecycle.connection_to(instance) as connection:
        answer = connection.run(
            "sudo -n journalctl --quiet --field=_SYSTEMD_UNIT; "
            "systemctl list-unit-files --no-legend --plain; "
            "systemctl list-units --all --no-legend --plain",
            timeout=UNITS_SECONDS,
        )
    known = {words[0] for line in answer.stdout.splitlines() if (words := line.split())}
    if unit in known:
        return unit
    raise unknown_unit(name, [*(s.name for s in record.plan.services), *sorted(known)])


def planned_unit(plan: Plan, engine: EngineName, name: str) -> str | None:
    """The unit of the service `name` of the Plan, None when it has none."""
    return next((s.unit[engine] for s in plan.services if s.name == name), None)


def unknown_unit(name: str, known: Iterable[str]) -> UsageError:
    """The error for a unit that is not there, with the nearest that is."""
    ordered = list(known)
    names = {k: k for k in ordered} | {k.removesuffix(".service"): k for k in reversed(ordered)}
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {names[near[0]]!r}?" if near else "see what there is: ravectl status -w"
    return UsageError(f"the machine has no unit {name!r}", remedy)
