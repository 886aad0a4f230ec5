"""How a machine does, as a picture for a terminal, as lines for a log, as JSON for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NoReturn

from ravectl import console, reconnect, watch
from ravectl.cli import options
from ravectl.verify.framework import clean

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ravectl.instance import Instance

REDRAWS_PER_SECOND = 2  # between refreshes: ages and countdowns go on, a new size is taken
GOOD, BAD, AMISS = "green", "bold red", "yellow"
_STYLES = {"active": GOOD, "failed": BAD, "firing": BAD, "completed": GOOD, "pending": AMISS}


def run(found: Instance, interval: float, *, as_json: bool) -> NoReturn:
    """Show the machine until Ctrl-C, in the form that fits where it goes."""
    if as_json:
        _lines(found, interval, lambda seen: print(json.dumps(document(found.name, seen))))
    if sys.stdout.isatty() and console.is_terminal():
        _live(found, interval)
    _lines(found, interval, lambda seen: print("\n".join(plain(seen, time.strftime("%H:%M:%S")))))


def document(name: str, seen: watch.Look) -> dict[str, Any]:
    """A refresh as a JSON object."""
    return {"name": name, "time": round(time.time(), 3), **asdict(seen)}


def _lines(found: Instance, interval: float, put: Callable[[watch.Look], None]) -> NoReturn:
    def show(seen: watch.Look) -> None:
        put(seen)
        sys.stdout.flush()

    watch.watch(found, interval, show, options.say_lost)


def _live(found: Instance, interval: float) -> NoReturn:
    from rich.console import Console
    from rich.live import Live

    screen = Console()
    view = View(found.name, found.require_record().accelerator.value)
    size = screen.size

    def picture() -> RenderableType:
        nonlocal size
        if screen.size != size:  # the terminal has wrapped what is there: begin on a clear one
            size = screen.size
            screen.file.write("\x1b[2J\x1b[H")
        return view.picture(time.monotonic(), screen.height)

    with Live(
        console=screen, get_renderable=picture, refresh_per_second=REDRAWS_PER_SECOND, screen=False
    ):
        watch.watch(found, interval, view.show, view.lost)


class View:
    """What the terminal shows: the last refresh, and how the connection does."""

    def __init__(self, name: str, accelerator: str) -> None:
        self._title = f"{name} ({accelerator})"
        self._seen: watch.Look | None = None
        self._at = time.monotonic()
        self._lost: tuple[reconnect.Lost, float] | None = None

    def show(self, seen: watch.Look) -> None:
        """Take a refresh."""
        self._seen, self._at, self._lost = seen, time.monotonic(), None

    def lost(self, why: reconnect.Lost) -> None:
        """Take the news that there is no connection."""
        self._lost = why, time.monotonic()

    def picture(self, now: float, height: int) -> RenderableType:
        """All of it at `now` (time.monotonic()), cut where a terminal of `height` lines ends."""
        from rich.console import Group
        from rich.text import Text

        parts: list[RenderableType] = [Text(self._status(now), style=AMISS if self._lost else "")]
        if self._seen is not None:
            style = "dim" if self._lost else ""
            parts += [machine(self._seen), units(self._seen, style), *_alerts(self._seen)]
            used = 1 + 2 + 1 + len(self._seen.units) + 1 + len(self._seen.alerts or ())
            parts += _tasks(self._seen, max(height - used - 3, 0))
        return Group(*parts)

    def _status(self, now: float) -> str:
        if self._lost is not None:
            why, at = self._lost
            left = max(why.seconds - (now - at), 0)
            next_try = f"next attempt in {left:.0f} s" if left else "trying"
            return f"{self._title}: no connection ({clean(why.reason)}); {next_try}"
        if self._seen is None:
            return f"{self._title}: connecting"
        return f"{self._title}: {now - self._at:.0f} s ago"


def machine(seen: watch.Look) -> RenderableType:
    """The machine as a whole."""
    from rich.text import Text

    return Text(
        f"up {span(seen.uptime_seconds)}   "
        f"memory {_of(seen.memory_used_bytes, seen.memory_bytes)}   "
        f"disk {_of(seen.disk_used_bytes, seen.disk_bytes)}   "
        f"load {' '.join(f'{x:.2f}' for x in seen.load)}",
        no_wrap=True, overflow="ellipsis",
    )  # fmt: skip


def _table() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")


def units(seen: watch.Look, style: str = "") -> Table:
    """The services, a row each."""
    from rich.text import Text

    table = _table()
    table.style = style
    for head, right in (
        ("service", False), ("state", False), ("since", True), ("memory", True), ("limit", True),
        ("cpu", True), ("restarts", True),
    ):  # fmt: skip
        table.add_column(head, justify="right" if right else "left", no_wrap=True)
    for u in seen.units:
        state = clean(u.state)
        table.add_row(
            u.name, Text(state, _STYLES.get(state, AMISS)), span(u.since_seconds),
            size(u.memory_bytes), size(u.memory_limit_bytes),
            "-" if u.cpu_percent is None else f"{u.cpu_percent:.0f} %",
            Text(_number(u.restarts), AMISS if u.restarts else ""),
        )  # fmt: skip
    return table


def _alerts(seen: watch.Look) -> list[RenderableType]:
    from rich.text import Text

    if not seen.alerts:
        said = "none" if seen.alerts is not None else "not available: Prometheus does not answer"
        return [Text(f"alerts  {said}", style="" if seen.alerts is not None else AMISS)]
    return [
        Text(
            f"alerts  {clean(a.state)}  {clean(a.name)}  {clean(a.severity)}  {clean(a.summary)}",
            style=_STYLES.get(a.state, AMISS), no_wrap=True, overflow="ellipsis",
        )
        for a in seen.alerts
    ]  # fmt: skip


def _tasks(seen: watch.Look, most: int) -> list[RenderableType]:
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"tasks   {_counts(seen)}")]
    for task in (seen.recent_tasks or ())[:most]:
        parts.append(
            Text(
                f"        {clean(task.created_at)[:19]}  {clean(task.status):<9}  "
                f"{clean(task.agent_type):<18}  {clean(task.task_id)}",
                style=_STYLES.get(task.status, ""), no_wrap=True, overflow="ellipsis",
            )
        )  # fmt: skip
    return parts


def _counts(seen: watch.Look) -> str:
    if seen.tasks is None:
        return "not available: the dispatcher does not answer"
    return ", ".join(f"{count} {state}" for state, count in seen.tasks.items())


def plain(seen: watch.Look, clock: str) -> list[str]:
    """A refresh as lines for a log: the machine, then what is not as it should be."""
    active = sum(u.state == "active" for u in seen.units)
    firing = None if seen.alerts is None else sum(a.state == "firing" for a in seen.alerts)
    alerts = "not available" if firing is None else str(firing) if firing else "none"
    lines = [
        (
            f"{clock}  up {span(seen.uptime_seconds)}"
            f"  memory {_of(seen.memory_used_bytes, seen.memory_bytes)}"
            f"  disk {_of(seen.disk_used_bytes, seen.disk_bytes)}  load {seen.load[0]:.2f}"
            f"  services {active} of {len(seen.units)} active  alerts firing: {alerts}"
            f"  tasks: {_counts(seen)}"
        )
    ]
    lines += [f"{clock}  {u.name} is {clean(u.state)}" for u in seen.units if u.state != "active"]
    lines += [
        f"{clock}  {clean(a.state)}: {clean(a.name)} ({clean(a.severity)}) {clean(a.summary)}"
        for a in seen.alerts or ()
    ]
    return lines


def span(seconds: float | None) -> str:
    """A time span in its two largest units: 3d 4h, 5min 2s."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    for name, factor, less, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60),
                                        ("min", 60, "s", 1)):  # fmt: skip
        if whole >= factor:
            return f"{whole // factor}{name} {whole % factor // smaller}{less}"
    return f"{whole}s"


def size(count: int | None) -> str:
    """A number of bytes in MB or GB (of 1024)."""
    if count is None:
        return "-"
    mb = count / 2**20
    return f"{mb / 1024:.1f} GB" if mb >= 10_000 else f"{mb:.0f} MB"


def _of(used: int, total: int) -> str:
    return f"{size(used)} of {size(total)} ({100 * used / total:.0f} %)" if total else "-"


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
