"""Each judgement, on what a healthy machine answered and on the same answer gone wrong.

The answers under `recorded/` are a real SAFE machine's (tests/record.py). A row of BROKEN changes
one thing in one answer: exactly the check named fails, says the phrase, and names a remedy. A row
of UNREADABLE leaves nothing to judge: that is an error, never a pass and never a failure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ravectl import profile
from ravectl.model import EngineName
from ravectl.plan import DASHBOARDS, make_plan
from ravectl.verify import CHECKS, Check, Judgement, Subject, integrity
from ravectl.verify.hardening import mount_faults
from ravectl.verify.http import nearest_rank
from ravectl.verify.service import boot_offset

RECORDED = Path(__file__).parent / "recorded"
SUBJECT = Subject(make_plan(**profile.select("safe", {}, None).plan_arguments()), EngineName.DEBIAN)
BY_ID = {c.id: c for c in CHECKS}

Change = Callable[[str], str]
Rows = list[dict[str, Any]]


def recorded(check: Check) -> str:
    return (RECORDED / f"{check.probe.name}.txt").read_text()


def judge(check: Check, output: str) -> Judgement:
    return check.judge(SUBJECT, output)


# --- how an answer is changed ----------------------------------------------------------------


def swap(old: str, new: str) -> Change:
    """The first `old` of the answer becomes `new`."""

    def change(text: str) -> str:
        assert old in text, f"the recording does not hold {old!r}"
        return text.replace(old, new, 1)

    return change


def chain(*changes: Change) -> Change:
    def change(text: str) -> str:
        for one in changes:
            text = one(text)
        return text

    return change


def unit(name: str, **values: str) -> Change:
    """Properties of one unit, as `systemctl show` printed them."""

    def change(text: str) -> str:
        blocks = text.split("\n\n")
        (at,) = [i for i, b in enumerate(blocks) if f"\nId={name}\n" in b]
        block = blocks[at]
        for key, value in values.items():
            block, count = re.subn(rf"(?m)^{key}=.*$", f"{key}={value}", block, count=1)
            assert count == 1, key
        return "\n\n".join([*blocks[:at], block, *blocks[at + 1 :]])

    return change


def within(name: str, line: str) -> Change:
    """One more line at the start of a section."""
    return swap(f"== {name} ==\n", f"== {name} ==\n{line}\n")


def without(name: str) -> Change:
    """A section left out."""

    def change(text: str) -> str:
        found = re.sub(rf"(?ms)^== {name} ==\n.*?(?=^== )", "", text)
        assert found != text
        return found

    return change


def every(pattern: str) -> Change:
    """Whatever is of the pattern is left out."""

    def change(text: str) -> str:
        found, count = re.subn(pattern, "", text)
        assert count
        return found

    return change


def process(name: str, key: str, value: str) -> Change:
    """What the kernel says of the main process of a unit."""

    def change(text: str) -> str:
        (block,) = [b for b in text.split("\n\n") if f"\nId={name}\n" in f"\n{b}\n"]
        pid = re.search(r"(?m)^MainPID=(\d+)$", block)
        assert pid
        found, count = re.subn(rf"(?m)^{pid[1]} {key}: .*$", f"{pid[1]} {key}: {value}", text)
        assert count == 1
        return found

    return change


FIELDS = ("path", "kind", "mode", "uid", "gid", "content", "capability", "inner")
FILE = json.dumps(["/etc/fstab", "file", 0o644, 0, 0, "1" * 64, "", []])
FOLDER = '["/etc/nginx", "dir", 493, 0, 0, "", "", %s]'


def row(name: str, line: str) -> Change:
    """One more row in a section whose last line counts them."""

    def change(text: str) -> str:
        head, _, rest = text.partition(f"== {name} ==\n")
        body, mark, tail = rest.partition("\n== ")
        *lines, count = body.splitlines()
        more = "\n".join([line, *lines, str(int(count) + 1)])
        return f"{head}== {name} ==\n{more}{mark}{tail}"

    return change


def many(count: int) -> Change:
    return chain(*[file(f"/usr/{n}") for n in range(count)])


def file(path: str, **values: Any) -> Change:
    """A file that is newer than the image, with other `values` than it has there."""
    held = dict(zip(FIELDS, json.loads(FILE), strict=True)) | {"path": path}
    there = json.dumps(list((held | values).values()))
    return chain(row("changed", there), row("image", json.dumps(list(held.values()))))


def rows(where: dict[str, str], edit: Callable[[dict[str, Any]], object]) -> Change:
    """`edit` each JSON line whose values are those of `where`; other lines stay."""

    def change(text: str) -> str:
        out, hits = [], 0
        for line in text.splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            if row and all(row.get(k) == v for k, v in where.items()):
                edit(row)
                hits += 1
                line = json.dumps(row)  # noqa: PLW2901
            out.append(line)
        assert hits, where
        return "\n".join(out) + "\n"

    return change


def put(where: dict[str, str], **values: Any) -> Change:
    return rows(where, lambda row: row.update(values))


def lost(where: dict[str, str], key: str, **values: Any) -> Change:
    """The answer of a row gives way to something else."""

    def edit(row: dict[str, Any]) -> None:
        del row[key]
        row.update(values)

    return rows(where, edit)


def gone(where: dict[str, str]) -> Change:
    """The JSON lines whose values are those of `where` are left out."""

    def change(text: str) -> str:
        kept = []
        for line in text.splitlines():
            row = json.loads(line) if line.startswith("{") else {}
            if not (row and all(row.get(k) == v for k, v in where.items())):
                kept.append(line)
        assert len(kept) < len(text.splitlines()), where
        return "".join(f"{line}\n" for line in kept)

    return change


def header(page: str, **values: str | None) -> Change:
    """Headers of one page; None takes one away, `_` stands for `-`."""

    def edit(row: dict[str, Any]) -> None:
        for name, value in values.items():
            key = name.replace("_", "-")
            row["headers"].pop(key, None)
            if value is not None:
                row["headers"][key] = value

    return rows({"page": page}, edit)


def ruleset(edit: Callable[[Rows], object]) -> Change:
    """The firewall's rules, as nft printed them."""

    def change(text: str) -> str:
        (line,) = [x for x in text.splitlines() if x.startswith('{"nftables"')]
        tree = json.loads(line)
        edit(tree["nftables"])
        return text.replace(line, json.dumps(tree))

    return change


def policy_accept(items: Rows) -> None:
    (found,) = [i["chain"] for i in items if i.get("chain", {}).get("name") == "input"]
    found["policy"] = "accept"


def rule(*expr: dict[str, Any]) -> Change:
    """One more rule of the input chain."""
    body = {"family": "inet", "table": "rave", "chain": "input", "handle": 99, "expr": list(expr)}
    return ruleset(lambda items: items.append({"rule": body}))


def match(protocol: str, field: str, right: Any) -> dict[str, Any]:
    left = {"payload": {"protocol": protocol, "field": field}}
    return {"match": {"op": "==", "left": left, "right": right}}


def targets(edit: Callable[[Rows], object]) -> Change:
    """`edit` what Prometheus says of its targets."""

    def change(text: str) -> str:
        (line,) = [x for x in text.splitlines() if x.startswith("{")]
        tree = json.loads(line)
        edit(tree["data"]["activeTargets"])
        return text.replace(line, json.dumps(tree))

    return change


def loaded(edit: Callable[[Rows], object]) -> Change:
    """The rules of one group that has several, as Prometheus lists them."""

    def change(text: str) -> str:
        (line,) = [x for x in text.splitlines() if x.startswith("{") and '"groups"' in x]
        tree = json.loads(line)
        (group,) = [g for g in tree["data"]["groups"] if g["name"] == "upkeep"]
        edit(group["rules"])
        return text.replace(line, json.dumps(tree))

    return change


def regex(pattern: str, new: str) -> Change:
    """The first match of a pattern becomes something else."""

    def change(text: str) -> str:
        found, count = re.subn(pattern, new, text, count=1)
        assert count == 1, f"the recording does not hold {pattern!r}"
        return found

    return change


def counted(route: str, buckets: dict[str, int]) -> Change:
    """What the ingress says of one route's requests."""
    return rows({}, lambda r: "counted" in r and r["counted"].update({route: buckets}))


def clock(uptime: str, age: str) -> Change:
    """How long the guest, and its QEMU, ran when it was asked; seconds."""
    return chain(
        regex(r"== uptime ==\n.*", f"== uptime ==\n{uptime}"),
        regex(r"== age ==\n.*", f"== age ==\n{age}"),
    )


def finished(at: int | str) -> Change:
    """When the boot had finished, in microseconds."""
    return regex(r"FinishTimestampMonotonic=\d+", f"FinishTimestampMonotonic={at}")


def offer(key: str, algorithm: str) -> Change:
    """sshd offers one more algorithm in its KEXINIT."""

    def edit(row: dict[str, Any]) -> None:
        if "offer" in row:
            row["offer"][key].append(algorithm)

    return rows({}, edit)


def digest(section: str, name: str) -> Change:
    """Another digest of one file, in one section."""

    def change(text: str) -> str:
        pattern = rf"(?ms)(^== {section} ==\n.*?^)[0-9a-f]{{64}}(  \./{name}\n)"
        found, count = re.subn(pattern, rf"\g<1>{'0' * 64}\g<2>", text, count=1)
        assert count == 1
        return found

    return change


ACCEPT = {"accept": None}
NGINX, ROUTER, KANBAN = "nginx.service", "claude-code-router.service", "vibe-kanban.service"
PASSWORD_TRY = {"try": "password"}
ROOT_TRY = {"try": "key", "user": "root"}
CONSOLE = "localhost/, signed in"
LISTENER = 'tcp LISTEN 0 80 {0} 0.0.0.0:* users:(("postgres",pid=9,fd=6))'
START = clock("39.34", "40.793")  # QEMU needed 1.453 s before the guest's clock began
SLOW = 90_000_000  # us: a start that S3 does not allow


# --- the tables ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """One thing wrong, the checks that it fails, and what the first of them must say."""

    ids: str
    name: str
    change: Change
    says: str


BROKEN = (
    # S1, S2
    Broken("S1", "degraded", chain(
        swap("SystemState=running", "SystemState=degraded"),
        swap("NFailedUnits=0", "NFailedUnits=1"),
        within("failed", "apt-daily.service loaded failed failed Daily apt"),
    ), "apt-daily.service has failed"),
    Broken("S1", "failed but not listed", swap("NFailedUnits=0", "NFailedUnits=2"),
           "2 units have failed"),
    Broken("S1", "still starting", chain(
        swap("SystemState=running", "SystemState=starting"),
        within("jobs", "12 slow.service start running"),
    ), "slow.service has a job waiting"),
    Broken("S2", "a unit failed",
           unit(NGINX, ActiveState="failed", SubState="failed", Result="exit-code"),
           "nginx.service is failed (failed, exit-code)"),
    Broken("S2", "nobody sets the clock",
           unit("rave-clock.service", ActiveState="inactive", SubState="dead"),
           "rave-clock.service is inactive"),
    Broken("S2", "a unit is stopped", unit(KANBAN, ActiveState="inactive", SubState="dead"),
           "vibe-kanban.service is inactive (dead)"),
    Broken("S2", "a unit is not there", unit(NGINX, LoadState="not-found"),
           "nginx.service is not-found"),
    Broken("S2", "a unit is masked", unit(NGINX, LoadState="masked"), "nginx.service is masked"),
    Broken("S2", "restarted again and again",
           chain(unit(ROUTER, NRestarts="7", ActiveEnterTimestampMonotonic="16000000"), START),
           "claude-code-router.service was restarted 7 times"),
    # S3
    Broken("S3", "a unit came late", chain(
        finished(SLOW + 1),
        unit(NGINX, ActiveEnterTimestampMonotonic=str(SLOW)),
        START,
    ), "91.5 s, the last was nginx.service"),
    Broken("S3", "never active", unit(NGINX, ActiveEnterTimestampMonotonic="0"),
           "nginx.service has not been active yet"),
    Broken("S3", "QEMU itself was slow", chain(
        finished(SLOW),
        unit(NGINX, ActiveEnterTimestampMonotonic="59000000"),
        clock("39.34", "41.84"),
    ), "61.5 s, the last was nginx.service"),
    Broken("S3", "late, by the journal", chain(
        unit(NGINX, ActiveEnterTimestampMonotonic="200000000"),
        START,
        within("journal", json.dumps({"UNIT": NGINX, "__MONOTONIC_TIMESTAMP": f"{SLOW}"})),
    ), "91.5 s, the last was nginx.service"),
    # S4
    Broken("S4", "more memory than the profile",
           chain(regex(r"MemTotal: .*", "MemTotal: 8021552 kB"),
                 regex(r"MemAvailable: .*", "MemAvailable: 1681752 kB")),
           "6192 MB are used"),
    Broken("S4", "MemoryMax is another", unit(ROUTER, MemoryMax="infinity"),
           f"MemoryMax is infinity, not {SUBJECT.plan.service('router').limits.memory_mb * 2**20}"),
    Broken("S4", "CPUQuota is another", unit(ROUTER, CPUQuotaPerSecUSec="infinity"),
           "CPUQuota is not set, not 200%"),
    Broken("S4", "OOMScoreAdjust is another", unit(ROUTER, OOMScoreAdjust="0"),
           "OOMScoreAdjust is 0, not 300"),
    Broken("S4", "TasksMax is another", unit(ROUTER, TasksMax="4915"), "TasksMax is 4915, not 64"),
    Broken("S4", "no memory limit in the kernel",
           swap("/nginx.service|67108864|", "/nginx.service|max|"),
           "the kernel's memory.max is max"),
    Broken("S4", "no CPU limit in the kernel",
           swap("/nginx.service|67108864|100000 100000|", "/nginx.service|67108864|max 100000|"),
           "the kernel's cpu.max is max 100000"),
    Broken("S4", "no limit of tasks in the kernel",
           swap("|100000 100000|64|", "|100000 100000|max|"), "the kernel's pids.max is max"),
    Broken("S4", "CPUWeight is another", unit(ROUTER, CPUWeight="100"),
           "CPUWeight is 100, not 1000"),
    Broken("S4", "no weight in the kernel",
           swap("/nginx.service|67108864|100000 100000|64|1000\n",
                "/nginx.service|67108864|100000 100000|64|100\n"),
           "the kernel's cpu.weight is 100"),
    Broken("S4", "a process has another score", regex(r"(?m)^(\d+) 300$", r"\1 0"),
           "the kernel's oom_score_adj is 0"),
    Broken("S4", "a process without a score", regex(r"(?m)^(\d+) 300\n", ""),
           "the kernel's oom_score_adj is missing"),
    Broken("S4", "no control group", unit(NGINX, ControlGroup=""),
           "nginx.service: has no control group"),
    # X1
    Broken("X1", "passwords are taken",
           swap("\npasswordauthentication no", "\npasswordauthentication yes"),
           "passwordauthentication is yes"),
    Broken("X1", "what was read is another", regex(r"(?m)^changed \d+", "changed 9999999999"),
           "was changed after it was read"),
    Broken("X1", "settings of its own", swap("sshd -D", "sshd -D -o PermitRootLogin=yes"),
           "was given settings as it was started"),
    Broken("X1", "root may log in", swap("\npermitrootlogin no", "\npermitrootlogin yes"),
           "permitrootlogin is yes"),
    Broken("X1", "root may log in by key",
           swap("\npermitrootlogin no", "\npermitrootlogin prohibit-password"),
           "permitrootlogin is prohibit-password"),
    Broken("X1", "others may sign in", swap("\nallowusers rave", "\nallowusers rave root"),
           "allowusers is rave root"),
    Broken("X1", "keys from elsewhere",
           regex(r"\nauthorizedkeysfile .*", "\nauthorizedkeysfile /k"),
           "authorizedkeysfile is /k"),
    Broken("X1", "an authority says who", swap("trustedusercakeys none", "trustedusercakeys /ca"),
           "trustedusercakeys is /ca"),
    Broken("X1", "one address may guess",
           swap("persourcepenaltyexemptlist none", "persourcepenaltyexemptlist 10.0.2.0/24"),
           "persourcepenaltyexemptlist is 10.0.2.0/24"),
    Broken("X1", "something else holds for root", within("conditions", "Match User root"),
           "sshd makes exceptions: Match User root"),
    Broken("X1", "six tries", swap("\nmaxauthtries 3", "\nmaxauthtries 6"), "maxauthtries is 6"),
    Broken("X1", "an old cipher is set", swap("\nciphers ", "\nciphers 3des-cbc,"),
           "sshd is set to 3des-cbc (ciphers)"),
    Broken("X1", "an old host key is offered", offer("hostkeyalgorithms", "ssh-rsa"),
           "sshd offers ssh-rsa (hostkeyalgorithms)"),
    Broken("X1", "an old exchange is offered",
           offer("kexalgorithms", "diffie-hellman-group14-sha1"),
           "sshd offers diffie-hellman-group14-sha1 (kexalgorithms)"),
    Broken("X1", "an old MAC is offered", offer("macs-in", "hmac-sha1"),
           "sshd offers hmac-sha1 (macs-in)"),
    Broken("X1", "a password is let in", put(PASSWORD_TRY, outcome="let in"),
           "a password login: let in"),
    Broken("X1", "a password may be tried", put(PASSWORD_TRY, methods=["password", "publickey"]),
           "methods ['password', 'publickey']"),
    Broken("X1", "the key is refused", put(PASSWORD_TRY, key="refused"),
           "the operator's key is refused"),
    Broken("X1", "root is let in", put(ROOT_TRY, outcome="let in"), "root was let in"),
    Broken("X1", "an exchange that is not post-quantum",
           offer("kexalgorithms", "curve25519-sha256"),
           "sshd offers curve25519-sha256 (kexalgorithms)"),
    Broken("X1", "ports are forwarded", swap("\nallowtcpforwarding no", "\nallowtcpforwarding yes"),
           "allowtcpforwarding is yes"),
    Broken("X1", "a hundred logins under way",
           swap("\nmaxstartups 8:30:16", "\nmaxstartups 10:30:100"), "maxstartups is 10:30:100"),
    Broken("X1", "one address may have all",
           swap("\npersourcemaxstartups 8", "\npersourcemaxstartups none"),
           "persourcemaxstartups is none"),
    Broken("X1", "failed logins are not counted", regex(r"authfail:\d+", "authfail:0"),
           "persourcepenalties is"),
    Broken("X1", "a block of ten minutes", regex(r" max:\d+", " max:600"), "persourcepenalties is"),
    # X2
    Broken("X2", "an agent reaches the dispatcher", swap("1001 3001 closed", "1001 3001 open"),
           "agent reaches port 3001"),
    Broken("X2", "an agent does not reach the router", swap("1001 3456 open", "1001 3456 closed"),
           "agent does not reach port 3456"),
    Broken("X2", "the database listens outside", swap("127.0.0.1:5432", "0.0.0.0:5432"),
           "tcp 0.0.0.0:5432 (postgres) listens to the outside"),
    Broken("X2", "a datagram port is open",
           within("listeners", 'udp UNCONN 0 0 0.0.0.0:111 0.0.0.0:* users:(("rpcbind",pid=9))'),
           "udp 0.0.0.0:111 (rpcbind) listens to the outside"),
    Broken("X2", "on IPv6", within("listeners", LISTENER.format("[::]:5432")),
           "tcp :::5432 (postgres) listens to the outside"),
    Broken("X2", "a stranger on loopback", within("listeners", LISTENER.format("127.0.0.1:6379")),
           "127.0.0.1:6379 (postgres) is not in the Plan"),
    Broken("X2", "nothing listens", swap("0.0.0.0:3002", "127.0.0.1:3002"),
           "nothing listens on port 3002"),
    Broken("X2", "a stranger at a port of ours",
           chain(within("listeners", LISTENER.format("127.0.0.9:5432")),
                 within("owners", "9 0::/user.slice/session-3.scope")),
           "127.0.0.9:5432 (postgres) is not of postgresql@17-main.service"),
    Broken("X2", "nobody is known to listen", every(r"(?m)^\d+ 0::/system.slice/nginx.service\n"),
           "(nginx) is not of nginx.service"),
    Broken("X2", "a unit of somebody's own",
           regex(r"(?m)^(\d+) 0::/system.slice/mtail.service$",
                 r"\1 0::/user.slice/user-1000.slice/user@1000.service/app.slice/mtail.service"),
           "(mtail) is not of mtail.service"),
    Broken("X2", "systemd alone listens", regex(r'\("python3",pid=\d+,fd=\d+\),', ""),
           "127.0.0.1:3001 (systemd) is not of rave-dispatcher.service"),
    Broken("X2", "no DHCP client at its port",
           chain(within("listeners", LISTENER.format("10.0.2.15:68").replace("tcp", "udp")),
                 within("owners", "9 0::/system.slice/ssh.service")),
           "10.0.2.15:68 (postgres) listens to the outside"),
    Broken("X2", "a rule more than planned", within("rules", "table inet other {\n}"),
           "the rules are not those of /etc/nftables.conf: 'table inet other {' where"),
    Broken("X2", "no file of rules",
           regex(r"(?ms)^== planned ==\n.*?(?=^== )", "== planned ==\n"),
           "where '(nothing)' was"),
    Broken("X2", "the policy is accept", ruleset(policy_accept), "no firewall"),
    Broken("X2", "what it does not know goes out",
           regex(r'("hook": "output", "prio": 0, "policy": )"drop"', r'\1"accept"'),
           "no output chain drops"),
    Broken("X2", "a way out",
           regex(r'("chain": "output", "handle": 23, "expr": ).*?\]\}\}(?=, \{"rule")',
                 r'\1[{"accept": null}]}}'),
           "the firewall lets out: anything"),
    Broken("X2", "new connections are not limited",
           regex(r'\{"limit": \{"rate": 5, "burst": 30, [^}]*\}\}\]\}\}, \{"counter"',
                 '{"counter": null}]}}, {"counter"'),
           "new connections to port 22 are not limited"),
    Broken("X2", "one port more", rule(match("tcp", "dport", 5432), ACCEPT),
           "the firewall accepts port 5432"),
    Broken("X2", "a range of ports",
           rule(match("tcp", "dport", {"range": [8000, 8002]}), ACCEPT),
           "the firewall accepts port 8001"),
    Broken("X2", "a network let in", rule(match("ip", "saddr", "10.0.2.2"), ACCEPT),
           "the firewall also accepts"),
    Broken("X2", "all let in", rule(ACCEPT), "the firewall also accepts: anything"),
    Broken("X2", "left to a program",
           rule({"queue": {"num": 0}}), "the firewall also accepts"),
    Broken("X2", "a port closed", swap('"right": {"set": [22, 3002]}', '"right": {"set": [22]}'),
           "the firewall does not accept port 3002"),
    Broken("X2", "a port answers", swap("10.0.2.15 5432 closed", "10.0.2.15 5432 open"),
           "10.0.2.15:5432 answers"),
    Broken("X2", "SSH does not answer", swap("10.0.2.15 22 open", "10.0.2.15 22 closed"),
           "10.0.2.15:22 does not answer"),
    # O1
    Broken("O1", "a target is down",
           targets(lambda t: t[0].update(health="down", lastError="connection refused")),
           "alertmanager is down: connection refused"),
    Broken("O1", "a target was not scraped yet", targets(lambda t: t[0].update(health="unknown")),
           "alertmanager is unknown"),
    Broken("O1", "a job is missing", targets(lambda t: t.pop(0)), "alertmanager is not scraped"),
    Broken("O1", "a job too many",
           targets(lambda t: t.append({**t[0], "scrapePool": "stranger"})),
           "stranger is scraped and not in the Plan"),
    Broken("O1", "another address",
           targets(lambda t: t[0].update(scrapeUrl="http://10.0.2.2:9100/metrics")),
           "is scraped at http://10.0.2.2:9100/metrics"),
    # H1, H2
    Broken("H1", "a service is down", put({"route": "kanban"}, status=502),
           "kanban (localhost/kanban/), signed in: 502, not 302"),
    Broken("H1", "the password is refused", put({"route": "console"}, status=401),
           "signed in: 401, not 200"),
    Broken("H1", "no answer", lost({"route": "console"}, "status", error="no answer in time"),
           "no answer in time"),
    Broken("H2", "open to all", put({"route": "kanban", "who": "no credentials"}, status=200),
           "no credentials: 200, not 401"),
    Broken("H2", "any password will do",
           put({"route": "router", "who": "wrong password"}, status=200),
           "wrong password: 200, not 401"),
    Broken("H2", "any key will do", put({"route": "router-host", "who": "wrong key"}, status=200),
           "wrong key: 200, not 401"),
    Broken("H2", "the router's key opens more",
           put({"route": "console", "who": "right key"}, status=200), "right key: 200, not 401"),
    Broken("H2", "metrics are shown", put({"route": "metrics", "who": "signed in"}, status=200),
           "signed in: 200, not 403 or 404"),
    Broken("H2", "open, and others unanswered", chain(
        put({"route": "kanban", "who": "no credentials"}, status=200),
        lost({"route": "console", "who": "wrong key"}, "status", error="no answer in time"),
    ), "no credentials: 200, not 401"),
    # H5, H6
    Broken("H5", "a delivery is refused", put({"try": "2"}, status=401), "delivery 2 got 401"),
    Broken("H5", "a delivery is not answered",
           lost({"try": "3"}, "status", error="no answer in time"), "no answer in time, not 202"),
    Broken("H5", "a duplicate is taken for new", put({"try": "3"}, duplicate=False),
           "not so here"),
    Broken("H5", "one was there before", put({"try": "1"}, duplicate=True), "not so here"),
    Broken("H5", "several events", put({"try": "2"}, event_uuid="other"), "several events"),
    Broken("H5", "stored three times", rows({}, lambda r: "stored" in r and r.update(stored=3)),
           "stored 3 times"),
    Broken("H5", "stored never", rows({}, lambda r: "stored" in r and r.update(stored=0)),
           "stored 0 times"),
    Broken("H5", "no task", rows({}, lambda r: "stored" in r and r.update(task=None)),
           "became no task"),
    Broken("H5", "the task failed", put({"status": "completed"}, status="failed", outcome="error"),
           "its task is failed (error)"),
    Broken("H5", "the task waits", put({"status": "completed"}, status="pending", outcome=None),
           "its task is pending"),
    Broken("H5", "another trace", put({"status": "completed"}, trace_id="0" * 32),
           "not the same throughout"),
    Broken("H5", "a span is missing", rows({}, lambda r: "spans" in r and r["spans"].pop()),
           "the trace lacks task"),
    Broken("H6", "a wrong signature is taken", put({"try": "wrong signature"}, status=202),
           "wrong signature: 202, not 401"),
    Broken("H6", "a replay is taken", put({"try": "signed long ago"}, status=202),
           "signed long ago: 202, not 401"),
    Broken("H6", "a crash", put({"try": "not JSON"}, status=500), "not JSON: 500, not 400"),
    Broken("H6", "no answer", lost({"try": "too large"}, "status", error="no answer in time"),
           "too large: no answer in time, not 413"),
    Broken("H6", "stored all the same", rows({}, lambda r: "stored" in r and r.update(stored=1)),
           "1 of them are stored"),
    Broken("H6", "not counted",
           rows({}, lambda r: "counted" in r and r["counted"].update({"401": 1})),
           "4 answers 401 were given, 1 counted"),
    Broken("H6", "counted nowhere", rows({}, lambda r: "counted" in r and r["counted"].clear()),
           "1 answers 400 were given, 0 counted"),
    # D2, O4
    Broken("D2", "damaged", swap('"ok"', '"row 7 missing from index"'), "integrity_check is row 7"),
    Broken("D2", "not WAL", swap('"wal"', '"delete"'), "journal_mode is delete, not wal"),
    Broken("D2", "not FULL", swap('"synchronous": 2', '"synchronous": 1'), "synchronous is 1"),
    Broken("D2", "true is not FULL", swap('"synchronous": 2', '"synchronous": true'),
           "synchronous is True"),
    Broken("D2", "it cannot be opened",
           swap('{"journal_mode"', "rave-dispatcher: the event store x is damaged (y). {"),
           "the event store is damaged"),
    Broken("D5", "metrics are kept longer", swap('"storage.tsdb.retention.time":"3d"',
                                                 '"storage.tsdb.retention.time":"30d"'),
           "metrics: 30d, not 3d"),
    Broken("D5", "there may be more of them", swap('"storage.tsdb.retention.size":"512M',
                                                  '"storage.tsdb.retention.size":"2G'),
           "size of metrics: 2048, not 512"),
    Broken("D5", "critical ones are kept shorter",
           regex(r'retentionPeriod="?30d', 'retentionPeriod="3d'),
           "critical metrics: 3d, not 30d"),
    Broken("D5", "events are kept longer", swap("retention_days: 7", "retention_days: 70"),
           "events: 70, not 7"),
    Broken("D5", "what is older is still there",
           regex(r"(tsdb_lowest_timestamp_seconds) .*", r"\1 1.0e+09"), "the oldest metric is of"),
    Broken("O2", "an alert is not loaded", loaded(lambda r: r[0].update(name="Other")),
           "alert Other is not in the Plan"),
    Broken("O2", "the alert of backups is gone",
           loaded(lambda r: r.remove(next(x for x in r if x["name"] == "BackupStale"))),
           "alert BackupStale is not loaded"),
    Broken("O2", "a rule cannot be evaluated",
           loaded(lambda r: r[1].update(health="err", lastError="many-to-many")),
           "fails: many-to-many"),
    Broken("O2", "a rule failed before", regex(r"(evaluation_failures_total{.*}) 0", r"\1 3"),
           "prometheus_rule_evaluation_failures_total is 3"),
    Broken("O2", "no receiver", swap('[{"name":"dispatcher"}]', '[{"name":"nobody"}]'),
           "receiver dispatcher is missing"),
    Broken("O2", "nobody is told",
           regex(r'"activeAlertmanagers":\[[^]]*\]', '"activeAlertmanagers":[]'),
           "sends to 0 Alertmanagers"),
    Broken("O2", "any number of queries", swap('"query.max-concurrency":"4"',
                                              '"query.max-concurrency":"20"'),
           "20 queries at once, not 4"),
    Broken("O3", "no alert", rows({}, lambda r: r.update(fired=None)), "no alert came"),
    Broken("O3", "too late", rows({}, lambda r: r.update(fired=r["stopped"] + 30.0)),
           "the alert came after 30.0 s"),
    Broken("O3", "it never ends", rows({}, lambda r: r.update(resolved=None)),
           "the alert's end did not come"),
    Broken("O3", "it ends late", rows({}, lambda r: r.update(resolved=r["started"] + 61.0)),
           "the alert's end came after 61.0 s"),
    Broken("O4", "traces are incomplete", swap("ratio 1.0", "ratio 0.94"), "only 94.0% have one"),
    Broken("O4", "no traces at all", swap("ratio 1.0", "ratio 0.0"), "only 0.0% have one"),
    # H3
    Broken("H3", "TLS 1.2 is agreed on",
           lost({"try": "old", "host": "kanban.localhost"}, "refused", version="TLSv1.2"),
           "kanban.localhost speaks TLSv1.2"),
    Broken("H3", "an older version is preferred",
           put({"try": "trusted", "host": "localhost"}, version="TLSv1.2"),
           "localhost agreed on TLSv1.2"),
    Broken("H3", "another CA",
           lost({"try": "trusted", "host": "localhost"}, "version",
                error="certificate: self-signed certificate"),
           "localhost: certificate: self-signed certificate"),
    Broken("H3", "trusted by all", lost({"try": "untrusted"}, "refused", version="TLSv1.3"),
           "accepted without the workspace's CA"),
    Broken("H3", "no HSTS", header(CONSOLE, strict_transport_security=None),
           "no good strict-transport-security"),
    Broken("H3", "HSTS that ends at once",
           header(CONSOLE, strict_transport_security="max-age=0"),
           "no good strict-transport-security"),
    Broken("H3", "no nosniff", header(CONSOLE, x_content_type_options=None),
           "no good x-content-type-options"),
    Broken("H3", "framing allowed",
           header(CONSOLE, x_frame_options=None, content_security_policy="default-src 'self'"),
           "no good x-frame-options"),
    Broken("H3", "a referrer for all", header(CONSOLE, referrer_policy="unsafe-url"),
           "no good referrer-policy"),
    Broken("H3", "no CSP", header(CONSOLE, content_security_policy=None),
           "no good content-security-policy"),
    Broken("H3", "no headers where the sign-in failed",
           header("localhost/, no credentials", x_content_type_options=None),
           "localhost/, no credentials: no good x-content-type-options"),
    Broken("H3", "the server's version", header(CONSOLE, server="nginx/1.26.3"),
           "server shows 'nginx/1.26.3'"),
    Broken("H3", "what it is made with", header(CONSOLE, x_powered_by="Express"),
           "x-powered-by shows 'Express'"),
    Broken("H3", "a version in an error page",
           put({"page": "localhost/, no credentials"}, body="<center>nginx/1.26.3</center>"),
           "shows nginx/1.26.3"),
    Broken("H3", "a version in the answer to nonsense",
           put({"raw": "malformed request"}, text="HTTP/1.1 400 Bad\r\nServer: nginx/1.26.3"),
           "malformed request: the answer shows nginx/1.26.3"),
    # H4
    Broken("H4", "a slow route", put({"route": "kanban"}, ms=[10.0] * 494 + [210.0] * 6),
           "kanban: p99 is 210 ms"),
    Broken("H4", "exactly the limit", put({"route": "kanban"}, ms=[200.0] * 500),
           "kanban: p99 is 200 ms"),
    Broken("H4", "slow by the ingress's count",
           counted("kanban", {"0.2": 480, "+Inf": 500}), "kanban: 20 of 500 took 200 ms or more"),
    Broken("H4", "the ingress counted others", counted("kanban", {"0.2": 9, "+Inf": 9}),
           "kanban: 9 requests are counted"),
    Broken("H4", "other answers", put({"route": "kanban"}, unexpected={"502": 3}),
           "kanban: 3 times 502"),
    Broken("H4", "not all answered", put({"route": "kanban"}, ms=[10.0] * 400),
           "kanban: 400 of 500 requests answered in time"),
    Broken("H4", "none answered",
           put({"route": "kanban"}, ms=[], unexpected={"no answer in time": 1}),
           "kanban: 1 times no answer in time"),
    # X3
    Broken("X3", "the fourth login is tried",
           put({"door": "ssh"}, outcomes=["refused"] * 4), "SSH: attempt 4 got refused"),
    Broken("X3", "the fourth password is looked at",
           put({"door": "ingress"}, outcomes=[401] * 4), "the ingress: attempt 4 got 401"),
    Broken("X3", "a stranger is let in",
           put({"door": "ssh"}, outcomes=["refused", "let in", "refused", "blocked"]),
           "SSH: failed logins got"),
    Broken("X3", "the block lasts", put({"door": "ssh"}, **{"block ended": None}),
           "SSH: the block did not end"),
    Broken("X3", "the ingress's block lasts", put({"door": "ingress"}, **{"block ended": None}),
           "the ingress: the block did not end"),
    Broken("X3", "the operator is locked out", put({"door": "ingress"}, **{"right password": 429}),
           "the right password got 429"),
    Broken("X3", "a session ends", put({"door": "ssh"}, **{"open session": False}),
           "an open SSH session did not go on"),
    Broken("X3", "nobody counts", rows({}, lambda r: "bans" in r and r["bans"].update(
        after=r["bans"]["before"])), "rave_bans_total of ssh did not grow"),
    # X4
    Broken("X4", "all may read a secret",
           swap("ccr/api-key root root 600", "ccr/api-key root root 644"),
           "ccr/api-key is root root 644, not root root 600"),
    Broken("X4", "another owner",
           swap("exporter-scram postgres postgres 400", "exporter-scram root postgres 400"),
           "postgres/exporter-scram is root postgres 400, not postgres postgres 400"),
    Broken("X4", "a file that nobody declared", within("files", "left/over root root 600"),
           "left/over is not declared"),
    Broken("X4", "a file is missing", swap("ccr/api-key root root 600\n", ""),
           "ccr/api-key is missing"),
    Broken("X4", "another may read it, too",
           within("lists", "-rw-r-----+ 1 0 0 25 Nov 28 15:00 api-token"),
           "an access control list opens api-token"),
    Broken("X4", "on a disk", swap("/run/secrets.d tmpfs", "/run/secrets.d ext4"),
           "/run/secrets.d is a ext4"),
    Broken("X4", "may be swapped out", chain(
        swap(",noswap", ""), swap("Priority\n", "Priority\n/swapfile file 1048572 0 -2\n"),
    ), "/run/secrets.d can be swapped out"),
    Broken("X4", "in a process", within("places", "/proc/812/cmdline"),
           "a value is seen in /proc/812/cmdline"),
    Broken("X4", "in the journal", within("places", "the journal"),
           "a value is seen in the journal"),
    Broken("X4", "open to others, in memory", within("places", "/run/leak"),
           "a value is seen in /run/leak"),
    Broken("X4", "in the image",
           swap("== disk ==\nnothing\n", "== disk ==\nccr/api-key is on the image\n"),
           "ccr/api-key is on the image"),
    # D6
    Broken("D6", "another value", swap("  ./ccr/api-key\n", "  ./ccr/other\n"),
           "ccr/api-key is missing"),
    Broken("D6", "a value of before", digest("digests", "ccr/api-key"),
           "ccr/api-key has another value"),
    Broken("D6", "the files have another", digest("wanted", "ccr/api-key"),
           "ccr/api-key has another value"),
    Broken("D6", "not in the files", within("digests", f"{'0' * 64}  ./left/over"),
           "left/over should not be there"),
    # S5
    Broken("S5", "it did not return", regex(r"(?m)^ingress \d+$", "ingress did-not-return"),
           "ingress did not return"),
    Broken("S5", "it returned too late", regex(r"(?m)^router \d+$", "router 30000"),
           "router came again after 30.0 s"),
    Broken("S5", "there was nothing to kill", regex(r"(?m)^mtail \d+$", "mtail was-not-running"),
           "mtail was not running"),
    # D1
    Broken("D1", "commits are not flushed", swap("setting|fsync|on", "setting|fsync|off"),
           "fsync is off, not on"),
    Broken("D1", "torn pages", swap("full_page_writes|on", "full_page_writes|off"),
           "full_page_writes is off"),
    Broken("D1", "answers before the disk has it",
           swap("synchronous_commit|on", "synchronous_commit|off"), "synchronous_commit is off"),
    Broken("D1", "no checksums", swap("data_checksums|on", "data_checksums|off"),
           "data_checksums is off"),
    Broken("D1", "a damaged block", swap("failures|0", "failures|2"),
           "2 blocks did not have their checksum"),
    Broken("D1", "not flushed", swap("flushed|t", "flushed|f"), "the commit was not flushed"),
    Broken("D1", "another value", swap("read|t", "read|f"), "what was read is not what was"),
    Broken("D1", "nothing to read", swap("read|t\n", ""), "what was read is not what was"),
    Broken("D1", "the same session", swap("session|t", "session|f"), "not read in another"),
    Broken("D1", "left behind", swap("gone|t", "gone|f"), "the table is still there"),
    Broken("D1", "cannot be written", within("database", "ERROR:  cannot execute CREATE TABLE"),
           "cannot execute CREATE TABLE"),
    Broken("D1", "nobody answers",
           chain(without("database"),
                 swap("== end", "== database ==\npsql: error: connection refused\n== end")),
           "connection refused"),
    # X5
    Broken("X5", "a setting is another", regex(r"kptr_restrict = \d", "kptr_restrict = 0"),
           "kernel.kptr_restrict is 0, not 2"),
    Broken("X5", "a setting is not there", regex(r"(?m)^kernel\.sysrq = 0\n", ""),
           "kernel.sysrq is not there, not 0"),
    Broken("X5", "one interface takes redirects",
           swap("eth0.accept_redirects = 0", "eth0.accept_redirects = 1"),
           "net.ipv4.conf.eth0.accept_redirects is 1, not 0"),
    Broken("X5", "dumps are written", regex(r"core_pattern = .*", "core_pattern = core"),
           "kernel.core_pattern is core"),
    Broken("X5", "a blocked module is loaded", within("loaded", "sctp 434176 0 - Live 0x0"),
           "module sctp is loaded"),
    Broken("X5", "a module under its other name", within("loaded", "usb_storage 90112 0 - Live"),
           "module usb-storage is loaded"),
    Broken("X5", "a module may be loaded", regex(r"(?m)^install dccp .*\n", ""),
           "module dccp may be loaded"),
    Broken("X5", "the first of two commands loads it",
           within("blocked", "install dccp /sbin/modprobe --ignore-install dccp"),
           "module dccp may be loaded"),
    Broken("X5", "a device below the agents' disk",
           swap("\n== setuid =", "\n99 1 0:9 / /home/agent/a\\040b rw - ext4 x rw\n== setuid ="),
           "/home/agent/a b is mounted without nosuid, nodev"),
    Broken("X5", "a profile from elsewhere",
           regex(r"(?m)^\w{64} rave-router$", f"{'0' * 64} rave-router"),
           "AppArmor's rave-router is not that of /usr/lib/rave/apparmor.bin"),
    Broken("X5", "no policy in the image", regex(r"(?m)^\w{64}  /usr.*\n", ""),
           "AppArmor's rave-kanban is not that of"),
    Broken("X5", "programs run from /tmp",
           regex(r" /tmp rw,nosuid,nodev,noexec", " /tmp rw,nosuid,nodev"),
           "/tmp is mounted without noexec"),
    Broken("X5", "the agents' disk is not there",
           regex(r"(?m)^.* /home/agent .*\n", ""), "/home/agent is no mount of its own"),
    Broken("X5", "one mounted over it",
           swap("\n== setuid ==", "\n99 1 0:9 / /dev/shm rw,exec - tmpfs tmpfs rw\n== setuid =="),
           "/dev/shm is mounted without nosuid, nodev, noexec"),
    Broken("X5", "one more setuid program", within("setuid", "/usr/bin/passwd"),
           "/usr/bin/passwd is setuid or setgid"),
    Broken("X5", "not all was searched", within("setuid", "find: '/opt': Permission denied"),
           "find: '/opt': Permission denied"),
    Broken("X5", "nobody notes who opens secrets", regex(r"(?m)^.*auid>=1000.*\n", ""),
           "-F dir=/run/secrets.d -F auid>=1000"),
    Broken("X5", "a rule says less", swap("openat,openat2", "openat"),
           "the kernel does not note: -a always,exit"),
    Broken("X5", "a rule says that nothing is noted",
           within("audited", "-a never,exit -F arch=b64 -S all"), "another rule: -a never,exit"),
    Broken("X5", "one note a second", swap("rate_limit 400", "rate_limit 1"),
           "not limited to 400 a second"),
    Broken("X5", "nobody takes the notes", swap("journal active", "journal inactive"),
           "the journal does not take"),
    Broken("X5", "auditing is off", swap("\nenabled 1", "\nenabled 0"), "auditing is off"),
    Broken("X5", "there is no auditctl",
           regex(r"(?ms)^== audited ==\n.*?(?=^== )", "== audited ==\nauditctl: not found\n"),
           "auditing is off"),
    Broken("X5", "AppArmor only complains",
           swap("rave-ingress (enforce)", "rave-ingress (complain)"),
           "nginx.service is held to rave-ingress (complain)"),
    Broken("X5", "a service is unconfined",
           swap("rave-kanban (enforce)", "unconfined"),
           "vibe-kanban.service is held to unconfined"),
    Broken("X5", "a process beside a service", within("confined", "nginx.service unconfined"),
           "nginx.service is held to unconfined"),
    Broken("X5", "a service has no process", regex(r"(?m)^vibe-kanban.service rave-kanban.*\n", ""),
           "vibe-kanban.service is held to nothing"),
    Broken("X5", "a place to search is gone",
           swap("== setuid ==\n", "== setuid ==\nfind: '/': No such file or directory\n"),
           "find: '/': No such file or directory"),
    Broken("X5", "a setuid program with a name",
           within("setuid", "/var/lib/x (No such file or directory)"),
           "/var/lib/x (No such file or directory) is setuid"),
    Broken("X5", "a place of NixOS' on Debian",
           within("capable", "/run/wrappers/x cap_setuid=ep"), "/run/wrappers/x has cap_setuid=ep"),
    Broken("X5", "a program has a capability", within("capable", "/var/lib/x cap_setuid=ep"),
           "/var/lib/x has cap_setuid=ep"),
    Broken("X5", "capabilities cannot be asked for",
           regex(r"(?ms)^== capable ==\n.*?(?=^== )", "== capable ==\nno getcap\n"),
           "capabilities of files cannot be asked for"),
    # X6
    Broken("X6", "nginx lost its sandbox",
           regex(r"for nginx\.service: [\d.]+", "for nginx.service: 9.2"),
           "nginx.service is exposed by 9.2, 4 are allowed"),
    Broken("X6", "one of ours is just over",
           regex(r"for vibe-kanban\.service: [\d.]+", "for vibe-kanban.service: 2.1"),
           "vibe-kanban.service is exposed by 2.1, 2 are allowed"),
    Broken("X6", "a process may gain rights", process("vibe-kanban.service", "NoNewPrivs", "0"),
           "vibe-kanban.service runs without NoNewPrivileges="),
    Broken("X6", "a process without a filter", process("vibe-kanban.service", "Seccomp", "0"),
           "vibe-kanban.service runs without SystemCallFilter="),
    Broken("X6", "a process with a capability more",
           process("vibe-kanban.service", "CapBnd", "0000000000200000"),
           "vibe-kanban.service runs with more than CapabilityBoundingSet="),
    Broken("X6", "a process is another's", process("vibe-kanban.service", "Uid", "0"),
           "vibe-kanban.service runs as 0, not as vibe-kanban"),
    Broken("X6", "a process beside a service's own",
           within("processes", "9 ControlGroup: /system.slice/vibe-kanban.service\n9 Name: sh\n"
                  "9 CapBnd: 0000000000000000\n9 NoNewPrivs: 1\n9 Seccomp: 0"),
           "vibe-kanban.service: sh runs without SystemCallFilter="),
    Broken("X6", "nobody knows of a process",
           every(r"(?m)^\d+ (ControlGroup|Name|CapBnd|NoNewPrivs|Seccomp|Uid): .*\n"),
           "runs without NoNewPrivileges="),
    # X7
    Broken("X7", "other content", file("/etc/fstab", content="0" * 64),
           "/etc/fstab has other content than in the image"),
    Broken("X7", "another mode", file("/etc/fstab", mode=0o666),
           "/etc/fstab is 0:0 666, not 0:0 644"),
    Broken("X7", "another owner", file("/etc/fstab", uid=1000),
           "/etc/fstab is 1000:0 644, not 0:0"),
    Broken("X7", "a capability", file("/etc/fstab", capability="0100000200"),
           "/etc/fstab has other capabilities"),
    Broken("X7", "a link in its place", file("/etc/fstab", kind="link", content="/tmp/x"),
           "/etc/fstab is a link, not a file"),
    Broken("X7", "a file more", row("changed", FILE.replace("/etc/fstab", "/etc/cron.d/x")),
           "/etc/cron.d/x is not in the image"),
    Broken("X7", "a file less",
           chain(row("changed", FOLDER % "[]"), row("image", FOLDER % '["nginx.conf"]')),
           "/etc/nginx/nginx.conf is gone"),
    Broken("X7", "a file that nobody can read", file("/etc/fstab", kind="error", content="I/O"),
           "/etc/fstab cannot be looked at: I/O"),
    Broken("X7", "too much to look at", many(2000), "2000 paths or more are newer"),
    Broken("X7", "a drop-in for all services",
           within("runtime", "/run/systemd/transient/service.d/x.conf"), "service.d/x.conf goes"),
    Broken("X7", "a drop-in for all of a name",
           within("runtime", "/run/systemd/transient/rave-.service.d/x.conf"), "goes before"),
    Broken("X7", "a drop-in of another unit of the image",
           chain(within("runtime", "/run/systemd/transient/nftables.service.d/x.conf"),
                 within("known", "nftables.service")), "nftables.service.d/x.conf goes before"),
    Broken("X7", "a drop-in in memory",
           within("runtime", "/run/systemd/system/ssh.service.d/x.conf"),
           "/run/systemd/system/ssh.service.d/x.conf goes before the image"),
    Broken("X7", "a property that was set",
           within("runtime", "/run/systemd/transient/nginx.service.d/50-MemoryMax.conf"),
           "50-MemoryMax.conf goes before the image"),
    Broken("X7", "a mount over it",
           swap("\n== environment", "\n99 1 0:9 / /etc/nginx rw - tmpfs x rw\n== environment"),
           "something is mounted over /etc/nginx"),
    Broken("X7", "a mount that one service sees",
           within("inside", "/proc/7/mountinfo:99 1 8:1 /run/m/n /etc/nginx/nginx.conf rw - ext4"),
           "something is mounted over /etc/nginx/nginx.conf for 7"),
    Broken("X7", "an access control list", file("/etc/fstab", capability="acl"),
           "/etc/fstab has an access control list"),
    Broken("X7", "a library for every service", within("environment", "LD_PRELOAD"),
           "each service gets LD_PRELOAD="),
    Broken("X7", "nginx read another configuration",
           regex(r"(?m)^changed \d+", "changed 9999999999"), "was changed after nginx had read it"),
    Broken("X7", "nginx does not run, and a file is another",
           chain(every(r"(?m)^process .*\n"), file("/etc/fstab", content="0" * 64)),
           "nginx does not run, so nobody knows what it has read"),
    Broken("X7", "what is generated was added to", within("ingress", "another"),
           "router-key.conf is not as ingress-config makes it"),
)  # fmt: skip

UNREADABLE = (
    ("S1", "systemd is silent", swap("SystemState=running\n", "")),
    ("S2", "a unit without an answer", unit(NGINX, Id="other.service", Names="other.service")),
    ("S3", "no boot time", finished("x")),
    ("S3", "restarted, and the journal is gone",
     unit(NGINX, ActiveEnterTimestampMonotonic=str(SLOW))),
    ("S4", "no account of memory", swap("MemTotal:", "Mem:")),
    ("X1", "another machine answers", put(ROOT_TRY, host_key="other")),
    ("X1", "no login could be tried", lost(PASSWORD_TRY, "outcome", error="timed out")),
    ("X1", "sshd -T failed", without("sshd")),
    ("X1", "no offer was seen", rows({}, lambda row: "offer" in row and row.update(offer=None))),
    ("X2", "an account was not tried", swap("\n901 3001 closed", "")),
    ("X3", "no record of SSH", gone({"door": "ssh"})),
    ("X3", "nothing was counted", rows({}, lambda row: row.pop("bans", None))),
    ("X2", "nobody said whose they are", without("owners")),
    ("X2", "the plan's rules were not tried", without("planned")),
    ("X2", "no rules", swap('{"nftables"', '{"nothing"')),
    ("X2", "rules that are no JSON", swap('{"nftables"', "nftables")),
    ("X2", "listeners cannot be read", within("listeners", "bash: ss: command not found")),
    ("X2", "no outer address", swap("10.0.2.15 22 open", "10.0.2.15 22")),
    ("O1", "not Prometheus", swap('{"status":"success"', "502 Bad Gateway")),
    ("O1", "an error of Prometheus", swap('"status":"success"', '"status":"error"')),
    ("H1", "a request was not made", gone({"route": "healthz"})),
    ("H2", "a request was not made", gone({"route": "kanban", "who": "wrong key"})),
    ("H2", "refused by nobody: no answer",
     lost({"route": "kanban", "who": "wrong key"}, "status", error="no answer in time")),
    ("H5", "a delivery was not made", gone({"try": "2"})),
    ("H5", "nobody looked what is stored", rows({}, lambda r: r.pop("stored", None))),
    ("H6", "a delivery was not made", gone({"try": "signed ahead"})),
    ("H6", "nobody looked what is stored",
     rows({}, lambda r: "stored" in r and r.update(stored=None))),
    ("H6", "nobody counted", rows({}, lambda r: r.pop("counted", None))),
    ("D2", "there is no such command", swap('{"journal_mode"', "bash: not found: ")),
    ("D5", "VictoriaMetrics does not answer", regex("retentionPeriod=", "x=")),
    ("D5", "no time", without("now")),
    ("D5", "the dispatcher's configuration is not there", swap("retention_days", "days")),
    ("O2", "not Prometheus", swap('{"status":"success"', "502 Bad Gateway")),
    ("O2", "Alertmanager does not answer", without("receivers")),
    ("O2", "nobody counted failures", without("figures")),
    ("O3", "nobody knows when it stopped", rows({}, lambda r: r.update(stopped=None))),
    ("O4", "the dispatcher does not answer",
     swap("rave_dispatcher_trace_coverage_ratio 1.0", "curl: (7) Failed")),
    ("O4", "a number that is none", swap("ratio 1.0", "ratio NaN")),
    ("H3", "old TLS not tried", lost({"try": "old"}, "refused", error="no protocols available")),
    ("H3", "the chain was not tried", gone({"try": "untrusted"})),
    ("H3", "a page was not asked for", gone({"page": CONSOLE})),
    ("H4", "the ingress does not count", rows({}, lambda r: r.pop("counted", None))),
    ("H4", "a route was not asked", gone({"route": "kanban"})),
    ("H4", "times that are no numbers", put({"route": "kanban"}, ms=["fast"])),
    ("H4", "times that are no times", put({"route": "kanban"}, ms=[float("nan")] * 500)),
    ("X4", "the search was not made", without("places")),
    ("X1", "nobody knows when it was read", regex(r"(?m)^read .*\n", "")),
    ("X1", "it was read at no time", regex(r"(?m)^read .*", "read nan")),
    ("X7", "nobody knows when nginx read", regex(r"(?m)^booted .*\n", "")),
    ("X7", "it was started at no time", regex(r"(?m)^booted \S+", "booted 1.2.3")),
    ("X5", "the states of units are not known", without("states")),
    ("X4", "lists were not looked for", without("lists")),
    ("X4", "the mount is not known",
     chain(without("mount"), swap("== swap", "== mount ==\n== swap"))),
    ("X4", "the disk is elsewhere",
     swap("== disk ==\nnothing\n", "== disk ==\nnot looked at\n")),
    ("X4", "grep said nothing of the disk", swap("== disk ==\nnothing\n", "== disk ==\n")),
    ("D6", "no digests", without("digests")),
    ("D6", "digests that are none",
     chain(without("digests"), swap("== places", "== digests ==\nsh: no\n== places"))),
    ("D6", "the files hold nothing",
     chain(without("wanted"), swap("== end", "== wanted ==\n== end"))),
    ("S5", "a service was not killed", regex(r"(?m)^router \d+\n", "")),
    ("D1", "PostgreSQL was not asked", without("database")),
    ("D1", "there is no psql",
     chain(without("database"),
           swap("== end", "== database ==\nsudo: psql: command not found\n== end"))),
    ("X5", "no mounts", chain(without("mounts"), swap("== setuid", "== mounts ==\n== setuid"))),
    ("X5", "nothing was searched",
     chain(without("searched"), swap("== end", "== searched ==\n== end"))),
    ("X6", "systemd-analyze failed",
     chain(without("exposures"), swap("== end", "== exposures ==\nFailed to connect\n== end"))),
    ("X6", "no process was looked at", without("processes")),
    ("X7", "a row is cut short", row("changed", '["/etc/fstab", "file"]')),
    ("X7", "it broke off", within("changed", FILE)),
    ("X7", "no Python", regex(r"(?ms)(^== changed ==\n).*?(?=^== )", r"\1")),
    ("X7", "the image has no inventory", without("image")),
    ("X7", "no mounts", regex(r"(?m)^\d+ .*\n", "")),
    ("X6", "a unit is missing", regex(r"(?m)^.* for nginx\.service: .*\n", "")),
)  # fmt: skip


# --- the tests -------------------------------------------------------------------------------


def same_probe(check: Check) -> Iterable[Check]:
    return (c for c in CHECKS if c.probe == check.probe)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.id)
def test_a_healthy_machine_holds(check: Check) -> None:
    found = judge(check, recorded(check))
    assert (found.ok, found.ran) == (True, True), found.seen


@pytest.mark.parametrize("row", BROKEN, ids=lambda r: f"{r.ids}: {r.name}")
def test_one_thing_wrong_fails_exactly_its_check(row: Broken) -> None:
    check = BY_ID[row.ids]
    output = row.change(recorded(check))
    for each in same_probe(check):
        found = judge(each, output)
        if each is check:
            assert (found.ok, found.ran) == (False, True), found.seen
            assert row.says in found.seen
            assert found.remedy
        else:
            assert found.ok, f"{each.id} fails too: {found.seen}"


@pytest.mark.parametrize(
    ("number", "change"),
    [(i, c) for i, _, c in UNREADABLE],
    ids=[f"{i}: {n}" for i, n, _ in UNREADABLE],
)
def test_what_proves_nothing_is_an_error(number: str, change: Change) -> None:
    check = BY_ID[number]
    found = judge(check, change(recorded(check)))
    assert (found.ok, found.ran) == (False, False), found.seen
    assert found.remedy


# what a machine with Grafana says beyond that which was recorded; the form is the script's own
SHOWN = "== dashboards ==\n" + "".join(f"{uid} 200 yes\n" for uid in DASHBOARDS) + "== end"


@pytest.mark.parametrize(
    ("change", "ok", "says"),
    [
        (swap("", ""), True, "3 dashboards"),
        (swap("health 200 yes", "health 404 no"), False, "rave-project-health is missing"),
        (swap("rave-project-health 200 yes\n", ""), False, "rave-project-health is missing"),
        (swap("health 200 yes", "health 200 no"), False, "is not the provisioned one"),
        (swap("health 200 yes", "health 401 no"), False, "Grafana refuses its first user"),
        (swap("health 200 yes", "health 500 no"), False, "Grafana answers 500"),
    ],
)
def test_a_machine_with_grafana_has_its_dashboards(change: Change, ok: bool, says: str) -> None:
    plan = dataclasses.replace(SUBJECT.plan, dashboards=DASHBOARDS)
    output = change(swap("== end", SHOWN)(recorded(BY_ID["O2"])))
    found = BY_ID["O2"].judge(Subject(plan, EngineName.NIX), output)
    assert (found.ok, found.ran) == (ok, True), found.seen
    assert says in found.seen
    assert "3 dashboards" in found.expected


@pytest.mark.parametrize("answer", ["", "rave-project-health 000 no\n", "curl: (7) refused\n"])
def test_a_grafana_that_says_nothing_is_an_error(answer: str) -> None:
    plan = dataclasses.replace(SUBJECT.plan, dashboards=DASHBOARDS)
    output = swap("== end", f"== dashboards ==\n{answer}== end")(recorded(BY_ID["O2"]))
    found = BY_ID["O2"].judge(Subject(plan, EngineName.NIX), output)
    assert (found.ok, found.ran) == (False, False), found.seen


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.id)
def test_an_answer_that_was_cut_off_is_not_judged(check: Check) -> None:
    whole = recorded(check)
    lines = whole.splitlines(keepends=True)
    for kept in range(0, len(lines), max(1, len(lines) // 40)):
        found = judge(check, "".join(lines[:kept]))
        assert not found.ok, f"holds with {kept} of {len(lines)} lines"
    assert not judge(check, "").ran
    assert not judge(check, whole[: len(whole) // 2]).ok


def test_every_check_is_broken_in_some_way() -> None:
    assert {r.ids for r in BROKEN} == set(BY_ID) == {i for i, _, _ in UNREADABLE}


def test_a_unit_restarted_after_the_boot_started_when_it_first_did() -> None:
    check = BY_ID["S3"]
    first = {"UNIT": NGINX, "__MONOTONIC_TIMESTAMP": "16000000"}
    again = {"UNIT": NGINX, "__MONOTONIC_TIMESTAMP": f"{SLOW}"}
    change = chain(
        unit(NGINX, ActiveEnterTimestampMonotonic=str(SLOW)),
        within("journal", f"{json.dumps(again)}\n{json.dumps(first)}\nno JSON"),
    )
    assert judge(check, change(recorded(check))).ok


@pytest.mark.parametrize(
    "change",
    [
        file("/etc/fstab"),
        chain(row("changed", FOLDER % '["b"]'), row("image", FOLDER % '["b"]')),
        within("runtime", "/run/systemd/transient/rave-task-0.service"),
        within("runtime", "/run/systemd/transient/session-3.scope.d/50-TasksMax.conf"),
        swap("\n== image ==", "\n99 1 0:9 / /home/agent rw - tmpfs x rw\n== image =="),
    ],
    ids=["undone", "a folder as before", "a task", "a session", "a mount elsewhere"],
)
def test_what_is_as_in_the_image_is_no_fault(change: Change) -> None:
    found = judge(BY_ID["X7"], change(recorded(BY_ID["X7"])))
    assert found.ok, found.seen


@pytest.mark.parametrize(
    "change",
    [
        chain(within("confined", "nginx.service unconfined"),
              swap("nginx.service active", "nginx.service reloading")),
        within("capable", "/usr/bin/a b (No such file or directory)"),
        within("setuid", "find: '/usr/bin/it's': No such file or directory"),
    ],
    ids=["a unit that reloads", "a program that went", "a file that went"],
)  # fmt: skip
def test_what_changes_while_it_is_looked_at_is_no_fault(change: Change) -> None:
    found = judge(BY_ID["X5"], change(recorded(BY_ID["X5"])))
    assert found.ok, found.seen


def test_a_folder_with_an_access_list_has_what_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    # linux/posix_acl_xattr.h: version 2; user, user 1000, group, mask and others, each by its tag,
    # what it may do and whom it names
    no = 0xFFFFFFFF
    entries = [(1, 7, no), (2, 7, 1000), (4, 5, no), (16, 7, no), (32, 5, no)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)
    os.setxattr(folder, "system.posix_acl_access", acl)
    done = subprocess.run(
        [sys.executable, "-IB", "-c", integrity._DESCRIBE],
        input=f"{folder}\0{tmp_path}/none\0", capture_output=True, text=True, check=True,
    )  # fmt: skip
    row, count = map(json.loads, done.stdout.splitlines())
    assert (row[:2], row[6:], count) == ([str(folder), "dir"], ["acl", ["inner"]], 1)
    assert integrity.file_faults([row], [[*row[:6], "", ["inner"]]], ()) == [
        f"{folder} has an access control list"
    ]


STORE = """\
== system ==
/run/booted-system /nix/store/a-nixos
/run/current-system /nix/store/a-nixos
/etc/static /nix/store/e-etc/etc
/run/current-system/etc /nix/store/e-etc/etc
== etc ==
== runtime ==
== mounts ==
25 1 254:0 / / rw - ext4 /dev/vda rw
== environment ==
LOCALE_ARCHIVE
PATH
== running ==
MainPID=7
Id=nginx.service

== inside ==
/proc/7/mountinfo:99 1 0:9 /etc /etc ro - ext4 /dev/vda rw
== end ==
"""


@pytest.mark.parametrize(
    ("change", "ok", "ran", "says"),
    [
        (swap("", ""), True, True, "that was booted"),
        (swap("current-system /nix/store/a", "current-system /nix/store/b"), False, True,
         "the system is /nix/store/b-nixos, not /nix/store/a-nixos"),
        (swap("/etc/static /nix/store/e", "/etc/static /nix/store/f"), False, True,
         "/etc is of another system"),
        (within("runtime", "/run/systemd/system/x.service"), False, True, "goes before the image"),
        (within("etc", "Files /etc/static/sudoers and /etc/sudoers differ"), False, True,
         "/etc is not the system's: Files /etc/static/sudoers and"),
        (swap("0:9 /etc /etc", "0:9 /m /etc"), False, True, "mounted over /etc for nginx.service"),
        (within("environment", "LD_PRELOAD"), False, True, "each service gets LD_PRELOAD="),
        (swap("/nix/store/a-nixos", "/home/x"), False, False, "which system it runs"),
    ],
)  # fmt: skip
def test_nixos_runs_what_it_booted(change: Change, ok: bool, ran: bool, says: str) -> None:
    found = BY_ID["X7"].judge(dataclasses.replace(SUBJECT, engine=EngineName.NIX), change(STORE))
    assert (found.ok, found.ran) == (ok, ran)
    assert says in found.seen


def test_quiet_restarts_of_long_ago_are_no_fault() -> None:
    change = chain(unit(ROUTER, NRestarts="7"), clock("99.34", "100.793"))
    assert judge(BY_ID["S2"], change(recorded(BY_ID["S2"]))).ok


@pytest.mark.parametrize(
    ("expr", "why"),
    [
        ([match("icmpv6", "type", "echo-request"), ACCEPT], "ping"),
        ([match("tcp", "dport", 22), {"limit": {"rate": 3}}, ACCEPT], "an open port, limited"),
        ([match("tcp", "dport", 5432), {"drop": None}], "a port that is dropped"),
        ([{"counter": {"packets": 1, "bytes": 2}}], "a counter"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_harmless_rules_are_no_fault(expr: list[dict[str, Any]], why: str) -> None:
    found = judge(BY_ID["X2"], rule(*expr)(recorded(BY_ID["X2"])))
    assert found.ok, (why, found.seen)


def test_what_is_just_starting_has_not_given_up_rights_yet() -> None:
    text = process("vibe-kanban.service", "Uid", "0")(recorded(BY_ID["X6"]))
    assert not judge(BY_ID["X6"], text).ok
    assert judge(BY_ID["X6"], process("vibe-kanban.service", "Name", "(kanban)")(text)).ok


def test_a_worker_that_has_ended_is_nobody() -> None:
    """nginx was reloaded while it was asked who listens."""
    text = recorded(BY_ID["X2"])
    pids = re.findall(r"(?m)^(\d+) 0::/system.slice/nginx.service$", text)
    assert len(set(pids)) > 1
    ended = every(rf"(?m)^{pids[0]} 0::/.*\n")(text)
    assert judge(BY_ID["X2"], within("owners", f"{pids[0]} gone")(ended)).ok


def test_where_nixos_keeps_its_setuid_programs_they_count() -> None:
    held = {"/run": frozenset({"nosuid", "nodev"}), "/run/wrappers": frozenset({"nodev"})}
    wanted = {"/run": ("nosuid", "nodev")}
    assert mount_faults(wanted, held, ["/run/wrappers/bin/sudo"]) == []
    assert mount_faults(wanted, held, ["/usr/bin/sudo"]) == [
        "/run/wrappers is mounted without nosuid"
    ]
    held["/run/wrappers"] = frozenset()
    assert mount_faults(wanted, held, ["/run/wrappers/bin/sudo"]) == [
        "/run/wrappers is mounted without nodev"
    ]


def test_the_offset_of_the_clocks() -> None:
    assert boot_offset(None, 5.0) is None
    assert boot_offset(6.5, 5.0) == 1.5
    assert boot_offset(4.5, 5.0) == 0.0  # clocks read one after the other
    assert boot_offset(1.0, 5.0) is None  # older than its QEMU: from a snapshot
    assert boot_offset(100.0, 5.0) is None  # was paused


def test_nearest_rank() -> None:
    assert nearest_rank([7.0], 99) == 7.0
    assert nearest_rank([float(n) for n in range(1, 101)], 99) == 99.0
    assert nearest_rank([float(n) for n in range(1, 501)], 99) == 495.0
