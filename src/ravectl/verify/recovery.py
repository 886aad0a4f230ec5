"""Check S5: a service whose process is killed comes again by itself, and answers.

Disruptive: each service is gone for some seconds. All of it is one script in the machine, for SSH's
own daemon is among those killed: a session outlives its daemon.
"""

from __future__ import annotations

import re
import shlex

from ravectl.model import Suite
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

RETURNS_SECONDS = 30.0  # docs/verify.md
GIVEN_UP_SECONDS = 40

# A service answers when its health request does; the port alone where it speaks no HTTP. Of a unit
# whose socket systemd holds the port is open all the time, so that alone would prove nothing there.
RECOVERY_SCRIPT = """\
answers() { # port path status
  local line= words=()
  exec {conn}<>"/dev/tcp/127.0.0.1/$1" || return 1
  if [[ $2 ]]; then
    printf 'GET %%s HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\nConnection: close\\r\\n\\r\\n' "$2" >&"$conn"
    IFS= read -rt 5 line <&"$conn"
  fi
  exec {conn}>&-
  words=($line)
  [[ ! $2 || ${words[1]-} == "$3" ]]
} 2>/dev/null
main_of() { main=$(systemctl show -P MainPID "$1"); }
probe() { # service unit port path status
  main_of "$2"
  local before=$main began=${EPOCHREALTIME/./} now=
  if (( before == 0 )); then echo "$1 was-not-running"; return; fi
  kill -KILL "$before"
  while :; do
    sleep 0.2
    now=${EPOCHREALTIME/./}
    (( now - began < %(patience)d * 1000000 )) || { echo "$1 did-not-return"; return; }
    main_of "$2"
    (( main != 0 && main != before )) || continue
    systemctl is-active --quiet "$2" && answers "$3" "$4" "$5" && break
  done
  now=${EPOCHREALTIME/./}
  echo "$1 $(( (now - began) / 1000 ))"
}
echo '== returned =='
%(probes)s
"""


def recovery_script(subject: Subject) -> str:
    """The script that kills each service of the Plan and times its return."""
    rows = []
    for s in subject.plan.services:
        words = [s.name, subject.units()[s.name], str(s.health.port)]
        words += [s.health.path or "", str(s.health.status)]
        rows.append(f"probe {shlex.join(words)}")
    return RECOVERY_SCRIPT % {"patience": GIVEN_UP_SECONDS, "probes": "\n".join(rows)}


def _collect(target: VerifyTarget, deadline: float) -> str:
    return guest.run_script(target, recovery_script(target.subject), deadline, root=True)


def judge_recovery(subject: Subject, output: str) -> Judgement:
    """Each killed service was active again and answered in less than RETURNS_SECONDS."""
    expected = f"each service that is killed answers again in < {RETURNS_SECONDS:.0f} s"
    text = (guest.sections(output) or {}).get("returned")
    if text is None:
        return unreadable(expected, "the answer about the services is incomplete")
    seen = {m[1]: m[2] for m in re.finditer(r"^(\S+) (\S+)$", text, re.M)}
    faults: list[str] = []
    slowest = ("", 0.0)
    for service in subject.plan.services:
        result = seen.get(service.name)
        if result is None:
            return unreadable(expected, f"nothing was told of {service.name}")
        took = guest.number(result)
        if took is None:
            faults.append(f"{service.name} {result.replace('-', ' ')}")
            continue
        slowest = max(slowest, (service.name, took / 1000), key=lambda row: row[1])
        if took / 1000 >= RETURNS_SECONDS:
            faults.append(f"{service.name} came again after {took / 1000:.1f} s")
    culprit = faults[0].split()[0] if faults else ""
    return judged(
        expected,
        f"all {len(seen)} did; the slowest was {slowest[0]} with {slowest[1]:.1f} s",
        faults,
        f"see why: ravectl logs {culprit}",
    )


CHECKS = (
    Check(
        "S5", Suite.SERVICE, "a service that is killed comes again within 30 s",
        Probe("recovery", _collect, 600.0, alone=True), judge_recovery, disruptive=True,
    ),
)  # fmt: skip
