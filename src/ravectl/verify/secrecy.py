"""Checks of secrets: they are the ones that the files hold, closed to others, and nowhere else.

What must not be seen is looked for by its value: in the guest's processes, journal and units,
and in the machine's disk and image as this host has them, which shows deleted files too. Values
travel by standard input, and answers name places and secrets, never values.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ravectl import command
from ravectl.model import Plan, Secret, SecretKind, Suite
from ravectl.verify import guest
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    at_once,
    judged,
    unreadable,
)

FILES = "/run/secrets"
# The journal's text, because long entries are compressed in its files; and its files, because they
# hold every field. What is in a unit's environment is in its files, or a process has it.
SCRIPT = """\
echo '== files =='
find -L %(files)s/ -type f -printf '%%P %%u %%g %%m\\n'
echo '== lists =='
ls -lnaR %(files)s/ | grep -E '^[^ ]{10}[+]'
echo '== mount =='
here=$(readlink -f %(files)s)
while read -r _ on kind options _; do
  [[ "$here/" == "$on/"* ]] && echo "$on $kind $options"
done </proc/mounts
echo '== swap =='
read -r -d '' swaps </proc/swaps
printf '%%s\\n' "$swaps"
echo '== digests =='
cd %(files)s/ && find -L . -type f -exec sha256sum -- {} +
cd /
umask 077
patterns=/run/secrets.d/.looked-for
trap 'rm -f "$patterns"' EXIT
base64 -d >"$patterns" <<<'%(values)s'
echo '== places =='
grep -laFf "$patterns" /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null
journalctl --quiet --no-pager --output=cat | grep -qaFf "$patterns" && echo 'the journal'
grep -rlaFf "$patterns" /var/log/journal /run/log/journal /etc/systemd /run/systemd 2>/dev/null
systemctl show-environment | grep -qaFf "$patterns" && echo "the manager's environment"
shared=()
while read -r _ on kind _; do
  [[ $kind != tmpfs || $on == /run/secrets.d || $on == /run/credentials/* ]] || shared+=("$on")
done </proc/mounts
# A disk is searched on its host; here what others than root may read of what lies in memory. A
# credential of a unit has an ACL for its account, which looks like a group's right; two services
# have a configuration with keys in it, in a folder that is closed to others. No service can make
# the search endless by a file that is large, or says it is.
for on in /run/claude-code-router /run/rave-ingress; do
  [[ ! -e $on || $(ls -lnd "$on") == d??????---[.\\ ]* ]] || echo "$on, which is open to others"
done
(
  ulimit -v 400000
  timeout 60 find "${shared[@]}" -xdev -path /run/claude-code-router -prune -o \\
    -path /run/rave-ingress -prune -o -type d -user root ! -perm /011 -prune -o \\
    -type f \\( -perm /044 -o ! -user root \\) -size -64M -exec grep -laFf "$patterns" {} +
) 2>/dev/null
"""
DISK, IMAGE = "the machine's disk", "the image"


def _collect(target: VerifyTarget, deadline: float) -> str:
    hidden = {name: core(value) for name, value in target.hidden.items()}
    # in base64, so that no value can be anything to the shell
    values = base64.b64encode(_patterns(hidden)).decode()
    script = SCRIPT % {"files": FILES, "values": values}
    # what was written just now is to be on the disk before this host looks at it
    guest.run_script(target, "sync", deadline, root=True)
    output, disk = at_once(
        [
            lambda: guest.run_script(target, script, deadline, root=True),
            lambda: _on_disk(target, hidden),
        ]
    )
    wanted = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  ./{name}\n"
        for name, text in sorted(target.delivery.items())
    )
    rest = output.removesuffix(f"{guest.END}\n")
    return f"{rest}== disk ==\n{disk}== wanted ==\n{wanted}{guest.END}\n"


def _on_disk(target: VerifyTarget, hidden: Mapping[str, str]) -> str:
    """Which values this host finds in the machine's disk."""
    if not target.disks:
        return "not looked at\n"
    every = _patterns(hidden)
    seen = ""
    for what, disk in target.disks.items():
        # most often none is there, and one reading says so
        if _found(disk, every):
            names = [n for n, v in sorted(hidden.items()) if _found(disk, f"{v}\n".encode())]
            seen += "".join(f"{name} is on {what}\n" for name in names)
    return seen or "nothing\n"


def _patterns(hidden: Mapping[str, str]) -> bytes:
    """A line for each value; nothing for none, because grep finds an empty line everywhere."""
    return "".join(f"{v}\n" for v in sorted(set(hidden.values())) if v).encode()


def _found(disk: Path, patterns: bytes) -> bool:
    argv: command.Argv = ["grep", "--quiet", "--text", "--fixed-strings", "--file=-", disk]
    # bytes, not characters of whatever this host speaks
    env = {**os.environ, "LC_ALL": "C"}
    result = command.run(argv, stdin=patterns, env=env, check=False, timeout=120)
    if result.returncode > 1:
        raise command.failure(result, f"see whether it can be read: {shlex.quote(str(disk))}")
    return result.returncode == 0


def core(value: str) -> str:
    """What is unmistakable of a value: of a key in PEM its last full line.

    The first line is the same in every Ed25519 key that OpenSSH writes; in the last full one
    the private part stands (of an elliptic curve key in PKCS#8, 156 of its bits).
    """
    lines = [line for line in value.strip().splitlines() if not line.startswith("-----")]
    return max(reversed(lines), key=len, default=value)


SECRETS = Probe("secrets", _collect, 150.0)


def judge_secrecy(subject: Subject, output: str) -> Judgement:
    """Each secret has its owner and mode on a tmpfs, and none is seen anywhere else."""
    expected = "owners and modes as declared, on a tmpfs that is not swapped, seen nowhere else"
    parts = guest.sections(output)
    if parts is None or not {"files", "lists", "mount", "swap", "places", "disk"} <= parts.keys():
        return unreadable(expected, "the files, the mount or the search are missing")
    if not parts["disk"].strip() or not parts["mount"].strip():
        return unreadable(expected, "the mount or the disk could not be looked at")
    faults, count = file_faults(subject.plan, parts["files"].splitlines())
    faults += [f"an access control list opens {x.split()[-1]}" for x in parts["lists"].splitlines()]
    faults += mount_faults(parts["mount"].splitlines(), parts["swap"].splitlines())
    faults += [f"a value is seen in {p}" for p in parts["places"].splitlines()]
    disk = parts["disk"].splitlines()
    if disk == ["not looked at"]:
        return unreadable(expected, "the machine's disk is not on this host")
    faults += [line for line in disk if line != "nothing"]
    return judged(
        expected,
        f"{count} files so; no value in a process, the journal, a unit or on a disk",
        faults,
        "find what wrote it (ravectl logs), mend it, then: ravectl rotate-secrets",
    )


def file_faults(plan: Plan, lines: Iterable[str]) -> tuple[list[str], int]:
    """Where files below /run/secrets are not as declared, and how many there are. Pure."""
    declared = {f: s for s in plan.delivered() for f in _files(s)}
    faults, seen = [], set()
    for line in lines:
        name, _, state = line.partition(" ")
        seen.add(name)
        if name not in declared:
            faults.append(f"{name} is not declared")
            continue
        s = declared[name]
        wanted = f"{s.owner} {s.group} {int(s.mode, 8):o}"
        if state != wanted:
            faults.append(f"{name} is {state}, not {wanted}")
    for s in plan.delivered():
        if s.name not in seen and s.kind is not SecretKind.GIVEN:
            faults.append(f"{s.name} is missing")
    return faults, len(seen)


def _files(s: Secret) -> tuple[str, ...]:
    grace = (s.previous, f"{s.previous}-until") if s.grace_hours else ()
    return (s.name, *grace)


def mount_faults(mounts: Iterable[str], swaps: Iterable[str]) -> list[str]:
    """What may bring the files to a disk: their file system, or swap. Pure."""
    # the innermost mount is the one that holds them
    on, kind, options = max((m.split() for m in mounts), key=lambda m: len(m[0]))
    if kind not in ("tmpfs", "ramfs"):
        return [f"{on} is a {kind}"]
    swapped = len(list(swaps)) > 1  # the first line is a heading
    if kind == "tmpfs" and swapped and "noswap" not in options.split(","):
        return [f"{on} can be swapped out"]
    return []


def judge_agreement(subject: Subject, output: str) -> Judgement:
    """The guest holds what the encrypted files hold, all of it and nothing else."""
    expected = "each secret in the machine is the one that the encrypted files hold"
    parts = guest.sections(output)
    if parts is None or not {"digests", "wanted"} <= parts.keys():
        return unreadable(expected, "the digests are missing")
    there, wanted = (_digests(parts[k]) for k in ("digests", "wanted"))
    if not wanted or not there:
        return unreadable(expected, "there are no digests")
    faults = [f"{n} is missing" for n in sorted(wanted.keys() - there.keys())]
    faults += [f"{n} should not be there" for n in sorted(there.keys() - wanted.keys())]
    faults += [
        f"{n} has another value" for n in sorted(there.keys() & wanted.keys())
        if there[n] != wanted[n]
    ]  # fmt: skip
    return judged(expected, f"{len(there)} files agree", faults, "ravectl secrets deliver")


def _digests(text: str) -> dict[str, str]:
    rows = (line.partition("  ") for line in text.splitlines())
    return {name: digest for digest, _, name in rows if len(digest) == 64}


CHECKS = (
    Check(
        "X4", Suite.SECURITY, "secrets are closed to others and seen nowhere else",
        SECRETS, judge_secrecy,
    ),
    Check(
        "D6", Suite.DATA, "the machine's secrets are those of the encrypted files",
        SECRETS, judge_agreement,
    ),
)  # fmt: skip
