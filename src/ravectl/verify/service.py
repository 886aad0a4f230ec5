"""Checks of the suite `service`: do the units run, did they start in time, within their limits."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Mapping
from typing import Any

from ravectl.model import Limits, Service, Suite
from ravectl.verify import guest
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    judged,
    unreadable,
)

START_SECONDS = 60
MAX_OFFSET_SECONDS = 10.0
MANY_RESTARTS = 3
SETTLED_SECONDS = 60
MIB = 2**20

PROPERTIES = (
    "Id", "Names", "LoadState", "ActiveState", "SubState", "Result", "NRestarts",
    "ActiveEnterTimestampMonotonic", "ControlGroup", "MemoryMax", "CPUQuotaPerSecUSec",
    "OOMScoreAdjust", "TasksMax", "CPUWeight", "MainPID",
)  # fmt: skip

# A systemctl costs 0.25 s under TCG, so one is run only for what it may have to say. A boot
# that has just ended still has jobs queued, so the state is waited for, briefly.
# `Started UNIT` in the journal's catalog (systemd.index(7), SD_MESSAGE_UNIT_STARTED) tells when
# a unit that was restarted later had come up first.
MACHINE_SCRIPT = """\
manager() { systemctl show --no-pager -p SystemState,NFailedUnits,FinishTimestampMonotonic; }
manager=$(manager)
if [[ $manager == *SystemState=starting* || $manager == *SystemState=initializing* ]]; then
  timeout 8 systemctl is-system-running --wait >/dev/null
  manager=$(manager)
fi
shown=$(systemctl show --no-pager -p %(properties)s -- %(units)s)
echo '== manager =='
printf '%%s\n' "$manager"
echo '== failed =='
[[ $manager == *NFailedUnits=0* ]] || systemctl list-units --state=failed --plain --no-legend
echo '== jobs =='
[[ $manager == *SystemState=running* ]] || systemctl list-jobs --plain --no-legend
echo '== units =='
printf '%%s\n' "$shown"
echo '== cgroups =='
finish=${manager##*FinishTimestampMonotonic=} finish=${finish%%%%[!0-9]*}
matches=() scores=() id= enter=
while IFS= read -r line; do
  case $line in
    ControlGroup=/*)
      group=${line#ControlGroup=} memory= cpu= pids= weight=
      IFS= read -r memory <"/sys/fs/cgroup$group/memory.max"
      IFS= read -r cpu <"/sys/fs/cgroup$group/cpu.max"
      IFS= read -r pids <"/sys/fs/cgroup$group/pids.max"
      IFS= read -r weight <"/sys/fs/cgroup$group/cpu.weight"
      printf '%%s|%%s|%%s|%%s|%%s\n' "$group" "$memory" "$cpu" "$pids" "$weight" ;;
    MainPID=[1-9]*)
      pid=${line#MainPID=} score=
      IFS= read -r score <"/proc/$pid/oom_score_adj"
      scores+=("$pid $score") ;;
    Id=*) id=${line#Id=} ;;
    ActiveEnterTimestampMonotonic=*) enter=${line#*=} ;;
  esac
  if [[ $id && $enter ]]; then
    (( finish > 0 && enter > finish )) && matches+=("UNIT=$id")
    id= enter=
  fi
  [[ $line ]] || id= enter=
done 2>/dev/null <<<"$shown"
echo '== scores =='
printf '%%s\n' "${scores[@]}"
echo '== journal =='
if (( ${#matches[@]} )); then
  sudo -n journalctl -q -b -o json --output-fields=UNIT --no-pager \\
    MESSAGE_ID=39f53479d3a045ac8e11786248231fbf "${matches[@]}"
fi
echo '== memory =='
printf '%%s\n' "$(</proc/meminfo)"
echo '== uptime =='
read -r up _ </proc/uptime
echo "$up"
"""


def machine_script(subject: Subject) -> str:
    """The script that asks for the system's state and everything about the units of the Plan."""
    return MACHINE_SCRIPT % {
        "properties": ",".join(PROPERTIES),
        "units": shlex.join((*subject.units().values(), *subject.helpers())),
    }


def _collect_machine(target: VerifyTarget, deadline: float) -> str:
    output = guest.run_script(target, machine_script(target.subject), deadline)
    # The guest read its uptime last, so this is QEMU's age at nearly the same moment, a little
    # more rather than less.
    if target.host_started is None:
        return output
    age = time.time() - target.host_started
    return output.removesuffix(f"{guest.END}\n") + f"== age ==\n{age:.3f}\n{guest.END}\n"


MACHINE = Probe("machine", _collect_machine, 120.0)


# --- S1 --------------------------------------------------------------------------------------


def judge_state(_: Subject, output: str) -> Judgement:
    """The system's state, as `systemctl is-system-running` says it, is running; none failed."""
    expected = "the system is running and no unit has failed"
    parts = guest.sections(output)
    if parts is None or not {"manager", "failed", "jobs"} <= parts.keys():
        return unreadable(expected, "the answer about the system is incomplete")
    manager = _manager(parts["manager"])
    state, count = manager.get("SystemState"), guest.number(manager.get("NFailedUnits"))
    if not state or count is None:
        return unreadable(expected, "systemd did not say its state")
    failed = [line.split()[0] for line in parts["failed"].splitlines() if line.strip()]
    faults = [f"{unit} has failed" for unit in failed]
    if count > len(failed):
        faults.append(f"{count} units have failed")
    if state != "running":
        faults.insert(0, f"the system is {state}")
        jobs = [line.split()[1] for line in parts["jobs"].splitlines() if len(line.split()) > 1]
        faults += [f"{unit} has a job waiting" for unit in jobs]
    unit = failed[0] if failed else ""
    remedy = f"see why: ravectl logs {unit}" if unit else "see what it waits for: ravectl logs"
    return judged(expected, "running, none failed", faults, remedy)


def _manager(text: str) -> dict[str, str]:
    return next(iter(guest.properties(text)), {})


# --- S2 --------------------------------------------------------------------------------------


def _by_unit(subject: Subject, text: str) -> dict[str, dict[str, str]]:
    """The properties of each service of the Plan, by its name, and of each helper, by its unit."""
    blocks = guest.properties(text)
    found = {}
    for name, unit in (*subject.units().items(), *((h, h) for h in subject.helpers())):
        for block in blocks:
            # an alias (sshd.service for ssh.service) stands in Names, not in Id
            if unit == block.get("Id") or unit in block.get("Names", "").split():
                found[name] = block
    return found


def judge_active(subject: Subject, output: str) -> Judgement:
    """Each unit of the Plan is loaded and active, and so is what they work by."""
    units = {**subject.units(), **{helper: helper for helper in subject.helpers()}}
    expected = f"each of the {len(units)} units of the Plan is active"
    parts = guest.sections(output)
    if not units or parts is None or "units" not in parts:
        return unreadable(expected, "the answer about the units is incomplete")
    shown, uptime = _by_unit(subject, parts["units"]), _seconds(parts.get("uptime"))
    faults, culprit = [], ""
    for name, unit in units.items():
        block = shown.get(name)
        if block is None or "ActiveState" not in block:
            return unreadable(expected, f"systemd said nothing about {unit}")
        if block["ActiveState"] == "active" and block.get("LoadState") == "loaded":
            if again := _restless(block, uptime):
                culprit = culprit or unit
                faults.append(f"{unit} {again}")
            continue
        culprit = culprit or unit
        if block.get("LoadState") != "loaded":
            faults.append(f"{unit} is {block.get('LoadState', 'unknown')}")
        else:
            why = block.get("Result", "success")
            because = f", {why}" if why != "success" else ""
            faults.append(f"{unit} is {block['ActiveState']} ({block.get('SubState')}{because})")
    return judged(
        expected, f"all {len(units)} are active", faults, f"see why: ravectl logs {culprit}"
    )


def _restless(block: Mapping[str, str], uptime: float | None) -> str:
    """How a unit that is active just now is restarted again and again, or nothing."""
    restarts = guest.number(block.get("NRestarts")) or 0
    entered = guest.number(block.get("ActiveEnterTimestampMonotonic")) or 0
    if restarts < MANY_RESTARTS or uptime is None or uptime - entered / 1e6 > SETTLED_SECONDS:
        return ""
    return f"was restarted {restarts} times, the last less than {SETTLED_SECONDS} s ago"


# --- S3 --------------------------------------------------------------------------------------


def first_starts(journal: str) -> dict[str, int]:
    """When each unit had started for the first time in this boot, from journal lines."""
    found: dict[str, int] = {}
    for line in journal.splitlines():
        try:
            entry: Any = json.loads(line)
            unit, at = entry["UNIT"], guest.number(entry["__MONOTONIC_TIMESTAMP"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if isinstance(unit, str) and at is not None:
            found[unit] = min(at, found.get(unit, at))
    return found


def boot_offset(age: float | None, uptime: float) -> float | None:
    """Seconds from QEMU's start to the start of the guest kernel's clock.

    None when that cannot be told: the start is unknown, the machine came from a snapshot (it is
    then older than its QEMU), or it was paused since (its clock stood still).
    """
    if age is None:
        return None
    offset = age - uptime
    return max(offset, 0.0) if -1.0 <= offset <= MAX_OFFSET_SECONDS else None


def _seconds(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\d{1,12}\.\d{1,9}", text.strip()):
        return None
    return float(text)


def judge_start(subject: Subject, output: str) -> Judgement:
    """Every unit was active within START_SECONDS of QEMU's start."""
    expected = f"every unit active within {START_SECONDS} s of the machine's start"
    parts = guest.sections(output)
    if parts is None or not {"units", "manager", "journal", "uptime"} <= parts.keys():
        return unreadable(expected, "the answer about the units is incomplete")
    finish = guest.number(_manager(parts["manager"]).get("FinishTimestampMonotonic"))
    uptime = _seconds(parts["uptime"])
    units = subject.units()
    if finish is None or uptime is None or not units:
        return unreadable(expected, "no boot time")
    starts: dict[str, float] = {}
    shown, journal = _by_unit(subject, parts["units"]), first_starts(parts["journal"])
    for name, unit in units.items():
        first = _first(unit, shown.get(name, {}), finish, journal)
        if isinstance(first, str):
            return unreadable(expected, first)
        starts[unit] = first / 1e6
    if never := [unit for unit, at in starts.items() if at == 0]:
        faults = [f"{unit} has not been active yet" for unit in never]
        return judged(expected, "", faults, f"see why: ravectl logs {never[0]}")
    return _within(expected, starts, boot_offset(_seconds(parts.get("age")), uptime))


def _first(
    unit: str, block: Mapping[str, str], finish: int, journal: Mapping[str, int]
) -> int | str:
    """When a unit became active first (us of the guest's clock, 0: never), or why that is unknown.

    A restart after the boot must not count as a slow start.
    """
    entered = guest.number(block.get("ActiveEnterTimestampMonotonic"))
    if entered is None:
        return f"systemd did not say when {unit} became active"
    logged = journal.get(block.get("Id", unit))
    restarted = finish > 0 and entered > finish
    if restarted and logged is None and entered > START_SECONDS * 10**6:
        return f"{unit} was restarted and the journal holds its first start no more"
    return logged if restarted and logged is not None else entered


def _within(expected: str, starts: Mapping[str, float], offset: float | None) -> Judgement:
    slowest, took = max(starts.items(), key=lambda item: item[1])
    total = took + (offset or 0.0)
    clock = "" if offset is not None else ", by the guest's clock (without QEMU's own start)"
    seen = f"{total:.1f} s, the last was {slowest}{clock}"
    faults = [] if total <= START_SECONDS else [seen]
    remedy = f"see what it waited for: ravectl ssh -- systemd-analyze critical-chain {slowest}"
    return judged(expected, seen, faults, remedy)


# --- S4 --------------------------------------------------------------------------------------


def judge_limits(subject: Subject, output: str) -> Judgement:
    """Memory in use fits the profile; each unit's limits are the Plan's and are in force."""
    memory = subject.plan.machine.memory_mb
    expected = f"at most {memory} MB used, and each unit held to the limits of the Plan"
    parts = guest.sections(output)
    if parts is None or not {"units", "cgroups", "scores", "memory"} <= parts.keys():
        return unreadable(expected, "the answer about the units is incomplete")
    scores = dict(line.partition(" ")[::2] for line in parts["scores"].splitlines())
    used = used_mb(parts["memory"])
    shown, groups = _by_unit(subject, parts["units"]), _cgroups(parts["cgroups"])
    if used is None or not subject.plan.services:
        return unreadable(expected, "no account of the memory")
    faults = [f"{used} MB are used"] if used > memory else []
    for service in subject.plan.services:
        unit, block = subject.units()[service.name], shown.get(service.name)
        if block is None or "MemoryMax" not in block:
            return unreadable(expected, f"systemd said nothing about {unit}")
        faults += [f"{unit}: {fault}" for fault in limit_faults(service.limits, block)]
        pid = block.get("MainPID", "0")
        if pid != "0" and scores.get(pid) not in _scores(service):
            faults.append(f"{unit}: the kernel's oom_score_adj is {scores.get(pid) or 'missing'}")
        group = block.get("ControlGroup", "")
        if group:
            faults += [
                f"{unit}: {fault}" for fault in force_faults(service.limits, groups.get(group))
            ]
        else:
            faults.append(f"{unit}: has no control group")
    return judged(
        expected,
        f"{used} MB used, the limits of {len(subject.plan.services)} units are the Plan's",
        faults,
        "the machine is not what the profile says now: ravectl build, then ravectl up",
    )


def _scores(service: Service) -> tuple[str, ...]:
    """What the kernel may say of its process. sshd takes itself out of it, but no session of it."""
    planned = str(service.limits.oom_score_adjust)
    return (planned, "-1000") if service.name == "ssh" else (planned,)


def used_mb(meminfo: str) -> int | None:
    """Memory that programs use, swapped out or not, in MB, from /proc/meminfo."""
    kb: dict[str, int] = {}
    for line in meminfo.splitlines():
        words = line.split()
        value = guest.number(words[1]) if len(words) == 3 else None
        if value is not None and words[2] == "kB":
            kb[words[0]] = value
    try:
        swapped = kb["SwapTotal:"] - kb["SwapFree:"]
        used = kb["MemTotal:"] - kb["MemAvailable:"] + swapped
    except KeyError:
        return None
    return None if used <= 0 else -(-used // 1024)


def limit_faults(limits: Limits, block: Mapping[str, str]) -> list[str]:
    """Where systemd's properties of a unit differ from the Plan."""
    quota = guest.timespan_us(block.get("CPUQuotaPerSecUSec", ""))
    rows = (
        ("MemoryMax", f"{limits.memory_mb * MIB}", block.get("MemoryMax")),
        ("CPUQuota", f"{limits.cpu_percent}%", None if quota is None else f"{quota / 1e4:g}%"),
        ("OOMScoreAdjust", f"{limits.oom_score_adjust}", block.get("OOMScoreAdjust")),
        ("TasksMax", f"{limits.tasks}", block.get("TasksMax")),
        ("CPUWeight", f"{limits.cpu_weight}", block.get("CPUWeight")),
    )
    return [
        f"{name} is {seen or 'not set'}, not {wanted}"
        for name, wanted, seen in rows
        if seen != wanted
    ]


def _cgroups(text: str) -> dict[str, tuple[str, str, str, str]]:
    rows = [line.split("|") for line in text.splitlines()]
    return {r[0]: (r[1], r[2], r[3], r[4]) for r in rows if len(r) == 5}


def force_faults(limits: Limits, row: tuple[str, str, str, str] | None) -> list[str]:
    """Where the kernel's control group differs from the Plan: a limit systemd could not set."""
    if row is None:
        return ["the kernel does not show its control group"]
    memory, cpu, pids, weight = row
    faults = []
    if guest.number(memory) != limits.memory_mb * MIB:
        faults.append(f"the kernel's memory.max is {memory or 'missing'}")
    words = [guest.number(w) for w in cpu.split()]
    quota, period = words if len(words) == 2 else (None, None)
    if quota is None or not period or abs(quota * 100 / period - limits.cpu_percent) > 0.5:
        faults.append(f"the kernel's cpu.max is {cpu or 'missing'}")
    if guest.number(pids) != limits.tasks:
        faults.append(f"the kernel's pids.max is {pids or 'missing'}")
    if guest.number(weight) != limits.cpu_weight:
        faults.append(f"the kernel's cpu.weight is {weight or 'missing'}")
    return faults


CHECKS = (
    Check("S1", Suite.SERVICE, "the system runs and no unit has failed", MACHINE, judge_state),
    Check("S2", Suite.SERVICE, "every unit of the Plan is active", MACHINE, judge_active),
    Check("S3", Suite.SERVICE, "every unit was active within 60 s", MACHINE, judge_start),
    Check("S4", Suite.SERVICE, "memory and limits are the Plan's", MACHINE, judge_limits),
)
