"""Each check of `verify` is broken on the real machine, and exactly the checks that should fail do.

A mutation is one way in which a machine goes wrong. Verifying once for each takes too long, so
several are made at once, each in one round of four. With RAVE_EVERY_STEP=1 there are eight, by a
code (15 minutes more): a mutation is made in two of them, no two mutations in the same two. Should
one of them make a check fail that is not its own, there is a round in which it is made and whatever
else that check may fail for is not: the round shows it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from ravectl.verify.checks import CHECKS
from tests.conftest import Tool

pytestmark = pytest.mark.vm

NGINX, SSHD = "/etc/nginx/nginx.conf", "/etc/ssh/sshd_config"
DISPATCHER = "/etc/rave/dispatcher.yaml"
PROMETHEUS, ALERTS = "/etc/prometheus/prometheus.yml", "/etc/prometheus/alerts.yml"
STORE = "/var/lib/rave-dispatcher/events.db"
# H4 is half of a verification's time. S3 tells of the start, which no mutation but LATE touches; on
# a loaded host it may be late by itself. Both are asked where they should fail; H4 at the end, too.
SELDOM = {"H4", "S3"}


@dataclass(frozen=True)
class Mutation:
    """One way to go wrong. `do`, `undo` and `then` are Bash, run by root in the machine."""

    name: str
    fails: str  # the checks that should fail, separated by spaces
    says: str  # a pattern of what one of them says of it
    do: str
    undo: str
    then: str = ""  # after either, and once for all that want the same


def edit(path: str, old: str, new: str, then: str) -> tuple[str, str, str]:
    """Scripts that change a text in a file, which must be there, and change it back."""

    def script(a: str, b: str) -> str:
        pattern = re.sub(r"[][.*^$]", r"\\\g<0>", a)
        return f"grep -qF '{a}' {path} && sed -i 's|{pattern}|{b}|' {path}"

    return script(old, new), script(new, old), then


def store(lines: str) -> str:
    opened = f"import sqlite3\ns = sqlite3.connect('{STORE}')\n"
    return f"/usr/bin/python3 - <<'E'\n{opened}{lines}s.commit()\nE"


def setting(unit: str, lines: str, undone: str = "") -> tuple[str, str, str]:
    """Scripts that give a unit a drop-in, and take it away and do what else is to be `undone`."""
    folder = f"/run/systemd/system/{unit}.d"  # drop-ins of all places are read in one order
    made = f"mkdir -p {folder} && printf '[Service]\\n{lines}\\n' >{folder}/zz-mutation.conf"
    reload = "systemctl daemon-reload"
    return made, f"rm -r {folder}\n{reload}\n{undone}", reload


def afterwards(then: str, do: str, undo: str, _: str) -> tuple[str, str]:
    """Scripts of which the second alone does what else is to be done."""
    return do, f"{undo}\n{then}"


# who may do what with a file: the owner, uid 1001, its group, all of these at most, others
LISTED = """/usr/bin/python3 - <<'E'
import os, struct
name, nobody = 'system.posix_acl_access', 0xffffffff
rows = ((1, 6, nobody), (2, 4, 1001), (4, 4, nobody), (16, 4, nobody), (32, 4, nobody))
acl = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *row) for row in rows)
%s
E"""
RELOAD_NGINX = "nginx -tq && systemctl reload nginx"
RESTART = "systemctl restart rave-dispatcher"
RELOAD_RULES = "systemctl reload prometheus"
RELOAD_SSHD = "systemctl reload ssh"


def scraped(job: str, up: bool) -> str:
    """A script that waits until Prometheus finds each target of a job up, or each down.

    It looks every 10 s at most targets, and every 15 s at itself.
    """
    wanted, other = (1, 0) if up else (0, 1)
    return f"""\
for ((i = 0; i < 80; i++)); do
  if {{ exec {{c}}<>/dev/tcp/127.0.0.1/9090; }} 2>/dev/null; then
    printf 'GET /api/v1/query?query=up{{job="{job}"}} HTTP/1.0\\r\\n\\r\\n' >&"$c"
    seen=$(cat <&"$c")
    [[ $seen == *',"{wanted}"]'* && $seen != *',"{other}"]'* ]] && exit
  fi
  sleep 0.5
done
exit 1"""


MUTATIONS = (
    Mutation(
        "a unit has failed", "S1", "rave-mutation-failed",
        "systemd-run -q --unit=rave-mutation-failed -p Type=oneshot false; true",
        "systemctl reset-failed rave-mutation-failed",
    ),
    Mutation(
        "a service is stopped", "S2 S4 O1", "prometheus-pushgateway.service is inactive",
        f"systemctl stop prometheus-pushgateway\n{scraped('pushgateway', up=False)}",
        f"systemctl start prometheus-pushgateway\n{scraped('pushgateway', up=True)}",
    ),
    Mutation(
        "a limit of memory is raised", "S4 X7", "prometheus-node-exporter.service",
        "systemctl set-property --runtime prometheus-node-exporter MemoryMax=infinity",
        "rm -r /run/systemd/system.control/prometheus-node-exporter.service.d\n"
        "systemctl daemon-reload",
    ),
    Mutation(
        "a route leads nowhere", "H1 X7", "kanban.*502",
        *edit(NGINX, "server 127.0.0.1:3000;", "server 127.0.0.1:3999;", RELOAD_NGINX),
    ),
    Mutation(
        "a page asks for no password", "H2 X7", "console .*no credentials",
        *edit(NGINX, "location = / {", "location = / { auth_basic off;", RELOAD_NGINX),
    ),
    Mutation(
        "TLS 1.2 is on", "H3 X7", "TLS ?v?1.2",
        *edit(NGINX, "ssl_protocols TLSv1.3;", "ssl_protocols TLSv1.2 TLSv1.3;", RELOAD_NGINX),
    ),
    Mutation(
        "versions are told", "H3 X7", "nginx/1",
        *edit(NGINX, "server_tokens off;", "server_tokens on;", RELOAD_NGINX),
    ),
    Mutation(
        "the ingress halts again and again", "H4", "ms",
        # once, after others have reloaded it: searching each time would keep the processors from
        # what measures; $$ is systemd's $
        "systemd-run -q --unit=rave-mutation-halts bash -c 'sleep 10; pids=$(pgrep -x nginx); "
        "while sleep 0.6; do kill -STOP $$pids; sleep 0.4; kill -CONT $$pids; done'",
        "systemctl stop rave-mutation-halts; pkill -CONT -x nginx; true",
    ),
    Mutation(
        "tasks end in failure", "H5 X7", r"its task is (pending|failed|running)",
        *edit(DISPATCHER, "command: [/usr/bin/env, tee, TASK.md]", "command: [/bin/false]",
              RESTART),
    ),
    Mutation(
        "webhooks may be larger", "H6 X7", "too large",
        *edit(DISPATCHER, "body_bytes: 1048576", "body_bytes: 9048576", RESTART),
    ),
    Mutation(
        "PostgreSQL does not wait for the disk", "D1", "fsync is off",
        "sudo -u postgres psql -qc 'alter system set fsync = off' -c 'select pg_reload_conf()'",
        "sudo -u postgres psql -qc 'alter system reset fsync' -c 'select pg_reload_conf()'",
    ),
    Mutation(
        "events are kept for longer", "D5 X7", "70",
        *edit(DISPATCHER, "retention_days: 7", "retention_days: 70", RESTART),
    ),
    Mutation(
        "a secret is another", "D6", "postgres/exporter-password",
        "echo >>/run/secrets/postgres/exporter-password",
        "truncate --size=-1 /run/secrets/postgres/exporter-password",
    ),
    Mutation(
        "SSH takes passwords", "X1 X7", "(?i)passwordauthentication",
        *edit(SSHD, "PasswordAuthentication no", "PasswordAuthentication yes", RELOAD_SSHD),
    ),
    Mutation(
        "root may sign in", "X1 X7", "(?i)permitrootlogin",
        *edit(SSHD, "PermitRootLogin no", "PermitRootLogin yes", RELOAD_SSHD),
    ),
    Mutation(
        "a port is open", "X2", "8888",
        "systemd-run -q --unit=rave-mutation-port --socket-property=ListenStream=8888 "
        "--socket-property=Accept=yes cat",
        "systemctl stop rave-mutation-port.socket",
    ),
    Mutation(
        "the firewall lets all in", "X2", "drop",
        "nft chain inet rave input '{ policy accept; }'",
        "nft chain inet rave input '{ policy drop; }'",
    ),
    Mutation(
        "a secret is in a unit's environment", "X4", "a value is seen in",
        "systemd-run -q --unit=rave-mutation-leak "
        '--setenv=TOKEN="$(cat /run/secrets/dispatcher/api-token)" sleep 3600',
        "systemctl stop rave-mutation-leak",
    ),
    Mutation(
        "a secret may be read by all", "X4", "dispatcher/github-secret",
        "chmod 444 /run/secrets/dispatcher/github-secret",
        "chmod 400 /run/secrets/dispatcher/github-secret",
    ),
    Mutation(
        "the kernel's messages are for all", "X5", "kernel.dmesg_restrict is 0",
        "sysctl -qw kernel.dmesg_restrict=0", "sysctl -qw kernel.dmesg_restrict=1",
    ),
    Mutation(
        "a program is setuid", "X5 X7", "/usr/bin/true is setuid",
        "chmod u+s /usr/bin/true", "chmod u-s /usr/bin/true",
    ),
    Mutation(
        "programs run from a common folder", "X5", "/dev/shm is mounted without noexec",
        "mount -o remount,exec /dev/shm", "mount -o remount,noexec /dev/shm",
    ),
    Mutation(
        "a target is not collected", "O1 X7", "requests is not scraped",
        *edit(PROMETHEUS, "job_name: requests", "job_name: mutation", RELOAD_RULES),
    ),
    Mutation(
        "a unit's sandbox is open", "X6 X7", "vibe-kanban.service is exposed",
        *setting("vibe-kanban.service",
                 "ProtectSystem=no\\nPrivateDevices=no\\nRestrictNamespaces=no"),
    ),
    Mutation(
        "an alert is not there", "O2 X7", "DiskFilling",
        *edit(ALERTS, "alert: DiskFilling", "alert: Mutation", RELOAD_RULES),
    ),
    Mutation(
        "traces lack a part", "O4", "only .*% have one",
        store(
            "s.execute(\"create table mutation as select * from spans where name = 'event'\")\n"
            "s.execute(\"delete from spans where name = 'event'\")\n"
        ),
        store(
            "s.execute('insert or ignore into spans select * from mutation')\n"
            "s.execute('drop table mutation')\n"
        ),
    ),
    # where it stands, because the dispatcher does not start on such a store: in none of its two
    # rounds is a mutation that restarts it
    Mutation(
        "an index of the event store lacks a row", "D2", "metrics_timestamp",
        store(
            "s.execute('pragma writable_schema = 1')\n"
            "row = s.execute(\"select * from sqlite_schema where name = 'metrics_timestamp'\")\n"
            "row = row.fetchone()\n"
            "s.execute(\"delete from sqlite_schema where name = 'metrics_timestamp'\")\n"
            "s.commit()\n"
            "t = sqlite3.connect(s.execute('pragma database_list').fetchone()[2])\n"
            "t.execute(\"insert into metrics values (null, 'mutation', 1, 1, '{}', null)\")\n"
            "t.commit()\n"
            "s.execute('insert into sqlite_schema values (?, ?, ?, ?, ?)', row)\n"
        ),
        store(
            "s.execute('reindex metrics_timestamp')\n"
            "s.execute(\"delete from metrics where name = 'mutation'\")\n"
        ),
    ),
    Mutation(
        "nobody notes who uses sudo", "X5", "does not note: .*/usr/bin/sudo",
        "auditctl -D >/dev/null", "systemctl restart rave-audit",
    ),
)  # fmt: skip

LISTENS = (
    "import socket, time; s = socket.socket(socket.AF_INET6); s.setsockopt(41, 26, 1); "
    's.bind((\\"::\\", 3002)); s.listen(); time.sleep(3600)'
)
NODE = "prometheus-node-exporter.service"

# What looks as it should to who asks for settings, names and states alone; made at once
SUBTLE = (
    Mutation(
        "a stranger listens at the ingress's port", "X2", r":::3002 \(python3\) is not of nginx",
        f'systemd-run -q --unit=rave-mutation-stranger /usr/bin/python3 -c "{LISTENS}"; sleep 3',
        "systemctl stop rave-mutation-stranger",
    ),
    Mutation(
        "the firewall has one rule more", "X2", "the rules are not those of .*4444",
        "nft add rule inet rave input tcp dport 4444 drop", "nft -f /etc/nftables.conf",
    ),
    Mutation(
        "nobody counts bans", "S2", "rave-bans.service is inactive",
        "systemctl stop rave-bans", "systemctl start rave-bans",
    ),
    Mutation(
        "a process is ended first", "S4", "mtail.service: the kernel's oom_score_adj is 333",
        "echo 333 >/proc/$(systemctl show -P MainPID mtail)/oom_score_adj",
        "echo $(systemctl show -P OOMScoreAdjust mtail) "
        ">/proc/$(systemctl show -P MainPID mtail)/oom_score_adj",
    ),
    Mutation(
        "a process was started with more rights", "X6", f"{NODE} runs with more than Capab",
        "\n".join((
            *setting(NODE, "CapabilityBoundingSet=~")[::2], f"systemctl restart {NODE}",
            setting(NODE, "")[1],
        )),
        f"systemctl restart {NODE}\n{scraped('node', up=True)}",
    ),
    Mutation(
        "a profile of AppArmor allows all", "X5", "AppArmor's rave-router is not that of",
        "echo 'profile rave-router flags=(attach_disconnected) "
        "{ file, network, unix, signal, ptrace, capability, }' | apparmor_parser --replace",
        "cat /usr/lib/rave/apparmor.bin >/sys/kernel/security/apparmor/.replace",
    ),
    Mutation(
        "one interface takes redirects", "X5", "net.ipv4.conf.eth0.accept_redirects is 1",
        "sysctl -qw net.ipv4.conf.eth0.accept_redirects=1",
        "sysctl -qw net.ipv4.conf.eth0.accept_redirects=0",
    ),
    Mutation(
        "a copy of a secret lies open", "X4", "a value is seen in /run/rave-mutation",
        "install -m 644 /run/secrets/dispatcher/api-token /run/rave-mutation",
        "rm /run/rave-mutation",
    ),
    Mutation(
        "the ingress has one address more", "X7", "/etc/nginx/nginx.conf has other content",
        *afterwards(RELOAD_NGINX, *edit(
            NGINX, "location = / {", "location = /mutation { return 204; } location = / {", "",
        )),
    ),
    Mutation(
        "nginx has one line more than its files", "X7", "router-key.conf is not as",
        "echo '# mutation' >>/run/rave-ingress/router-key.conf", RELOAD_NGINX,
    ),
    Mutation(
        "sshd has read another configuration, which was put back", "X1", "changed after it was",
        f"{edit(SSHD, 'MaxSessions 10', 'MaxSessions 9', '')[0]} && {RELOAD_SSHD} && sleep 2 && "
        f"{edit(SSHD, 'MaxSessions 10', 'MaxSessions 9', '')[1]}", RELOAD_SSHD,
    ),
    Mutation(
        "one service sees another file", "X7", "mounted over /etc/fstab for mtail.service",
        "nsenter -t $(systemctl show -P MainPID mtail) -m mount --bind /etc/hosts /etc/fstab",
        "nsenter -t $(systemctl show -P MainPID mtail) -m umount /etc/fstab",
    ),
    Mutation(
        "somebody may read a file by a list", "X7", "/etc/fstab has an access control list",
        LISTED % "os.setxattr('/etc/fstab', name, acl)",
        LISTED % "os.removexattr('/etc/fstab', name)",
    ),
    Mutation(
        "every service gets a variable more", "X7", "each service gets RAVE_MUTATION=",
        "systemctl set-environment RAVE_MUTATION=1", "systemctl unset-environment RAVE_MUTATION",
    ),
    Mutation(
        "a program may be anybody", "X5", "/var/lib/mutation has cap_setuid=ep",
        "cp /bin/true /var/lib/mutation && setcap cap_setuid+ep /var/lib/mutation",
        "rm /var/lib/mutation",
    ),
    Mutation(
        "a stranger in a service's cgroup", "X6", "mtail.service: sleep runs without NoNewPriv",
        "(echo $BASHPID >/sys/fs/cgroup/system.slice/mtail.service/cgroup.procs; exec sleep 601) "
        ">/dev/null 2>&1 &", "pkill -xf 'sleep 601'",
    ),
    Mutation(
        "an agent has a copy of a secret", "X4", "/dev/shm/mutation",
        "install -o agent -m 400 /run/secrets/dispatcher/api-token /dev/shm/mutation",
        "rm /dev/shm/mutation",
    ),
    Mutation(
        "a file of the system is gone", "X7", "/etc/issue.net is gone",
        "mv /etc/issue.net /var/tmp/", "mv /var/tmp/issue.net /etc/",
    ),
    Mutation(
        "something lies over the system", "X7", "something is mounted over /usr/local/src",
        "mount -t tmpfs -o nosuid,mode=755 mutation /usr/local/src", "umount /usr/local/src",
    ),
)  # fmt: skip

# Disruptive checks, which are run alone
DISRUPTIVE = (
    Mutation(
        "a service that died stays so", "S5", "blackbox-exporter",
        *setting("prometheus-blackbox-exporter.service", "Restart=no",
                 "systemctl start prometheus-blackbox-exporter\n" + scraped("probes", up=True)),
    ),
    Mutation(
        "alerts are told late", "O3", "",
        *edit("/etc/prometheus/alertmanager.yml", "group_wait: 2s", "group_wait: 5m",
              "systemctl reload prometheus-alertmanager"),
    ),
    Mutation(
        "who fails to sign in is let try again", "X3", "",
        *edit(SSHD, "PerSourcePenalties authfail:15s", "PerSourcePenalties authfail:0s",
              RELOAD_SSHD),
    ),
)  # fmt: skip

LATE = Mutation(
    "a unit is late", "S3 X7", "prometheus-pushgateway.service",
    "mkdir -p /etc/systemd/system/prometheus-pushgateway.service.d\n"
    "printf '[Service]\\nExecStartPre=+/bin/sleep 58\\n'"
    " >/etc/systemd/system/prometheus-pushgateway.service.d/mutation.conf",
    "rm /etc/systemd/system/prometheus-pushgateway.service.d/mutation.conf",
    "systemctl daemon-reload",
)  # fmt: skip

if os.environ.get("RAVE_EVERY_STEP"):
    ROUNDS = 8
    CODES = tuple(zip(MUTATIONS, itertools.combinations(range(ROUNDS), 2), strict=False))
else:
    ROUNDS = 4
    # Neighbours in the list are of one check, or near it; in a round they would hide one another.
    # What sets a property does not share one with what reloads units, which takes it back.
    CODES = tuple((m, (i % ROUNDS,)) for i, m in enumerate(MUTATIONS))


def root(tool: Tool, parts: Iterable[str], then: Iterable[str]) -> None:
    """Run all of it, whatever of it fails; then fail if some did."""
    every = (*parts, *dict.fromkeys(filter(None, then)))
    script = "".join(f"( {part}\n) </dev/null || wrong=1\n" for part in every)
    tool("exec", "--", "sudo", "bash", "-s", stdin=f"{script}exit ${{wrong-0}}\n")


@contextlib.contextmanager
def mutated(tool: Tool, *mutations: Mutation) -> Iterator[None]:
    then = [m.then for m in mutations]
    try:
        root(tool, (m.do for m in mutations), then)
        yield
    finally:
        root(tool, (m.undo for m in reversed(mutations)), then)


def not_passed(tool: Tool, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The results of those of the checks that did not pass, by their ids."""
    words = [w for id_ in sorted(ids) for w in ("--check", id_)]
    report = json.loads(tool("verify", "--json", *words, code=None).stdout)
    assert {r["id"] for r in report["results"]} == ids
    return {r["id"]: r for r in report["results"] if r["outcome"] != "passed"}


def holds(mutations: tuple[Mutation, ...], found: dict[str, dict[str, Any]]) -> None:
    """What did not pass is exactly what the mutations fail, and each of these is named."""
    wanted = {id_ for m in mutations for id_ in m.fails.split()}
    said = "\n".join(f"{id_} {r['outcome']}: {r['seen']}" for id_, r in sorted(found.items()))
    assert sorted(found) == sorted(wanted), said
    assert {r["outcome"] for r in found.values()} == {"failed"}, said
    for m in mutations:
        assert any(re.search(m.says, found[id_]["seen"]) for id_ in m.fails.split()), (
            f"{m.name}\n{said}"
        )


def test_each_check_has_its_mutation() -> None:
    every = (*MUTATIONS, *DISRUPTIVE, LATE)
    assert {id_ for m in every for id_ in m.fails.split()} == {c.id for c in CHECKS}
    assert {m for m, _ in CODES} == set(MUTATIONS)
    assert {c.id for c in CHECKS if c.disruptive} == {m.fails for m in DISRUPTIVE}


@pytest.mark.parametrize("number", range(ROUNDS))
def test_exactly_the_checks_that_should_fail_do(machine: Tool, number: int) -> None:
    machine("up", "--safe")
    made = tuple(m for m, rounds in CODES if number in rounds)
    wanted = {id_ for m in made for id_ in m.fails.split()}
    asked = {c.id for c in CHECKS if not c.disruptive and (c.id not in SELDOM or c.id in wanted)}
    with mutated(machine, *made):
        found = not_passed(machine, asked)
    holds(made, found)


def test_what_looks_right_and_is_not(machine: Tool) -> None:
    machine("up", "--safe")
    with mutated(machine, *SUBTLE):
        found = not_passed(machine, {c.id for c in CHECKS if not c.disruptive} - SELDOM)
    holds(SUBTLE, found)


def test_disruptive_checks(machine: Tool) -> None:
    machine("up", "--safe")
    with mutated(machine, *DISRUPTIVE):
        found = not_passed(machine, {c.id for c in CHECKS if c.disruptive})
    holds(DISRUPTIVE, found)


def test_all_of_it_is_undone(machine: Tool) -> None:
    assert not_passed(machine, {c.id for c in CHECKS if not c.disruptive}) == {}


def test_a_unit_that_is_late(machine: Tool) -> None:
    machine("up", "--safe")
    with mutated(machine, LATE):
        machine("down")
        machine("up")
        found = not_passed(machine, {c.id for c in CHECKS if not c.disruptive} - {"H4"})
    holds((LATE,), found)
