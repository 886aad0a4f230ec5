"""Checks of the suite `security`: what the kernel, the mounts and each unit's sandbox deny."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from ravectl.model import AUDIT_A_SECOND, EngineName, Suite
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

_WRAPPERS = re.compile(r"^/run/wrappers/wrappers\.\w+/")  # where NixOS' link `bin` leads
# each program's own words: a file may have the other's for its name
_GONE_FROM_FIND = re.compile(r"find: '(.*)': No such file or directory")
_GONE_FROM_GETCAP = re.compile(r"(/.*) \(No such file or directory\)")
POLICY = "/usr/lib/rave/apparmor.bin"
_REBUILD = "the machine is not what its Plan says: ravectl build, then ravectl reset"

# Settings by built-ins: sysctl would be a process for each. Programs that give others' rights are
# looked for where such a right would be honoured, and nowhere else.
KERNEL_SCRIPT = """\
echo '== sysctls =='
for key in %(keys)s; do
  value=
  IFS= read -r value <"/proc/sys/${key//.//}" && printf '%%s = %%s\\n' "$key" "$value"
  [[ $key == net.ipv?.conf.all.* ]] || continue
  # what is in force is made of this one and the interface's own; to itself a machine may speak
  for own in /proc/sys/net/"${key:4:4}"/conf/*/"${key##*.}"; do
    [[ $own != */lo/* ]] && IFS= read -r value <"$own" || continue
    own=${own#/proc/sys/} own=${own//./:}
    printf '%%s = %%s\\n' "${own//\\//.}" "$value"
  done
done 2>/dev/null
echo '== loaded =='
printf '%%s\\n' "$(</proc/modules)"
echo '== blocked =='
modprobe --showconfig 2>/dev/null | grep -E '^install '
echo '== mounts =='
printf '%%s\\n' "$(</proc/self/mountinfo)"
echo '== setuid =='
places=()
while read -r _ _ _ _ place options _; do
  [[ ,$options, == *,nosuid,* ]] || places+=("$(printf %%b "$place")")
done </proc/self/mountinfo
find "${places[@]}" -xdev -type f -perm /6000 2>&1
echo '== capable =='
if command -v getcap >/dev/null; then
  find "${places[@]}" -xdev -type f -perm /111 -print0 | xargs -0r getcap 2>&1
else
  echo 'no getcap'
fi
echo '== searched =='
printf '%%s\\n' "${places[@]}"
echo '== confined =='
units=(%(confined)s)
for unit in "${units[@]}"; do
  while IFS= read -r pid; do
    IFS= read -r profile <"/proc/$pid/attr/apparmor/current" && echo "$unit $profile"
  done <"/sys/fs/cgroup/system.slice/$unit/cgroup.procs"
done 2>/dev/null
echo '== states =='
mapfile -t states < <(systemctl is-active -- "${units[@]}")
for i in "${!units[@]}"; do echo "${units[i]} ${states[i]}"; done
echo '== policy =='
sha256sum /usr/lib/rave/apparmor.bin 2>&1
for profile in /sys/kernel/security/apparmor/policy/profiles/*; do
  IFS= read -r name <"$profile/name" && IFS= read -r digest <"$profile/raw_sha256" &&
    echo "$digest $name"
done 2>/dev/null
echo '== audited =='
echo "journal $(systemctl is-active systemd-journald-audit.socket)"
auditctl -s 2>&1
auditctl -l 2>&1
"""


def kernel_script(subject: Subject) -> str:
    """The script that shows the kernel's settings, what is mounted how, and setuid programs."""
    keys = subject.plan.hardening.kernel(subject.engine)
    confined = shlex.join(subject.units()[name] for name in subject.plan.hardening.profiles)
    return KERNEL_SCRIPT % {"keys": shlex.join(keys), "confined": confined}


def _collect_kernel(target: VerifyTarget, deadline: float) -> str:
    return guest.run_script(target, kernel_script(target.subject), deadline, root=True)


KERNEL = Probe("kernel", _collect_kernel, 120.0)


def judge_kernel(subject: Subject, output: str) -> Judgement:
    """Kernel settings, module blocklist, mount options and setuid programs are the Plan's."""
    wanted = subject.plan.hardening
    settings = wanted.kernel(subject.engine)
    setuid = wanted.setuid[subject.engine]
    expected = (
        f"{len(settings)} kernel settings and {len(wanted.mounts)} mounts as planned, "
        f"{len(wanted.blocked_modules)} modules blocked, setuid only {', '.join(setuid)}"
    )
    parts = guest.sections(output) or {}
    if (
        not {
            "sysctls",
            "loaded",
            "blocked",
            "mounts",
            "setuid",
            "capable",
            "searched",
            "confined",
            "states",
            "policy",
            "audited",
        }
        <= parts.keys()
    ):
        return unreadable(expected, "the answer about the kernel is incomplete")
    mounts = _mount_options(parts["mounts"])
    places = parts["searched"].splitlines()
    if "/" not in mounts or "/" not in places:
        return unreadable(expected, "the machine does not say what is mounted")
    faults = sysctl_faults(settings, parts["sysctls"])
    faults += (
        policy_faults(wanted.profiles, parts["policy"])
        if subject.engine is EngineName.DEBIAN
        else []
    )
    faults += _module_faults(wanted.blocked_modules, parts["loaded"], parts["blocked"])
    faults += mount_faults(wanted.mounts, mounts, setuid)
    faults += [
        f"{line} is setuid or setgid" if line.startswith("/") else line
        for line in _still_there(_GONE_FROM_FIND, parts["setuid"], places)
        if _WRAPPERS.sub("/run/wrappers/bin/", line) not in setuid
    ]
    faults += capability_faults(
        _still_there(_GONE_FROM_GETCAP, parts["capable"], places), subject.engine
    )
    profiles = {subject.units()[name]: profile for name, profile in wanted.profiles.items()}
    faults += confinement_faults(profiles, parts["confined"], parts["states"])
    faults += audit_faults(wanted.audit[subject.engine], parts["audited"])
    return judged(expected, "all as planned", faults, _REBUILD)


def sysctl_faults(settings: Mapping[str, str], text: str) -> list[str]:
    """Where the kernel's settings, as `key = value` lines, are others than wanted."""
    rows = (line.partition(" = ") for line in text.splitlines())
    seen = {key: " ".join(value.split()) for key, _, value in rows}
    # of an interface's own setting: what is wanted of all of them
    own = {k: settings.get(re.sub(r"(\.conf\.)[^.]+", r"\1all", k, count=1)) for k in seen}
    return [
        f"{key} is {seen.get(key, 'not there')}, not {value}"
        for key, value in {**own, **settings}.items()
        if value is not None and seen.get(key) != value
    ]


def _still_there(gone: re.Pattern[str], text: str, places: Iterable[str]) -> list[str]:
    """Lines without those about a file that went while it was looked at; not a place as a whole."""
    known = set(places)
    matches = ((line, gone.fullmatch(line)) for line in text.splitlines())
    return [line for line, m in matches if not m or m[1] in known]


def capability_faults(lines: Sequence[str], engine: EngineName) -> list[str]:
    """Programs with capabilities of their own: no image has any, but for NixOS' wrappers."""
    nix = engine is EngineName.NIX
    if list(lines) == ["no getcap"]:
        return [] if nix else ["capabilities of files cannot be asked for"]
    # "=" alone: an attribute that gives none
    having = [x for x in lines if not x.endswith(" =")]
    having = [x for x in having if not (nix and x.startswith("/run/wrappers/"))]
    return [f"{path} has {what}" for path, _, what in (x.rpartition(" ") for x in having)]


def confinement_faults(profiles: Mapping[str, str], text: str, states: str) -> list[str]:
    """Which units, of those that `profiles` has one for, have a process that it does not hold.

    Not units that start or reload: what systemd runs for that as root is among their processes.
    """
    found: dict[str, set[str]] = {}
    state = dict(line.partition(" ")[::2] for line in states.splitlines())
    for line in text.splitlines():
        unit, _, profile = line.partition(" ")
        found.setdefault(unit, set()).add(profile)
    faults = []
    for unit, profile in profiles.items():
        if state.get(unit) in ("activating", "reloading"):
            continue
        others = found.get(unit, {"nothing"}) - {f"{profile} (enforce)"}
        faults += [f"{unit} is held to {o}, not to AppArmor's {profile}" for o in sorted(others)]
    return faults


def policy_faults(profiles: Mapping[str, str], text: str) -> list[str]:
    """Which of the profiles the kernel has from elsewhere than the image's file."""
    lines = [line.split() for line in text.splitlines()]
    image = next((words[0] for words in lines if words[1:] == [POLICY]), None)
    loaded = {words[1]: words[0] for words in lines if len(words) == 2}
    return [
        f"AppArmor's {name} is not that of {POLICY}"
        for name in profiles.values()
        if image is None or loaded.get(name) != image
    ]


def audit_faults(rules: Iterable[str], text: str) -> list[str]:
    """Which of the rules the kernel does not have, by what auditctl says of it."""
    lines = text.splitlines()
    if not {"enabled 1", "enabled 2"} & set(lines):
        return ["the kernel notes nothing: auditing is off"]
    wanted = {_audited(rule): rule for rule in rules}
    there = {_audited(line): line for line in lines if line.startswith("-")}
    faults = [f"the kernel does not note: {r}" for key, r in wanted.items() if key not in there]
    # another may say that nothing is noted
    faults += [f"the kernel has another rule: {r}" for key, r in there.items() if key not in wanted]
    if f"rate_limit {AUDIT_A_SECOND}" not in lines:
        faults.append(f"the kernel's notes are not limited to {AUDIT_A_SECOND} a second")
    if "journal active" not in lines:
        faults.append("the journal does not take the kernel's notes")
    return faults


def _audited(rule: str) -> frozenset[tuple[str, str]]:
    # auditctl orders fields and system calls as it likes
    words = ((m[1], m[2].split(",")) for m in re.finditer(r"(-\w) (\S+)", rule))
    return frozenset((option, value) for option, values in words for value in values)


def _module_faults(blocked: Iterable[str], loaded: str, config: str) -> list[str]:
    # the kernel and modprobe take - and _ for the same
    names = {line.split()[0] for line in loaded.splitlines() if line.strip()}
    # of several the first counts, by the names of their files
    commands = re.findall(r"^install (\S+) (.*\S)\s*$", config, re.M)
    loading = {name.replace("-", "_") for name, c in commands if not re.fullmatch(r"\S*true", c)}
    denied = {name.replace("-", "_") for name, _ in commands} - loading
    faults = []
    for module in blocked:
        name = module.replace("-", "_")
        if name in names:
            faults.append(f"module {module} is loaded")
        if name not in denied:
            faults.append(f"module {module} may be loaded")
    return faults


def _mount_options(mountinfo: str) -> dict[str, frozenset[str]]:
    """Options by mount point; of several at one, those of the last, which hides the others.

    Not what only waits for somebody to come, to mount another in its place (autofs).
    """
    rows = (line.split() for line in mountinfo.splitlines())
    return {
        _spelt(r[4]): frozenset(r[5].split(","))
        for r in rows
        if len(r) > 6 and "- autofs " not in " ".join(r[6:])
    }


def _spelt(place: str) -> str:
    # proc(5): what would end a word is written in octal
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), place)


def mount_faults(
    wanted: Mapping[str, tuple[str, ...]],
    mounts: Mapping[str, frozenset[str]],
    setuid: Iterable[str] = (),
) -> list[str]:
    """Which mount points are none, or lack an option. One that holds programs `setuid` may do so:
    NixOS has a place for them, below one where they do not count."""
    faults = []
    for place, options in wanted.items():
        if place not in mounts:
            faults.append(f"{place} is no mount of its own")
        elif missing := [o for o in options if o not in mounts[place]]:
            faults.append(f"{place} is mounted without {', '.join(missing)}")
    for place, held in mounts.items():
        above = [w for w in wanted if place.startswith(f"{w}/")]
        if place in wanted or not above:
            continue
        lacks = [o for o in wanted[max(above, key=len)] if o not in held]
        may = {"nosuid"} if any(p.startswith(f"{place}/") for p in setuid) else set()
        if missing := [o for o in lacks if o not in may]:
            faults.append(f"{place} is mounted without {', '.join(missing)}")
    return faults


# --- X6 --------------------------------------------------------------------------------------

# All at once, and only units that have a limit: of every unit there is it takes three times as long
# under TCG. The last line of each unit's table has the sum.
EXPOSURE_SCRIPT = """\
echo '== exposures =='
systemd-analyze security --no-pager %(units)s 2>&1 | grep 'Overall exposure level'
shown=$(systemctl show --no-pager -p %(properties)s -- %(running)s)
echo '== shown =='
printf '%%s\\n' "$shown"
echo '== processes =='
while IFS= read -r line; do
  [[ $line == ControlGroup=/* ]] || continue
  group=${line#*=}
  for pid in $(cat "/sys/fs/cgroup$group/"{,*/}cgroup.procs); do
    # at once: read line by line, it is made anew each time, and what grew meanwhile shifts the rest
    status=$(<"/proc/$pid/status") && [[ -n $status ]] || continue
    echo "$pid ControlGroup: $group"
    while read -r key value _; do
      case $key in Name:|CapBnd:|NoNewPrivs:|Seccomp:|Uid:) echo "$pid $key $value" ;; esac
    done <<<"$status"
  done
done 2>/dev/null <<<"$shown"
echo '== accounts =='
printf '%%s\\n' "$(</etc/passwd)"
"""
SANDBOX_PROPERTIES = (
    "Id", "ActiveState", "ControlGroup", "MainPID", "User", "NoNewPrivileges",
    "CapabilityBoundingSet", "SystemCallFilter",
)  # fmt: skip
# in the order of their bits (linux/capability.h)
CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid",
    "setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw",
    "ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct",
    "sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod",
    "lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog",
    "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore",
)  # fmt: skip


def exposure_script(subject: Subject) -> str:
    """The script that asks for the exposure of each unit that has a limit."""
    return EXPOSURE_SCRIPT % {
        "units": shlex.join(exposure_limits(subject)),
        "running": shlex.join(subject.units().values()),
        "properties": ",".join(SANDBOX_PROPERTIES),
    }


def _collect_exposures(target: VerifyTarget, deadline: float) -> str:
    return guest.run_script(target, exposure_script(target.subject), deadline)


EXPOSURES = Probe("exposures", _collect_exposures, 120.0)


def exposure_limits(subject: Subject) -> dict[str, float]:
    """The limit of each unit that has one, by the unit's name."""
    limits = {subject.units()[s.name]: s.exposure for s in subject.plan.services}
    return limits | subject.plan.hardening.exposures[subject.engine]


def judge_exposures(subject: Subject, output: str) -> Judgement:
    """No unit's exposure, as systemd-analyze reckons it, is over its limit of the Plan."""
    limits = exposure_limits(subject)
    expected = f"the exposure of {len(limits)} units at most what the Plan says of each"
    parts = guest.sections(output) or {}
    if not {"exposures", "shown", "processes", "accounts"} <= parts.keys():
        return unreadable(expected, "the answer about the units is incomplete")
    text = parts["exposures"]
    # of a template it makes an instance for the purpose
    rows = re.findall(r"exposure level for (\S+): ([\d.]+)", text)
    seen = {re.sub(r"@test.instance\.", "@.", unit): float(level) for unit, level in rows}
    if missing := [unit for unit in limits if unit not in seen]:
        return unreadable(expected, f"systemd-analyze said nothing of {', '.join(missing)}")
    faults = [
        f"{unit} is exposed by {seen[unit]:g}, {limit:g} are allowed"
        for unit, limit in limits.items()
        if seen[unit] > limit
    ]
    accounts = dict(re.findall(r"(?m)^([^:]+):[^:]*:(\d+):", parts["accounts"]))
    faults += process_faults(guest.properties(parts["shown"]), parts["processes"], accounts)
    spread = ", ".join(
        f"{unit} {seen[unit]:g}" for unit in sorted(limits, key=lambda u: -seen[u])[:3]
    )
    culprit = faults[0].split()[0] if faults else ""
    return judged(
        expected,
        f"all within their limits; the most are {spread}",
        faults,
        f"see what it is not denied: ravectl exec -- systemd-analyze security {culprit}",
    )


def process_faults(
    blocks: Iterable[Mapping[str, str]], text: str, accounts: Mapping[str, str]
) -> list[str]:
    """Where a unit's process has more rights than the unit: it was started when that had more, or
    by another and put beside the unit's own.

    `accounts` has the number of each account.
    """
    has: dict[str, dict[str, str]] = {}
    for pid, key, value in re.findall(r"^(\d+) (\w+): (\S+)$", text, re.M):
        has.setdefault(pid, {})[key] = value
    faults = []
    for block in blocks:
        main, unit = block.get("MainPID", "0"), block.get("Id", "a unit")
        if main == "0" or block.get("ActiveState") != "active":
            continue
        rights = has.get(main, {})
        # what systemd is about to start has not given up systemd's rights yet; its name is (UNIT)
        if not rights.get("Name", "").startswith("("):
            faults += _right_faults(block, unit, rights)
            uid, own = accounts.get(block.get("User", "")), rights.get("Uid", "nobody")
            if uid is not None and own != uid:
                faults.append(f"{unit} runs as {own}, not as {block['User']}")
        for pid, rights in has.items():
            if pid != main and rights.get("ControlGroup") == block.get("ControlGroup"):
                faults += _right_faults(block, f"{unit}: {rights.get('Name', pid)}", rights)
    return list(dict.fromkeys(faults))


def _right_faults(block: Mapping[str, str], who: str, rights: Mapping[str, str]) -> list[str]:
    if rights and "Seccomp" not in rights:  # it ended while it was asked
        return []
    faults = []
    if block.get("NoNewPrivileges") == "yes" and rights.get("NoNewPrivs") != "1":
        faults.append(f"{who} runs without NoNewPrivileges=")
    if block.get("SystemCallFilter") and rights.get("Seccomp") != "2":
        faults.append(f"{who} runs without SystemCallFilter=")
    bounds = block.get("CapabilityBoundingSet", "").replace("cap_", "").split()
    allowed = sum(1 << CAPABILITIES.index(c) for c in bounds if c in CAPABILITIES)
    if int(rights.get("CapBnd", "f" * 16), 16) & ~allowed:
        faults.append(f"{who} runs with more than CapabilityBoundingSet=")
    return faults


CHECKS = (
    Check("X5", Suite.SECURITY, "the kernel and the mounts deny what they should", KERNEL,
          judge_kernel),
    Check("X6", Suite.SECURITY, "no unit is exposed more than it may be", EXPOSURES,
          judge_exposures),
)  # fmt: skip
