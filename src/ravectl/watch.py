"""How a machine does, again and again: one script in the guest, one answer per refresh.

The script stays in the guest and uses bash's own means (/dev/tcp, read): a refresh costs the
guest two processes, systemctl and stat, since each takes 50-100 ms under TCG. It ends when
nobody listens any more. Everything but `watch` is pure.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ravectl import reconnect, ssh
from ravectl.errors import RavectlError
from ravectl.instance import Instance
from ravectl.model import EngineName, Plan
from ravectl.verify import guest

LEAST_SECONDS, MOST_SECONDS = 0.5, 3600.0
SILENCE_SECONDS = 30.0  # beyond the interval: a loaded guest under TCG needs some of it
RECENT_TASKS = 5
ANSWERS_SECONDS = 5  # alerts and tasks are asked for no more often: each costs a service 0.1 s
MAX_LINES = 20_000  # of one answer; the dispatcher's metrics have some hundred
TOKEN_FILE = "/run/secrets/dispatcher/api-token"  # noqa: S105 - where it is, not what
_INFINITE = 2**64 - 1  # how systemd prints "no limit" and "not known", as a number
_TASK_STATES = ("pending", "running", "failed")


@dataclass(frozen=True)
class Unit:
    """A service of the Plan as systemd has it. None: systemd does not know."""

    name: str
    unit: str
    state: str  # systemd's ActiveState
    since_seconds: float | None
    memory_bytes: int | None
    memory_limit_bytes: int | None
    cpu_seconds: float | None  # used since its start
    cpu_percent: float | None  # of one core, since the refresh before; None at the first
    restarts: int | None


@dataclass(frozen=True)
class Alert:
    """An alert that Prometheus has: `firing`, or `pending` while it waits whether it stays."""

    name: str
    severity: str
    state: str
    since: str  # RFC 3339
    summary: str


@dataclass(frozen=True)
class Task:
    """An agent task, as the dispatcher tells it."""

    task_id: str
    status: str
    agent_type: str
    created_at: str
    outcome: str


@dataclass(frozen=True)
class Look:
    """What one refresh saw. `alerts`, `tasks` and `recent_tasks` are None when their service
    did not answer, which is not the same as none."""

    boot_id: str
    uptime_seconds: float
    memory_bytes: int
    memory_used_bytes: int
    disk_bytes: int
    disk_used_bytes: int
    load: tuple[float, ...]  # of 1, 5 and 15 minutes
    units: tuple[Unit, ...]
    alerts: tuple[Alert, ...] | None
    tasks: dict[str, int] | None
    recent_tasks: tuple[Task, ...] | None


def watch(
    instance: Instance,
    interval: float,
    show: Callable[[Look], None],
    lost: Callable[[reconnect.Lost], None],
) -> NoReturn:
    """Show how a machine does every `interval` seconds until Ctrl-C, also after it restarted.

    Raises RavectlError when the machine answers and refuses us, or cannot run the script.
    """
    record = instance.require_record()
    text = script(record.plan, record.engine, interval)
    before: Look | None = None

    def work(connection: ssh.Connection, worked: Callable[[], None]) -> None:
        lines: list[str] = []

        def take(line: str) -> bool:
            nonlocal before
            lines.append(line.rstrip("\r"))
            if lines[-1] == guest.END:
                seen = parse(record.plan, record.engine, "\n".join(lines))
                lines.clear()
                before = since(before, seen)
                worked()
                with reconnect.output():
                    show(before)
            return len(lines) < MAX_LINES

        end = connection.stream(
            "sudo -n bash -s", take, stdin=text.encode(), silence=interval + SILENCE_SECONDS
        )
        raise _ended(end)

    reconnect.stay(instance, work, lost)


def _ended(end: ssh.RemoteEnd | None) -> Exception:
    # sudo and bash end so when the machine shuts down
    if end is not None and (end.returncode < 0 or end.returncode > 128):
        return ConnectionError("the machine ended the connection")
    return RavectlError(
        "the machine cannot tell how it does",
        "look at its journal: ravectl logs",
        details=end.stderr.strip()[-300:] if end else "its answer has no end",
    )


# --- asking ------------------------------------------------------------------------------------

PROPERTIES = (
    "Id", "ActiveState", "StateChangeTimestampMonotonic", "MemoryCurrent", "MemoryMax",
    "CPUUsageNSec", "NRestarts",
)  # fmt: skip

# In braces, so that bash has read all of it before `read` reads on from the same input.
_SCRIPT = """\
{ export LC_ALL=C SYSTEMD_COLORS=0 SYSTEMD_PAGER=
ask() { # what it says is left in $answer
  answer=
  if { exec 3<>"/dev/tcp/127.0.0.1/$1"; } 2>/dev/null; then
    printf 'GET %s HTTP/1.0\\r\\nHost: localhost\\r\\n%s\\r\\n' "$2" "$3" >&3
    IFS= read -r -t 5 -N 1000000 -u 3 answer
    exec 3>&-
  fi
}
next=0
while :; do
  echo '== machine =='
  read -r up _ </proc/uptime
  read -r one five fifteen _ </proc/loadavg
  read -r boot </proc/sys/kernel/random/boot_id
  echo "boot=$boot"; echo "uptime=$up"; echo "load=$one $five $fifteen"
  while read -r key value _; do
    case $key in MemTotal: | MemAvailable:) echo "${key%:}=$value" ;; esac
    [ "$key" = MemAvailable: ] && break
  done </proc/meminfo
  echo "disk=$(stat -f -c '%S %b %f' /)"
  echo '== units =='
  systemctl show @PROPERTIES@ -- @UNITS@
  if ((SECONDS >= next)); then
    ask @PROMETHEUS@ /api/v1/alerts ''; alerts=$answer
    ask @DISPATCHER@ /metrics ''; metrics=$answer
    token=; read -r token 2>/dev/null <@TOKEN@
    ask @DISPATCHER@ '/v1/tasks?limit=@RECENT@' "Authorization: Bearer $token"$'\\r\\n'
    tasks=$answer
    next=$((SECONDS + @ANSWERS@))
  fi
  printf '== %s ==\\n%s\\n' alerts "$alerts" metrics "$metrics" tasks "$tasks"
  echo '@END@'
  read -r -t @INTERVAL@ _
  [ $? -gt 128 ] || exit 0
done; }
"""


def script(plan: Plan, engine: EngineName, interval: float) -> str:
    """The bash script that tells every `interval` seconds how the machine does."""
    words = {
        "PROPERTIES": " ".join(f"--property={p}" for p in PROPERTIES),
        "UNITS": shlex.join(plan.units(engine)),
        "PROMETHEUS": _port(plan, "prometheus"),
        "DISPATCHER": _port(plan, "dispatcher"),
        "TOKEN": TOKEN_FILE,
        "RECENT": str(RECENT_TASKS),
        "ANSWERS": str(ANSWERS_SECONDS),
        "END": guest.END,
        "INTERVAL": f"{interval:.3f}",
    }
    return re.sub(r"@([A-Z]+)@", lambda m: words[m[1]], _SCRIPT)


def _port(plan: Plan, service: str) -> str:
    return str(plan.service(service).health.port)


# --- reading the answer ------------------------------------------------------------------------


def parse(plan: Plan, engine: EngineName, text: str) -> Look:
    """What an answer of the script says. Raises RavectlError when it is not one."""
    try:
        parts = guest.sections(text) or {}
        machine = guest.properties(parts["machine"])[0]
        size, blocks, free = (int(w) for w in machine["disk"].split())
        memory = int(machine["MemTotal"]) * 1024
        return Look(
            boot_id=machine["boot"],
            uptime_seconds=float(machine["uptime"]),
            memory_bytes=memory,
            memory_used_bytes=memory - int(machine["MemAvailable"]) * 1024,
            disk_bytes=size * blocks,
            disk_used_bytes=size * (blocks - free),
            load=tuple(float(w) for w in machine["load"].split()),
            units=_units(plan, engine, parts["units"], float(machine["uptime"])),
            alerts=alerts(body(parts["alerts"])),
            tasks=task_counts(body(parts["metrics"])),
            recent_tasks=recent(body(parts["tasks"])),
        )
    except (KeyError, ValueError, IndexError, OverflowError):
        raise RavectlError(
            "the machine's answer is not how it does", "look at its journal: ravectl logs",
            details=text[:200],
        ) from None  # fmt: skip


def _units(plan: Plan, engine: EngineName, text: str, uptime: float) -> tuple[Unit, ...]:
    found = {row.get("Id"): row for row in guest.properties(text)}
    return tuple(
        _unit(s.name, s.unit[engine], found.get(s.unit[engine], {}), uptime) for s in plan.services
    )


def _unit(name: str, unit: str, row: dict[str, str], uptime: float) -> Unit:
    changed, cpu = _known(row.get("StateChangeTimestampMonotonic")), _known(row.get("CPUUsageNSec"))
    return Unit(
        name=name,
        unit=unit,
        state=row.get("ActiveState", "unknown"),
        since_seconds=max(uptime - changed / 1e6, 0.0) if changed else None,
        memory_bytes=_known(row.get("MemoryCurrent")),
        memory_limit_bytes=_known(row.get("MemoryMax")),
        cpu_seconds=None if cpu is None else cpu / 1e9,
        cpu_percent=None,
        restarts=_known(row.get("NRestarts")),
    )


def _known(text: str | None) -> int | None:
    value = guest.number(text)
    return None if value is None or value >= _INFINITE else value


def body(text: str) -> str | None:
    """The body of an HTTP answer, None when it is none or says no."""
    head, _, rest = text.partition("\n\n")
    return rest if re.match(r"HTTP/\S+ 200\b", head) else None


def _document(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def alerts(text: str | None) -> tuple[Alert, ...] | None:
    """What Prometheus' /api/v1/alerts answered: those that fire first."""
    try:
        rows = _document(text)["data"]["alerts"]
        found = [
            Alert(
                name=str(row["labels"]["alertname"]),
                severity=str(row["labels"].get("severity", "")),
                state=str(row["state"]),
                since=str(row.get("activeAt", "")),
                summary=str(row.get("annotations", {}).get("summary", "")),
            )
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError):
        return None
    return tuple(sorted(found, key=lambda a: (a.state != "firing", a.severity, a.name)))


def task_counts(text: str | None) -> dict[str, int] | None:
    """How many tasks wait, run, and were given up, from the dispatcher's own metrics."""
    if text is None:
        return None
    rows = re.findall(r'^\w+_queue_depth\{state="(\w+)"\} ([0-9.e+]{1,20})$', text, re.M)
    try:
        found = {state: round(float(value)) for state, value in rows}
    except (ValueError, OverflowError):
        return None
    return {s: found[s] for s in _TASK_STATES} if set(_TASK_STATES) <= set(found) else None


def recent(text: str | None) -> tuple[Task, ...] | None:
    """The last tasks, the newest first."""
    keys = ("task_id", "status", "agent_type", "created_at", "outcome")
    try:
        rows = _document(text)["items"]
        return tuple(Task(*(str(row.get(k) or "") for k in keys)) for row in rows)
    except (KeyError, TypeError, AttributeError):
        return None


def since(before: Look | None, seen: Look) -> Look:
    """`seen` with what each unit used of the CPU since the refresh before."""
    if before is None or before.boot_id != seen.boot_id:
        return seen
    passed = seen.uptime_seconds - before.uptime_seconds
    used = {u.unit: u.cpu_seconds for u in before.units}
    return replace(
        seen, units=tuple(replace(u, cpu_percent=_percent(used[u.unit], u.cpu_seconds, passed))
                          for u in seen.units if u.unit in used),
    )  # fmt: skip


def _percent(before: float | None, now: float | None, passed: float) -> float | None:
    # less than before: the service was started anew
    if before is None or now is None or now < before or passed <= 0:
        return None
    return 100 * (now - before) / passed
