"""A task's transient unit, as systemd-run's arguments. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rave_dispatcher.config import Agent
from rave_dispatcher.domain.rules import MAX_NAME
from rave_dispatcher.domain.tasks import AgentType, Outcome, Usage

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]")
STOP_SECONDS = 5
SECRETS = "/run/secrets"
TASKS = "rave-tasks.target"  # so that at a shutdown the dispatcher ends first
SLICE = "agents.slice"  # what holds all tasks together
# A program that is refused a process now and then waits or gives up; one that asks a hundred times
# more is a fork bomb, or as good as one.
DENIED_MOST = 100

SANDBOX = (
    "NoNewPrivileges=yes",
    "ProtectSystem=strict",
    "ProtectHome=tmpfs",
    "PrivateTmp=yes",
    "PrivateDevices=yes",
    "PrivateIPC=yes",
    # what is left there would be counted against the tasks that follow
    "TemporaryFileSystem=/dev/shm:mode=1777,nosuid,nodev,noexec,size=25%",
    "PrivatePIDs=yes",  # of one account, tasks could end and read one another
    "ProtectClock=yes",
    "ProtectControlGroups=yes",
    "ProtectHostname=yes",
    "ProtectKernelLogs=yes",
    "ProtectKernelModules=yes",
    "ProtectKernelTunables=yes",
    "ProtectProc=invisible",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "LockPersonality=yes",
    "SystemCallArchitectures=native",
    "CapabilityBoundingSet=",
    "UMask=0077",
    "InaccessiblePaths=-/run/secrets -/run/secrets.d -/run/rave -/run/rave-dispatcher",
    # what others listen at by a file; who may write to the journal can push the rest out of it
    "InaccessiblePaths=-/run/dbus -/run/postgresql -/run/systemd/journal",
    # who speaks to systemd makes it write there, or start services. Not all of the folder: systemd
    # needs it itself to close the others
    "InaccessiblePaths=-/run/systemd/notify -/run/systemd/private -/run/systemd/userdb",
    "InaccessiblePaths=-/run/systemd/netif -/run/systemd/machine -/run/systemd/home",
    "InaccessiblePaths=-/run/systemd/io.systemd.Credentials -/run/systemd/io.systemd.Hostname",
    "InaccessiblePaths=-/run/systemd/io.systemd.ManagedOOM -/run/systemd/io.systemd.sysext",
    "InaccessiblePaths=-/run/systemd/io.systemd.PCRExtend -/run/systemd/io.systemd.PCRLock",
    "InaccessiblePaths=-/run/systemd/io.systemd.BootControl -/run/systemd/io.systemd.Manager",
    "InaccessiblePaths=-/run/systemd/io.systemd.Login -/run/systemd/io.systemd.FactoryReset",
    "InaccessiblePaths=-/run/systemd/io.systemd.AskPassword -/run/udev",
    # what no build and no agent asks for, and attacks on the kernel do
    "SystemCallFilter=~@clock @cpu-emulation @keyring @module @mount @obsolete @raw-io",
    "SystemCallFilter=~@reboot @swap bpf perf_event_open userfaultfd",
    "SystemCallErrorNumber=EPERM",
    "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK",
)


@dataclass(frozen=True)
class Order:
    """What is asked of the launcher; it trusts nothing of it but its form."""

    task_id: str
    attempt: int
    agent_type: str
    traceparent: str
    rule: str | None = None

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if not _ID.fullmatch(self.task_id):
            return "task_id is no UUID"
        if self.agent_type not in set(AgentType):
            return "agent_type is none"
        if not 0 < self.attempt <= 1000:
            return "attempt is out of range"
        if not _TRACEPARENT.fullmatch(self.traceparent):
            return "traceparent is of another form"
        if not (self.rule is None or (isinstance(self.rule, str) and len(self.rule) <= MAX_NAME)):
            return "rule is no name of one"
        return None

    @property
    def unit(self) -> str:
        """The name of the task's unit."""
        return f"rave-task-{self.task_id}.service"


def systemd_run_argv(
    order: Order, agent: Agent, user: str, workdir: str, prompt: str, output: str,
    search: str | None = None,
) -> list[str]:  # fmt: skip
    """The command that starts a task's unit. `prompt` and `output` are paths, never contents.

    `search` is its PATH where the agent has none of its own; without either it is systemd's. The
    unit stays after its end (RemainAfterExit), so that its figures can be asked for.
    """
    environment = {
        **({"PATH": search} if search else {}),
        **agent.environment, "HOME": workdir, "TRACEPARENT": order.traceparent,
        "RAVE_TASK_ID": order.task_id,
    }  # fmt: skip
    network = () if agent.network else ("IPAddressDeny=any", "IPAddressAllow=localhost")
    properties = (
        "Type=exec", "RemainAfterExit=yes", "CollectMode=inactive", f"Slice={SLICE}",
        f"User={user}", f"WorkingDirectory={workdir}", f"BindPaths={workdir}",
        f"StandardInput=file:{prompt}", f"StandardOutput=file:{output}", "StandardError=inherit",
        f"MemoryMax={agent.memory_mb}M", "MemorySwapMax=0", f"CPUQuota={agent.cpu_percent}%",
        f"TasksMax={agent.processes}", f"RuntimeMaxSec={agent.seconds}",
        f"Before={TASKS}",
        f"TimeoutStopSec={STOP_SECONDS}", "KillMode=control-group", "OOMPolicy=kill",
        "OOMScoreAdjust=500", "CPUAccounting=yes", "MemoryAccounting=yes",
        *(f"LoadCredential={n}:{SECRETS}/{s}" for n, s in sorted(agent.credentials.items())),
        *SANDBOX, *network,
    )  # fmt: skip
    return [
        "systemd-run", "--quiet", "--no-ask-password", "--expand-environment=no",
        f"--unit={order.unit}",
        f"--description=agent task {order.task_id} ({order.agent_type})",
        *(f"--property={p}" for p in properties),
        *(f"--setenv={k}={v}" for k, v in sorted(environment.items())),
        "--", *agent.command,
    ]  # fmt: skip


SHOWN = (
    "ActiveState", "SubState", "Result", "ExecMainCode", "ExecMainStatus", "MemoryPeak",
    "CPUUsageNSec", "ExecMainStartTimestampMonotonic", "ExecMainExitTimestampMonotonic",
)  # fmt: skip


def show_argv(unit: str) -> list[str]:
    """The command that asks for a unit's state."""
    return ["systemctl", "show", unit, f"--property={','.join(SHOWN)}"]


def parse_show(text: str) -> dict[str, str]:
    """Its answer."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def is_over(shown: Mapping[str, str]) -> bool:
    """Whether the unit's main process has ended and all that it started with it."""
    return shown.get("SubState") in ("exited", "failed", "dead") or shown.get("ActiveState") in (
        "failed", "inactive",
    )  # fmt: skip


def denied_processes(events: str) -> int:
    """How often a cgroup was refused a process: what its pids.events says."""
    rows = (line.split() for line in events.splitlines())
    return next((int(r[1]) for r in rows if len(r) == 2 and r[0] == "max" and r[1].isdigit()), 0)


_RESULTS = {
    "timeout": (Outcome.TIMED_OUT, "it took longer than it may"),
    "oom-kill": (Outcome.OUT_OF_MEMORY, "it needed more memory than it may use"),
    "fork-bomb": (Outcome.ERROR, "it went on starting processes beyond what it may have"),
}


def verdict(shown: Mapping[str, str], fallback_ms: int) -> tuple[Outcome, str, Usage]:
    """How a unit ended, and what its cgroup counted."""
    usage = _usage(shown, fallback_ms)
    result = shown.get("Result", "")
    if result == "success" and shown.get("ExecMainStatus", "0") == "0":
        # by itself it is "exited" (RemainAfterExit); one that was stopped is dead, or not known
        if shown.get("SubState") == "exited":
            return Outcome.SUCCEEDED, "", usage
        return Outcome.ERROR, "its unit was stopped", usage
    if result in _RESULTS:
        return (*_RESULTS[result], usage)
    if shown.get("ExecMainCode") == "1" and shown.get("ExecMainStatus") in ("200", "203", "217"):
        return Outcome.NOT_STARTED, f"its command could not be run ({result})", usage
    how = {"1": "exit code", "2": "signal", "3": "signal"}.get(shown.get("ExecMainCode", ""), "")
    status = shown.get("ExecMainStatus", "?")
    return Outcome.ERROR, f"{how or result} {status}".strip(), usage


def _usage(shown: Mapping[str, str], fallback_ms: int) -> Usage:
    began = _number(shown.get("ExecMainStartTimestampMonotonic"))
    ended = _number(shown.get("ExecMainExitTimestampMonotonic"))
    duration_us = ended - began if began and ended and ended >= began else fallback_ms * 1000
    memory, cpu = _number(shown.get("MemoryPeak")), _number(shown.get("CPUUsageNSec"))
    return make_usage(duration_us, memory, None if cpu is None else cpu // 1000)


def make_usage(duration_us: int, memory_bytes: int | None, cpu_us: int | None) -> Usage:
    """Figures as the contract has them. 100 percent is one core for all of the time."""
    return Usage(
        duration_ms=duration_us // 1000,
        memory_usage_mb=None if memory_bytes is None else round(memory_bytes / 2**20, 2),
        cpu_usage_percent=None if cpu_us is None else round(100 * cpu_us / max(duration_us, 1), 1),
    )


def _number(text: str | None) -> int | None:
    # what systemd does not know is "[not set]" or 2^64-1
    if text is None or not text.isdigit() or int(text) >= 2**63:
        return None
    return int(text)
