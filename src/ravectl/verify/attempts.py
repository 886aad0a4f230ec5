"""X3: who fails to log in is blocked after three failures, and the block ends.

It blocks logins for up to a minute: of this host, as all of QEMU's clients look the same.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ravectl.model import BLOCK_SECONDS, LOGIN_FAILURES, Suite
from ravectl.verify import guest, sshprobe, web
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
from ravectl.verify.http import records

SETTLE_SECONDS = 16.0  # what one failed login before this counts for (sshd's authfail: 15 s)
COUNTED_SECONDS = 4.0  # until sshd has seen the ends of the failed ones, on a loaded host, too
PATIENCE_SECONDS = BLOCK_SECONDS + 15.0  # under emulation an attempt takes seconds
BLOCKED, ENDED = "blocked", "block ended"

BANS_SCRIPT = """\
echo '== bans =='
curl -sS --max-time 30 'http://127.0.0.1:%d/metrics?collect[]=textfile' | grep '^rave_bans_total'
curl -sS --max-time 30 'http://127.0.0.1:%d/metrics' | grep '^rave_bans_total'
"""


def _collect(target: VerifyTarget, deadline: float) -> str:
    time.sleep(SETTLE_SECONDS)
    before = _bans(target, deadline)
    both = at_once([lambda: _ssh(target, deadline), lambda: _ingress(target, deadline)])
    rows = [row for part in both for row in part]
    rows.append({"bans": {"before": before, "after": _bans(target, deadline)}})
    return "".join(json.dumps(row) + "\n" for row in rows)


def _bans(target: VerifyTarget, deadline: float) -> dict[str, int]:
    ports = [target.plan.service(n).health.port for n in ("node-exporter", "mtail")]
    text = guest.run_script(target, BANS_SCRIPT % tuple(ports), deadline)
    found = re.findall(r'^rave_bans_total{jail="([a-z]+)"} +(\d+)$', text, re.M)
    return {jail: int(count) for jail, count in found}


def _ssh(target: VerifyTarget, deadline: float) -> list[dict[str, object]]:
    login, user = target.connection.target, target.plan.operator
    left: Callable[[], float] = lambda: max(deadline - time.monotonic(), 0.1)  # noqa: E731

    def attempt() -> str:
        row = sshprobe.try_stranger(login, user, left())[1]
        said = row.get("outcome", row.get("error"))
        return BLOCKED if said == sshprobe.LOCKED_OUT else str(said)

    # at once, so that they fall within the seconds for which sshd counts them
    outcomes = at_once([attempt] * LOGIN_FAILURES)
    time.sleep(COUNTED_SECONDS)
    outcomes.append(attempt())
    began = time.monotonic()
    goes_on = target.connection.run("true", timeout=left()).returncode == 0
    ended = None
    while ended is None and time.monotonic() < min(began + PATIENCE_SECONDS, deadline):
        if sshprobe.try_key(login, user, left())[1].get("outcome") == sshprobe.LET_IN:
            ended = round(time.monotonic() - began, 1)
        else:
            time.sleep(1.0)
    return [{"door": "ssh", "outcomes": outcomes, ENDED: ended, "open session": goes_on}]


def _ingress(target: VerifyTarget, deadline: float) -> list[dict[str, object]]:
    user, context = target.ingress_user, web.trusting(target.ca_cert)
    wrong, right = web.basic(user, "no password"), web.basic(user, target.ingress_password)
    port = target.endpoint.https_port
    with web.Client(port, web.DEFAULT_HOST, context, deadline) as client:
        first = client.get("/", wrong).status
        if first == 429:  # somebody guessed, or this check ran, within the last minute
            time.sleep(BLOCK_SECONDS + 2)
            first = client.get("/", wrong).status
        outcomes = [first, *(client.get("/", wrong).status for _ in range(LOGIN_FAILURES))]
        began = time.monotonic()
        admitted = client.get("/", right).status
        ended = None
        while ended is None and time.monotonic() < min(began + PATIENCE_SECONDS, deadline):
            time.sleep(2.0)
            if client.get("/", wrong).status == 401:
                ended = round(time.monotonic() - began, 1)
    row: dict[str, object] = {"door": "ingress", "outcomes": outcomes, ENDED: ended}
    return [{**row, "right password": admitted}]


PROBE = Probe(
    "attempts", _collect, SETTLE_SECONDS + PATIENCE_SECONDS + BLOCK_SECONDS + 40, alone=True
)


def judge_attempts(subject: Subject, output: str) -> Judgement:
    """The fourth attempt is blocked at both doors, who may is not, it ends, and is counted."""
    expected = (
        f"after {LOGIN_FAILURES} failed logins the next is blocked, by SSH and by the ingress, for "
        f"at most {BLOCK_SECONDS} s; sessions and the right password are not; it is counted"
    )
    rows = records(output)
    doors = {r["door"]: r for r in rows or [] if isinstance(r.get("door"), str)}
    bans = next((r["bans"] for r in rows or [] if isinstance(r.get("bans"), dict)), None)
    if not {"ssh", "ingress"} <= doors.keys() or bans is None:
        return unreadable(expected, "no record of the logins tried")
    faults = door_faults("SSH", doors["ssh"], sshprobe.REFUSED, BLOCKED)
    faults += door_faults("the ingress", doors["ingress"], 401, 429)
    if doors["ssh"].get("open session") is not True:
        faults.append("an open SSH session did not go on while logins were blocked")
    if doors["ingress"].get("right password") != 200:
        faults.append(f"the right password got {doors['ingress'].get('right password')} meanwhile")
    for jail in ("ssh", "ingress"):
        before, after = (bans.get(k, {}).get(jail) for k in ("before", "after"))
        if not isinstance(after, int) or after <= (before if isinstance(before, int) else 0):
            faults.append(f"rave_bans_total of {jail} did not grow: {before}, {after}")
    seen = ", ".join(f"{d}: ended after {doors[d].get(ENDED)} s" for d in ("ssh", "ingress"))
    return judged(
        expected,
        seen,
        faults,
        "mend PerSourcePenalties of sshd, or nginx-refusals.conf of the ingress, then: ravectl "
        "build, ravectl up; a block of your own ends within a minute",
    )


def door_faults(name: str, row: Mapping[str, Any], refused: object, blocked: object) -> list[str]:
    """What is wrong with how a door answered failed logins, and the one after them."""
    outcomes, ended = row.get("outcomes"), row.get(ENDED)
    if not isinstance(outcomes, Sequence) or len(outcomes) != LOGIN_FAILURES + 1:
        return [f"{name}: {outcomes} is no record of {LOGIN_FAILURES + 1} attempts"]
    faults = []
    if outcomes[-1] != blocked:
        faults.append(f"{name}: attempt {len(outcomes)} got {outcomes[-1]}, not {blocked}")
    if any(o not in (refused, blocked) for o in outcomes[:-1]):
        faults.append(f"{name}: failed logins got {outcomes[:-1]}")
    if not isinstance(ended, int | float) or ended > PATIENCE_SECONDS:
        faults.append(f"{name}: the block did not end within {BLOCK_SECONDS} s")
    return faults


CHECKS = (
    Check(
        "X3", Suite.SECURITY, "three failed logins block the next, for a while",
        PROBE, judge_attempts, disruptive=True,
    ),
)  # fmt: skip
