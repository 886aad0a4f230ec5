"""What each check promises and why: the one source of `verify --explain` and docs/verify.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Explanation:
    """A check in words."""

    promise: str  # Markdown, as the table of docs/verify.md has it
    threat: str
    probe: str
    failing: str
    action: str


def text(id_: str, title: str, suite: str, *, disruptive: bool) -> str:
    """A check's explanation for a person, ending with a newline. Raises KeyError when unknown."""
    e = EXPLANATIONS[id_]
    rows = (
        ("holds when", _plain(e.promise)),
        ("guards against", e.threat),
        ("how it is probed", e.probe),
        ("a failure means", e.failing),
        ("what to do", e.action),
    )
    kind = f"suite {suite}, {'disruptive' if disruptive else 'not disruptive'}"
    body = "".join(f"\n{name}:\n  {value}\n" for name, value in rows)
    return f"{id_}: {title} ({kind})\n{body}"


def _plain(markdown: str) -> str:
    """What docs/verify.md says, for a terminal: a link there is to a page of docs/."""
    return re.sub(r"\[(\w+)\]\(([^)]+)\)", r"\1: docs/\2", markdown).replace("`", "")


EXPLANATIONS: Final[Mapping[str, Explanation]] = {
    "S1": Explanation(
        "systemd says `running`, no unit has failed, no job waits",
        "a machine that looks up while part of it never started",
        "systemctl's SystemState and NFailedUnits; the failed units and waiting jobs by name",
        "a unit, of the Plan or not, has failed, or the boot has not ended",
        "ravectl logs UNIT for the unit that is named",
    ),
    "S2": Explanation(
        "every unit of the Plan is active, and so are those that look after them",
        "a service that is gone, or one that is restarted again and again and looks active",
        "systemctl show of each unit of the Plan: load and active state, restarts, last start",
        "the service that is named does not do its work now",
        "ravectl logs UNIT; then start it, or bring the machine up anew",
    ),
    "S3": Explanation(
        "every unit was active within 60 s of the start",
        "a start so slow that nobody brings up a fresh machine for each task",
        "when each unit was first active, by systemd and the journal, and the age of QEMU",
        "the unit that is named was late; on a loaded host under emulation, perhaps not its fault",
        "ravectl ssh -- systemd-analyze critical-chain UNIT; look at the host's load",
    ),
    "S4": Explanation(
        "the machine's memory is the Plan's, and the kernel holds each unit to its limits of "
        "memory, processors, their weight and tasks (read from its cgroup); its OOM score, and "
        "its process', is the Plan's",
        "one service, or an agent's task, that takes the memory or processors of all others",
        "systemd's properties and memory.max, cpu.max and pids.max of each unit's control group",
        "a limit was changed at run time, or systemd could not put it into force",
        "ravectl build, then ravectl up; ravectl exec -- systemctl cat UNIT shows a change by hand",
    ),
    "H1": Explanation(
        "every route answers those who may use it, as the Plan says",
        "a service that runs and cannot be reached",
        "one request to each route through the ingress, with each credential that it takes",
        "the ingress or the service behind the route does not answer as it should",
        "ravectl logs nginx, and of the service behind the route",
    ),
    "H2": Explanation(
        "every route refuses those who may not: nobody, a wrong password, a wrong key",
        "authentication bypass: a route that is open to whoever finds it",
        "requests to each route without credentials and with wrong ones or another route's",
        "somebody who may not use the route can",
        "ravectl down at once; mend the route, then ravectl build and ravectl up",
    ),
    "H3": Explanation(
        "TLS 1.3 and nothing older, certificate from the workspace's CA for every host name, "
        "security headers, no versions; the console allows no inline code",
        "eavesdropping and downgrade on the network, framing and script injection in the browser",
        "handshakes for each host name: trusted, with TLS 1.2 at most, and without our CA; the "
        "headers of pages that are found, refused, missing or asked for wrongly",
        "the ingress's configuration or certificate is not the one that was built",
        "mend the ingress's configuration, then ravectl build and ravectl up",
    ),
    "H4": Explanation(
        "the 99th percentile of 500 requests to each route is below 200 ms: seen from "
        "outside, and by what the ingress itself counted meanwhile",
        "a machine that is too slow to work with",
        "500 requests to each route, one after the other on a kept-alive connection, the services "
        "beside one another and nothing else beside them; the ingress's histogram before and after",
        "a service is slow, or the host leaves the machine too little of its processors",
        "look at the host's load, then at ravectl ssh -- top",
    ),
    "H5": Explanation(
        "a signed webhook that is delivered three times is stored once and becomes a task "
        "that an agent completes; the trace is the same throughout",
        "lost or doubled work: senders repeat what was not answered in time",
        "one delivery signed as GitHub signs, three times; then the API is asked for the event, "
        "its task and their trace",
        "the way from a webhook to a finished task is broken",
        "ravectl logs dispatcher",
    ),
    "H6": Explanation(
        "a wrong or missing signature, one of long ago or ahead, a body that is too large or "
        "not JSON: refused, counted, nothing stored",
        "forged and replayed deliveries that make agents run",
        "six wrong deliveries through the ingress; the dispatcher's counters before and after",
        "a delivery that nobody may make is taken, or is refused and not counted",
        "ravectl logs dispatcher; ravectl down when a forged one was stored",
    ),
    "D2": Explanation(
        "the event store's `integrity_check` is ok; it is in WAL mode with synchronous FULL",
        "events that were acknowledged and are lost when the power is",
        "rave-dispatcher check in the machine, as the service's own user",
        "the store is damaged, or a commit may not be on the disk",
        "the dispatcher's journal says how to restore it: ravectl logs dispatcher",
    ),
    "D5": Explanation(
        "Prometheus, VictoriaMetrics and the dispatcher keep what the profile says, for as "
        "long, and nothing older (backups are not here yet)",
        "a disk that fills up, history that is missing, data that is kept longer than promised",
        "the flags of each store, as it says them itself, and the age of the oldest sample",
        "a store runs with other settings than the profile's",
        "ravectl build, then ravectl reset",
    ),
    "D6": Explanation(
        "every secret in the machine is the one that the encrypted files hold: none missing, "
        "none of before, none beside them",
        "a rotation that was cut short, so that an old secret is still good",
        "SHA-256 of each file below /run/secrets, held against the encrypted files on this host",
        "the machine works with another value than the one on file",
        "ravectl secrets deliver",
    ),
    "X1": Explanation(
        "SSH takes keys only, never root, post-quantum exchanges and modern algorithms only, "
        "forwards nothing, blocks after three failures, makes no exceptions; asked of the "
        "daemon's configuration, which was not changed since it was read, and tried from outside",
        "guessed passwords and broken cryptography on the port that gives a shell",
        "sshd -T of the daemon that listens, the algorithms of its own key exchange, a password "
        "and root tried from outside",
        "sshd lets in more than it should, or in a weaker way",
        "undo it and reload sshd, or get the image's own disk: ravectl reset",
    ),
    "X2": Explanation(
        "nothing but 22 and 3002 can be reached; every listener is the Plan's, and of the unit "
        "whose port it is; the firewall's rules are those of its file (Debian), it drops the rest, "
        "limits new connections and, without `network.egress`, lets nothing out; "
        "accounts that run foreign code reach of the services their own and the router",
        "network attacks on services that were meant for the machine itself",
        "ss, the rules of nftables followed to each accept, and connections to the machine's own "
        "outer address",
        "a port is open that should not be, or the firewall no longer guards",
        "stop what listens, or give it a place in the profile and build the machine anew",
    ),
    "X4": Explanation(
        "each secret has the owner and mode that is declared, on a tmpfs that is not swapped;"
        " no value is in a process, the journal, a unit, in memory where others may read it "
        "(an agent's own file, too), or on "
        "the machine's disk (deleted files too). After a rotation the former values are searched "
        "for as well",
        "exfiltration: a secret where another user, a log or a copy of the disk shows it",
        "the files' owners and modes, and a search by value through processes, journal, units, the "
        "machine's disk and its image",
        "the secret that is named can be read by others: count it as known",
        "mend what wrote it (the place is named), then ravectl rotate-secrets",
    ),
    "O1": Explanation(
        "Prometheus has every scrape target, and each is up",
        "a service that nobody watches",
        "Prometheus' own list of its targets, held against the Plan",
        "metrics, and the alerts that rest on them, are missing",
        "ravectl verify --suite service; ravectl logs of the exporter that is named",
    ),
    "O2": Explanation(
        "every alert of the Plan is loaded and none beside them, no rule fails, each receiver"
        " is there, limits of queries are set; where there is Grafana, it has each dashboard "
        "of the Plan from its file",
        "a fault that no alert tells of",
        "the rules, flags and failure counters of Prometheus, the receivers of Alertmanager",
        "an alert would not be raised, or not arrive",
        "ravectl logs prometheus, ravectl logs alertmanager",
    ),
    "O3": Explanation(
        "a service that is stopped is told of at the dispatcher in less than 30 s, measured "
        "from the stop, and its end when it runs again. Disruptive: only with `--disruptive` "
        "or `--check O3`",
        "alerting that is configured and does not work",
        "Vibe Kanban is stopped and started; a timer in the machine starts it if we cannot",
        "nobody would have been told of the outage in time",
        "ravectl logs prometheus, ravectl logs alertmanager",
    ),
    "O4": Explanation(
        "of the last hour's agent tasks that ended 30 s ago or earlier, at least 95% have a "
        "complete trace: webhook, event, task",
        "work that cannot be traced to what caused it",
        "the ratio that the dispatcher computes from its store",
        "spans are lost on the way from a webhook to the end of its task",
        "ravectl logs dispatcher",
    ),
    "X3": Explanation(
        "three failed logins block the next, by SSH and by the ingress, for at most 60 s; "
        "open sessions and the right password are not blocked, and it is counted. Disruptive:"
        " only with `--disruptive` or `--check X3`",
        "guessing of passwords and keys, and a lock-out of the operator by who guesses",
        "three logins with a wrong key and three with a wrong password, then a fourth of "
        "each; what is let in meanwhile and how long it lasts is measured",
        "who guesses is not slowed down, or whoever may come in is kept out with him",
        "ravectl logs ssh; see docs/adr/0010-failed-logins.md, then ravectl build and ravectl"
        " up",
    ),
    "S5": Explanation(
        "each service whose process is killed (SIGKILL) runs again and answers in less than 30 "
        "s. Disruptive: only with `--disruptive` or `--check S5`",
        "a service that stays down after a crash until somebody looks",
        "each service's main process is killed; how long until another runs and answers is "
        "measured",
        "the unit's restart rules are not the Plan's, or the service cannot start on what it "
        "left behind",
        "ravectl logs UNIT; docs/runbooks/ServiceDown.md",
    ),
    "D1": Explanation(
        "PostgreSQL wrote a row, flushed the commit to its log and gave it back to another "
        "session; `fsync`, `full_page_writes`, `synchronous_commit` and checksums are on, no "
        "block was found damaged",
        "a commit that a loss of power takes away, or damage on the disk that nobody sees",
        "a row is inserted by one session and read by another; the log's flushed position; "
        "settings and checksum failures by PostgreSQL's own views",
        "PostgreSQL does not wait for the disk, cannot be written, or has found a damaged block",
        "ravectl logs postgresql; docs/runbooks/DatabaseCorrupt.md",
    ),
    "X5": Explanation(
        "the kernel's settings, the blocked modules and the mount options are the Plan's; no "
        "program but those that it names is setuid or setgid and none has a capability (Debian), "
        "looked for wherever that would be honoured; AppArmor enforces the profile on each process "
        "of each service that is reached through the ingress; the kernel notes who opens secrets "
        "by hand and who uses sudo",
        "a program that got a foothold and reaches for the kernel or another's rights",
        "/proc/sys, /proc/modules, modprobe's configuration, mountinfo, a search for setuid "
        "files where the bit counts, AppArmor's label of each confined service, the kernel's audit "
        "rules",
        "the setting, module, mount, program or rule that is named is not what the Plan says",
        "ravectl build, then ravectl reset and ravectl up; undo a change by hand where it was "
        "made",
    ),
    "X6": Explanation(
        "what `systemd-analyze security` says of each unit is at most its limit in the Plan: "
        "2.0 for ours, 4.0 for others, 9.0 for sshd ([why](hardening.md#units)); no service runs "
        "as another account, and no process in its cgroup with more capabilities or without any "
        "filter where its unit has one",
        "a service that, once taken over, can do more to the machine than its work needs",
        "systemd-analyze security of each unit that has a limit in the Plan; of each service's "
        "process what the kernel says of its capabilities and system calls",
        "the sandbox of the unit that is named is weaker than it was designed",
        "ravectl exec -- systemd-analyze security UNIT; systemctl cat UNIT shows a change",
    ),
    "X7": Explanation(
        "no file, folder or link below `/boot`, `/etc`, `/opt` and `/usr` is other than in the "
        "image, was added or is gone, or has an access control list; nothing is mounted over "
        "them, for one service neither, and no configuration in `/run` and no variable of "
        "systemd's goes before theirs; nginx has read what is there (Debian). On NixOS: the system "
        "that runs is the one that was booted",
        "a change by hand that nobody remembers, of a setting that no other check asks for",
        "what is newer than the image, by the time that the kernel notes at each change; its "
        "SHA-256, mode, owner and capabilities against the image's inventory",
        "the file that is named was changed in the machine, which then is not what its image "
        "says; a rebuilt machine will not have the change",
        "undo it, or put it into the profile; ravectl reset gives a machine its image's files",
    ),
}  # fmt: skip
