"""A check of the suite `security`: the machine's system is, file by file, that of its image.

Other checks ask what a service does; this one asks whether anything was changed at all. The
kernel sets a file's ctime at each change, and no program can set it back but by setting the clock,
so only what is newer than the image is looked at: that takes seconds, not the minutes that hashing
a system takes under emulation.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ravectl import inventory
from ravectl.engines.debian import EPOCH
from ravectl.model import EngineName, Suite
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

MOST = 2000  # paths that are looked at; a system of which more changed is another

# Where configuration is read from that lies in memory: all of it goes before that of the image.
RUNTIME = (
    "/run/systemd/system", "/run/systemd/system.control", "/run/systemd/system.attached",
    "/run/systemd/transient", "/run/systemd/network", "/run/systemd/user", "/run/udev/rules.d",
    "/run/sysctl.d", "/run/modprobe.d", "/run/modules-load.d", "/run/tmpfiles.d",
    "/run/sysusers.d", "/run/environment.d", "/run/binfmt.d", "/run/userdb",
    "/run/systemd/generator.early", "/run/systemd/system-generators",
    "/run/systemd/user-generators", "/run/systemd/system-environment-generators",
    "/run/systemd/user-environment-generators", "/run/udev/hwdb.d", "/run/extensions",
    "/run/confexts", "/run/credstore", "/run/credstore.encrypted",
    *(f"/run/systemd/{name}.conf.d" for name in (
        "coredump", "journald", "logind", "networkd", "resolved", "sleep", "system", "timesyncd",
        "user",
    )),
)  # fmt: skip
LINKS = ("bin", "lib", "lib64", "sbin")  # beside those folders
TRANSIENT = "/run/systemd/transient/"  # units of a session or a command, beside those of the image
# what systemd gives to every service that it starts, by names
ENVIRONMENT = {
    EngineName.DEBIAN: ("LANG", "PATH"), EngineName.NIX: ("LANG", "PATH", "LOCALE_ARCHIVE", "TZDIR")
}  # fmt: skip
USER_HZ = 100  # ticks a second in /proc/PID/stat: the same on each amd64 (time(7))
_SECONDS = r"(\d{1,18}(?:\.\d+)?)"

_UNDO = (
    "undo it (for nginx, then ravectl exec -- sudo systemctl reload nginx), or get the image's own "
    "disk: ravectl reset"
)

# The last row says how many came before it, so that one that broke off is seen.
_DESCRIBE = """\
import hashlib, json, os, stat, sys
kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "link"}
count = 0
for raw in filter(None, sys.stdin.buffer.read().split(b"\\0")):
    count += 1
    content, cap, inner = "", "", []
    try:
        s = os.lstat(raw)
        kind = kinds.get(stat.S_IFMT(s.st_mode), "other")
        if kind == "file":
            with open(raw, "rb") as f:
                content = hashlib.file_digest(f, "sha256").hexdigest()
            if "security.capability" in os.listxattr(raw):
                cap = os.getxattr(raw, "security.capability").hex()
        elif kind == "link":
            content = os.fsdecode(os.readlink(raw))
        elif kind == "dir":
            inner = sorted(os.listdir(os.fsdecode(raw)))
        if kind in ("file", "dir") and any("posix_acl" in n for n in os.listxattr(raw)):
            cap += "acl"
        mode = 0o777 if kind == "link" else stat.S_IMODE(s.st_mode)
        row = [os.fsdecode(raw), kind, mode, s.st_uid, s.st_gid, content, cap, inner]
    except FileNotFoundError:
        count -= 1
        continue
    except OSError as e:
        row = [os.fsdecode(raw), "error", 0, 0, 0, str(e), "", []]
    print(json.dumps(row))
print(json.dumps(count))
"""

# `head` ends before `find` has said all of a system that is another
IMAGE_SCRIPT = """\
echo '== changed =='
find %(folders)s -xdev -newerct @%(epoch)d -print0 |
  head -z -n %(most)d | /usr/bin/python3 -IB -c %(code)s
echo '== runtime =='
find %(runtime)s ! -type d -print 2>/dev/null
%(shared)s
echo '== ingress =='
read -r up _ </proc/uptime
echo "booted $EPOCHREALTIME $up"
for pid in $(</sys/fs/cgroup/system.slice/%(ingress)s/cgroup.procs); do
  IFS= read -r stat <"/proc/$pid/stat" && echo "process $stat"
done 2>/dev/null
find /etc/nginx ! -type d -printf 'changed %%C@ %%p\\n' | sort -rnk2 | head -n 1
# that of an older image knows no argument, and would make the file anew
if [[ $(</usr/lib/rave/ingress-config) == *'$# -gt 0'* ]]; then
  cmp -s <(/usr/lib/rave/ingress-config -) /run/rave-ingress/router-key.conf || echo 'another'
fi
"""

# /etc is links into the store there, which nobody can write to
STORE_SCRIPT = """\
echo '== system =='
for name in /run/booted-system /run/current-system /etc/static /run/current-system/etc; do
  echo "$name $(readlink -f "$name")"
done
echo '== etc =='
diff --recursive --brief /etc/static /etc 2>&1 | grep -vE '^(Only in /etc[:/]|diff: )'
echo '== runtime =='
find %(runtime)s ! -type d -print 2>/dev/null
%(shared)s
"""

# A service sees the files that its own mounts have
SHARED_SCRIPT = """\
echo '== mounts =='
printf '%%s\\n' "$(</proc/self/mountinfo)"
echo '== environment =='
systemctl show-environment | cut -d= -f1
echo '== running =='
systemctl show --no-pager -p Id,MainPID -- %(units)s
echo '== inside =='
inside=()
for pid in $(systemctl show -P MainPID -- %(units)s | grep '[1-9]'); do
  inside+=("/proc/$pid/mountinfo")
done
grep -HE '^([^ ]+ ){4}/(%(tops)s)[/ ]' "${inside[@]}" </dev/null 2>/dev/null
"""


def integrity_script(subject: Subject) -> str:
    """The script that shows what was changed since the image was made, and what goes before it."""
    values = {
        "folders": shlex.join(f"/{f}" for f in (*inventory.FOLDERS, *LINKS)), "epoch": EPOCH,
        "most": MOST, "code": shlex.quote(_DESCRIBE), "runtime": shlex.join(RUNTIME),
        "units": shlex.join([*subject.units().values(), *subject.helpers()]),
        "tops": "|".join(inventory.FOLDERS), "ingress": subject.units()["ingress"],
    }  # fmt: skip
    values["shared"] = SHARED_SCRIPT % values
    return (STORE_SCRIPT if subject.engine is EngineName.NIX else IMAGE_SCRIPT) % values


def _collect(target: VerifyTarget, deadline: float) -> str:
    script = integrity_script(target.subject)
    output = guest.run_script(target, script, deadline, root=True)
    # these are ours: what a guest says of them is no answer
    output = re.sub(r"(?m)^== (image|known) ==$", "", output)
    if target.inventory is None:
        return output
    return output.removesuffix(f"{guest.END}\n") + image_rows(output, target.inventory)


def image_rows(output: str, path: Path) -> str:
    """What the image holds at the paths of an answer, and which transient units it has, too."""
    entries = inventory.load(path)
    parts = guest.sections(output) or {}
    inner: dict[str, list[str]] = {}
    for name in entries:
        inner.setdefault(posixpath.dirname(name), []).append(posixpath.basename(name))
    rows = []
    for row in _rows(parts.get("changed", "")) or ():
        name = row[0]
        if e := entries.get(name):
            held = [name, e.kind, e.mode, e.uid, e.gid, e.content, e.capability]
            rows.append([*held, sorted(inner.get(name, ())) if e.kind == "dir" else []])
    image = "".join(json.dumps(r) + "\n" for r in [*rows, len(rows)])
    units = {*inner.get("/usr/lib/systemd/system", ()), *inner.get("/etc/systemd/system", ())}
    beside = {_unit(p) for p in parts.get("runtime", "").splitlines() if p.startswith(TRANSIENT)}
    known = "".join(f"{u}\n" for u in sorted(beside) if {u, _template(u)} & units)
    return f"== image ==\n{image}== known ==\n{known}{guest.END}\n"


def _unit(path: str) -> str:
    """The unit that a file below TRANSIENT is, or is a drop-in of."""
    return path.removeprefix(TRANSIENT).split("/")[0].removesuffix(".d")


def _template(unit: str) -> str:
    return re.sub(r"@[^.]*\.", "@.", unit, count=1)


INTEGRITY = Probe("integrity", _collect, 120.0)


def judge_integrity(subject: Subject, output: str) -> Judgement:
    """No file of the system is other than in the image, and none goes before those."""
    expected = "each file of the system as in the image, but for what is the machine's own"
    parts = guest.sections(output)
    nix = subject.engine is EngineName.NIX
    if parts is None or not {
        "runtime",
        "mounts",
        "environment",
        "running",
        "inside",
        *(("system", "etc") if nix else ("changed", "ingress")),
    } <= (parts.keys()):
        return unreadable(expected, "the answer about the system's files is incomplete")
    places = [words[4] for words in map(str.split, parts["mounts"].splitlines()) if len(words) > 6]
    if "/" not in places:
        return unreadable(expected, "the machine does not say what is mounted")
    if nix:
        found = _store_faults(parts["system"], parts["etc"])
        seen = "the system that was booted, as the store has it"
    elif not {"image", "known"} <= parts.keys():
        remedy = "make one that has: ravectl build, then ravectl reset"
        return Judgement(False, expected, "its image has no inventory", remedy, ran=False)
    else:
        found, seen = _image_faults(subject, parts)
    if found is None:
        return unreadable(expected, "the machine does not say which system it runs")
    planned = {*subject.units().values(), *subject.helpers(), *parts.get("known", "").splitlines()}
    faults = [
        *found,
        *(
            f"{p} goes before the image"
            for p in parts["runtime"].splitlines()
            if not _is_beside(p, planned)
        ),
        *(f"something is mounted over {p}" for p in places if p.split("/")[1] in inventory.FOLDERS),
        *(f"each service gets {name}=" for name in parts["environment"].splitlines()
          if name not in ENVIRONMENT[subject.engine]),
        *mount_faults(guest.properties(parts["running"]), parts["inside"], places),
    ]  # fmt: skip
    return judged(expected, seen, faults, _UNDO)


def _image_faults(subject: Subject, parts: Mapping[str, str]) -> tuple[list[str] | None, str]:
    changed, image = _rows(parts["changed"]), _rows(parts["image"])
    if changed is None or image is None:
        return None, ""
    own = subject.plan.hardening.own_files[subject.engine]
    ingress = ingress_faults(parts["ingress"])
    if ingress is None:
        return None, ""
    faults = [*file_faults(changed, image, own), *ingress]
    if len(changed) >= MOST:
        faults.append(f"{MOST} paths or more are newer than the image; no more were looked at")
    return faults, (
        f"{len(changed)} paths are newer than the image, each the same or the machine's own"
    )


def mount_faults(
    blocks: Iterable[Mapping[str, str]], text: str, places: Collection[str] = ()
) -> list[str]:
    """What a unit's main process sees in the place of the system's files, beside what everybody
    sees at `places`.

    systemd mounts what is there once more, to close it for writing, and nothing over what it hides.
    """
    units = {b.get("MainPID"): b.get("Id") for b in blocks}
    faults = []
    for pid, source, place in re.findall(r"^/proc/(\d+)/\S+:\S+ \S+ \S+ (\S+) (\S+) ", text, re.M):
        hidden = source.startswith("/systemd/inaccessible/")
        if source != place and place not in places and not hidden:
            faults.append(f"something is mounted over {place} for {units.get(pid, pid)}")
    return faults


def ingress_faults(text: str) -> list[str] | None:
    """Where nginx may have another configuration than its files; None when that is not told.

    Its workers begin anew each time that it has read them.
    """
    booted = re.search(rf"(?m)^booted {_SECONDS} {_SECONDS}$", text)
    ticks = re.findall(r"(?m)^process .*\) \S(?: \S+){18} (\d{1,18}) ", text)
    changed = re.search(rf"(?m)^changed {_SECONDS} (.*)$", text)
    if booted is None or changed is None:
        return None
    faults = []
    if not ticks:
        faults.append("nginx does not run, so nobody knows what it has read")
    elif float(changed[1]) > float(booted[1]) - float(booted[2]) + max(map(int, ticks)) / USER_HZ:
        faults.append(f"{changed[2]} was changed after nginx had read it")
    # that file goes with it
    if ticks and "another" in text.splitlines():
        faults.append("/run/rave-ingress/router-key.conf is not as ingress-config makes it")
    return faults


def _is_beside(path: str, planned: Collection[str]) -> bool:
    """Whether it is a unit that systemd made on demand, and none of the Plan's."""
    unit = _unit(path)
    # a drop-in for all services has no name, one for all of a name a dash at its end
    named = re.fullmatch(r"[^/]*[^/-]\.[a-z]+", unit)
    return path.startswith(TRANSIENT) and bool(named) and unit not in planned


def _rows(text: str) -> list[list[Any]] | None:
    """The rows, or None when any is not of the form or they are not as many as the last says."""
    found = []
    lines = text.splitlines()
    for line in lines[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not (isinstance(row, list) and len(row) == 8 and isinstance(row[0], str)):
            return None
        found.append(row)
    return found if lines[-1:] == [str(len(found))] else None


def file_faults(
    changed: Iterable[list[Any]], image: Iterable[list[Any]], own: Collection[str]
) -> list[str]:
    """What of the rows that are newer than the image is other than in it."""
    held = {row[0]: row for row in image}
    faults = []
    for row in changed:
        path, there = row[0], held.get(row[0])
        if path in own:
            continue
        if row[1] == "error":
            faults.append(f"{path} cannot be looked at: {row[5]}")
            continue
        if there is None:
            faults.append(f"{path} is not in the image")
            continue
        faults += [f"{path} {what}" for what in _differences(row, there)]
        names = {posixpath.join(path, n) for n in there[7]} - {
            posixpath.join(path, n) for n in row[7]
        }
        faults += [f"{name} is gone" for name in sorted(names - set(own))]
    return faults


def _differences(row: list[Any], there: list[Any]) -> list[str]:
    _, kind, mode, uid, gid, content, capability, _ = row
    _, kind_, mode_, uid_, gid_, content_, capability_, _ = there
    if kind != kind_:
        return [f"is a {kind}, not a {kind_}"]
    found = []
    if content != content_:
        found.append("has other content than in the image" if kind == "file" else
                     f"leads to {content}, not to {content_}")  # fmt: skip
    if (mode, uid, gid) != (mode_, uid_, gid_):
        found.append(f"is {uid}:{gid} {mode:o}, not {uid_}:{gid_} {mode_:o}")
    if capability.removesuffix("acl") != capability_:
        found.append("has other capabilities than in the image")
    if capability.endswith("acl"):
        found.append("has an access control list")
    return found


def _store_faults(text: str, etc: str) -> list[str] | None:
    """Where NixOS runs another system than it booted, or /etc has others' files in the place of
    the system's; None when it does not say."""
    leads: Mapping[str, str] = dict(line.partition(" ")[::2] for line in text.splitlines())
    booted, current = leads.get("/run/booted-system"), leads.get("/run/current-system")
    if not booted or not booted.startswith("/nix/store/"):
        return None
    faults = [f"/etc is not the system's: {line}" for line in etc.splitlines()]
    if current != booted:
        faults.append(f"the system is {current}, not {booted}, which was booted")
    if leads.get("/etc/static") != leads.get("/run/current-system/etc"):
        faults.append("/etc is of another system")
    return faults


CHECKS = (
    Check("X7", Suite.SECURITY, "the system's files are those of the image", INTEGRITY,
          judge_integrity),
)  # fmt: skip
