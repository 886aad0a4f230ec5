"""Checks of the suite `observability`: does Prometheus see what it should."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

from ravectl.model import ScrapeJob, Suite
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

PROMETHEUS_PORT = 9090

# A target that came up after its last scrape is down until the next one, so that is waited for.
TARGETS_SCRIPT = """\
while :; do
  answer=$(curl -sS --max-time 15 'http://127.0.0.1:%(port)d/api/v1/targets?state=active' 2>&1)
  [[ $answer != *'"health":"u'[pn]* || $answer == *'"health":"unknown"'* \\
    || $answer == *'"health":"down"'* ]] || break
  (( SECONDS < %(wait)d )) || break
  sleep 1
done
echo '== targets =='
printf '%%s\\n' "$answer"
"""


def targets_script(subject: Subject) -> str:
    """The script that asks Prometheus for its targets until all were scraped."""
    try:
        port = subject.plan.service("prometheus").ports[0]
    except (KeyError, IndexError):
        port = PROMETHEUS_PORT
    slowest = max((j.every_seconds for j in subject.plan.scrape_jobs), default=0)
    return TARGETS_SCRIPT % {"port": port, "wait": min(slowest + 2, 35)}


def _collect_targets(target: VerifyTarget, deadline: float) -> str:
    return guest.run_script(target, targets_script(target.subject), deadline)


def judge_targets(subject: Subject, output: str) -> Judgement:
    """Prometheus scrapes what the Plan says, no more and no less, and all of it is up."""
    jobs = subject.plan.scrape_jobs
    count = sum(j.targets for j in jobs)
    expected = f"the {count} scrape targets of the Plan are up: " + ", ".join(j.name for j in jobs)
    parts = guest.sections(output)
    if parts is None or not jobs:
        return unreadable(expected, "Prometheus's answer is incomplete")
    targets = _targets(parts.get("targets", ""))
    if targets is None:
        return unreadable(
            expected, f"not an answer of Prometheus: {parts.get('targets', '')[:200]}"
        )
    faults = []
    for job in jobs:
        mine = [t for t in targets if t.get("scrapePool") == job.name]
        if not mine:
            faults.append(f"{job.name} is not scraped")
        elif len(mine) != job.targets:
            faults.append(f"{job.name} has {len(mine)} targets, not {job.targets}")
        faults += [f"{job.name} {fault}" for t in mine for fault in _target_faults(job, t)]
    known = {j.name for j in jobs}
    unknown = sorted({str(t.get("scrapePool")) for t in targets} - known)
    faults += [f"{name} is scraped and not in the Plan" for name in unknown]
    remedy = "see whether the service answers: ravectl verify --suite service, ravectl logs"
    return judged(expected, f"{len(targets)} targets, all up", faults, remedy)


def _targets(text: str) -> list[dict[str, Any]] | None:
    try:
        answer = json.loads(text)
        targets = answer["data"]["activeTargets"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if answer.get("status") != "success" or not isinstance(targets, list):
        return None
    return targets if all(isinstance(t, dict) for t in targets) else None


def _target_faults(job: ScrapeJob, target: dict[str, Any]) -> list[str]:
    faults = []
    if target.get("health") != "up":
        why = target.get("lastError")
        faults.append(f"is {target.get('health')}" + (f": {why}" if why else ""))
    try:
        url = urllib.parse.urlsplit(str(target.get("scrapeUrl")))
        where = (url.hostname, url.port, url.path)
    except ValueError:
        where = (None, None, "")
    if where != ("127.0.0.1", job.port, job.path):
        faults.append(f"is scraped at {target.get('scrapeUrl')}, not at port {job.port}{job.path}")
    return faults


CHECKS = (
    Check(
        "O1", Suite.OBSERVABILITY, "every scrape target is up",
        Probe("targets", _collect_targets, 120.0), judge_targets,
    ),
)  # fmt: skip
