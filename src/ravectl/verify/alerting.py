"""Checks of what watches the machine: rules, what is kept how long, and that an alert arrives.

O3 stops a service of the machine and starts it again. Whatever happens to the check meanwhile, a
timer in the machine starts it, too.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from ravectl.errors import RavectlError
from ravectl.model import Suite
from ravectl.verify import guest, web
from ravectl.verify.framework import (
    Check,
    Judgement,
    Probe,
    Subject,
    VerifyTarget,
    judged,
    unreadable,
)
from ravectl.verify.http import API_TOKEN, records

STOPPED = "kanban"  # nothing depends on it
ALERT = "ServiceDown"
ARRIVES_SECONDS = 30.0  # docs/verify.md; the sum of what it takes is in alertmanager.yml
RESOLVES_SECONDS = 60.0
SAFETY_SECONDS = 150
SAFETY_TIMER = "rave-verify-start"  # one: what a check before left would end this one
BLOCK_SHARE = 0.1  # Prometheus deletes whole blocks, of up to a tenth of the retention
BLOCK_HOURS = 3.0  # of the youngest, which is not cut yet

_LOGS = "see what they say: ravectl logs prometheus, ravectl logs alertmanager"
_REBUILD = "the machine is not what the profile says now: ravectl build, then ravectl reset"


# --- O2, D5 ----------------------------------------------------------------------------------

RULES_SCRIPT = """\
ask() { echo "== $1 =="; curl -sS --max-time 30 "http://127.0.0.1:$2" 2>&1; echo; }
ask rules '%(prometheus)d/api/v1/rules'
ask flags '%(prometheus)d/api/v1/status/flags'
ask receivers '%(alertmanager)d/api/v2/receivers'
ask alertmanagers '%(prometheus)d/api/v1/alertmanagers'
ask longterm '%(victoriametrics)d/flags'
echo '== figures =='
curl -sS --max-time 30 'http://127.0.0.1:%(prometheus)d/metrics' 2>&1 | grep -E \\
  '^prometheus_(rule_evaluation_failures_total|tsdb_lowest_timestamp_seconds|target_scrapes_.*_total)'
echo '== events =='
grep 'retention_days' /etc/rave/dispatcher.yaml
echo '== now =='
printf '%%(%%s)T\\n'
"""

# As its first user, whose password is in no process's arguments. A line for each dashboard: uid,
# status, and of the answer (50 KB) whether Grafana has it from a file.
DASHBOARDS_SCRIPT = """\
echo '== dashboards =='
for uid in %(uids)s; do
  answer=$(curl -sS --max-time 30 -w '\\n%%{http_code}' \\
    --config <(printf 'user = "%(user)s:%%s"\\n' "$(</run/secrets/grafana/admin-password)") \\
    "http://127.0.0.1:%(port)d/api/dashboards/uid/$uid" 2>&1)
  provisioned=no
  [[ $answer =~ '"provisioned":'\\ ?true ]] && provisioned=yes
  printf '%%s %%s %%s\\n' "$uid" "${answer##*$'\\n'}" "$provisioned"
done
"""


def rules_script(subject: Subject) -> tuple[str, bool]:
    """The script that asks for rules, limits and dashboards; whether root is to run it."""
    plan = subject.plan
    names = ("prometheus", "alertmanager", "victoriametrics")
    script = RULES_SCRIPT % {n: plan.service(n).health.port for n in names}
    if not plan.dashboards:
        return script, False
    asked = {
        "uids": " ".join(plan.dashboards), "user": plan.operator,
        "port": plan.service("grafana").health.port,
    }  # fmt: skip
    return script + DASHBOARDS_SCRIPT % asked, True


def _collect_rules(target: VerifyTarget, deadline: float) -> str:
    script, root = rules_script(target.subject)
    return guest.run_script(target, script, deadline, root=root)


RULES = Probe("rules", _collect_rules, 120.0)


def _said(parts: Mapping[str, str]) -> str:
    """What came in place of an answer, such as curl's words of why there is none."""
    asked = ((name, parts.get(name, "")) for name in ("rules", "receivers", "alertmanagers"))
    bad = [f"{name}: {text.strip()[:120]}" for name, text in asked if _document(text) is None]
    return f" ({'; '.join(bad)})" if bad else ""


def _document(text: str | None) -> Any:
    try:
        return json.loads(text or "")
    except (ValueError, RecursionError):
        return None


def _data(text: str | None) -> Any:
    """What an answer of Prometheus holds, None when it is none."""
    answer = _document(text)
    good = isinstance(answer, dict) and answer.get("status") == "success"
    return answer.get("data") if good else None


def judge_rules(subject: Subject, output: str) -> Judgement:
    """Rules are loaded and work, alerts have where to go, limits are those of the Plan."""
    plan = subject.plan
    expected = f"the {len(plan.alerts)} alerts of the Plan, no rule that fails, and their receivers"
    if plan.dashboards:
        expected += f"; {len(plan.dashboards)} dashboards"
    parts = guest.sections(output) or {}
    data, flags = _data(parts.get("rules")), _data(parts.get("flags"))
    receivers = _document(parts.get("receivers"))
    try:
        rules = [r for g in data["groups"] for r in g["rules"]]
        found = {str(r["name"]) for r in rules if r["type"] == "alerting"}
        seen = {str(r["name"]) for r in receivers}
        active = _data(parts.get("alertmanagers"))["activeAlertmanagers"]
    except (KeyError, TypeError):
        cause = "no answer of Prometheus or Alertmanager about rules"
        return unreadable(expected, f"{cause}{_said(parts)}")
    if not rules or not isinstance(flags, dict):
        return unreadable(expected, "Prometheus says nothing of its rules and limits")
    faults = [f"alert {n} is not loaded" for n in plan.alerts if n not in found]
    faults += [f"alert {n} is not in the Plan" for n in sorted(found - set(plan.alerts))]
    faults += [
        f"rule {r['name']} fails: {r.get('lastError')}" for r in rules if r.get("health") == "err"
    ]
    wanted = {"dispatcher", *(r.kind.value for r in plan.alert_receivers)}
    faults += [f"receiver {n} is missing" for n in sorted(wanted - seen)]
    faults += [f"receiver {n} is not in the Plan" for n in sorted(seen - wanted)]
    if len(active) != 1:
        faults.append(f"Prometheus sends to {len(active)} Alertmanagers")
    if flags.get("query.max-concurrency") != "4":
        faults.append(f"{flags.get('query.max-concurrency')} queries at once, not 4")
    counters = _figures(parts.get("figures", ""))
    if counters is None:
        return unreadable(expected, "Prometheus says nothing of failures")
    faults += [
        f"{name} is {value:g}"
        for name, value in counters.items()
        if name.endswith("_total") and value
    ]
    if plan.dashboards:
        shown = _dashboards(parts.get("dashboards", ""))
        if shown is None:
            return unreadable(expected, "Grafana says nothing of its dashboards")
        faults += [f for uid in plan.dashboards if (f := _dashboard_fault(uid, shown.get(uid)))]
    records_count = len(rules) - sum(r["type"] == "alerting" for r in rules)
    text = f"{len(found)} alerts, {records_count} recorded series, none fails"
    if plan.dashboards:
        text += f", {len(plan.dashboards)} dashboards"
    return judged(expected, text, faults, _LOGS)


def _dashboards(text: str) -> dict[str, tuple[str, str]] | None:
    """What Grafana answered by uid: the status, and whether it is provisioned; None: nothing."""
    rows = [line.split() for line in text.splitlines()]
    found = {r[0]: (r[1], r[2]) for r in rows if len(r) == 3}
    return found if any(status.isdigit() and int(status) for status, _ in found.values()) else None


def _dashboard_fault(uid: str, answer: tuple[str, str] | None) -> str | None:
    match answer:
        case ("200", "yes"):
            return None
        case ("200", _):
            return f"dashboard {uid} is not the provisioned one"
        case ("401" | "403", _):
            return f"dashboard {uid}: Grafana refuses its first user"
        case ("404", _) | None:
            return f"dashboard {uid} is missing"
        case (status, _):
            return f"dashboard {uid}: Grafana answers {status}"
    return None


def _figures(text: str) -> dict[str, float] | None:
    """Metrics by name, summed over their labels; None when there are none."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if m := re.fullmatch(r"([a-z_]+)(?:{.*})? ([0-9.e+-]+)", line):
            found[m[1]] = found.get(m[1], 0.0) + float(m[2])
    return found if "prometheus_rule_evaluation_failures_total" in found else None


def judge_retention(subject: Subject, output: str) -> Judgement:
    """Each store keeps what the profile says, and nothing is older than that."""
    kept = subject.plan.retention
    expected = (
        f"metrics for {kept.metrics_days} days and at most {kept.metrics_mb} MB, critical ones for "
        f"{kept.critical_metrics_days} days, events for {kept.events_days} days"
    )
    parts = guest.sections(output) or {}
    flags, figures = _data(parts.get("flags")), _figures(parts.get("figures", ""))
    long = re.search(r'^-?retentionPeriod="?([^"\n]+)"?$', parts.get("longterm", ""), re.M)
    events = re.search(r"retention_days: (\d+)", parts.get("events", ""))
    now = guest.number(parts.get("now", "").strip())
    if not isinstance(flags, dict) or figures is None or long is None or events is None or not now:
        return unreadable(expected, "a store does not say what it keeps")
    rows = (
        ("metrics", flags.get("storage.tsdb.retention.time"), f"{kept.metrics_days}d"),
        ("size of metrics", _megabytes(flags.get("storage.tsdb.retention.size")), kept.metrics_mb),
        ("critical metrics", long[1], f"{kept.critical_metrics_days}d"),
        ("events", int(events[1]), kept.events_days),
    )
    faults = [f"{what}: {seen}, not {wanted}" for what, seen, wanted in rows if seen != wanted]
    oldest = figures.get("prometheus_tsdb_lowest_timestamp_seconds", 0.0)
    age = (now - oldest) / 86400 if oldest else 0.0
    most = kept.metrics_days * (1 + BLOCK_SHARE) + BLOCK_HOURS / 24
    if age > most:
        faults.append(f"the oldest metric is of {age:.1f} days ago")
    return judged(expected, "each as the profile says", faults, _REBUILD)


def _megabytes(text: object) -> float | None:
    """A size as Prometheus prints it (512MB, 2GB: of 1024)."""
    m = re.fullmatch(r"(\d+)(MB|GB|MiB|GiB)", str(text))
    return int(m[1]) * (1024 if m[2][0] == "G" else 1) if m else None


# --- O3 --------------------------------------------------------------------------------------

# by the guest's clock, which stamps events, too
STOP_SCRIPT = """\
systemctl stop %(timer)s.timer 2>/dev/null
systemd-run --quiet --collect --unit=%(timer)s --on-active=%(safety)d \\
  --timer-property=AccuracySec=1s systemctl start %(unit)s
echo '== stopped =='
printf '%%s\\n' "$EPOCHREALTIME"
systemctl stop %(unit)s
systemctl is-active %(unit)s
"""
START_SCRIPT = """\
echo '== started =='
systemctl start %(unit)s
printf '%%s\\n' "$EPOCHREALTIME"
systemctl stop %(timer)s.timer
"""


def _collect_alert(target: VerifyTarget, deadline: float) -> str:
    unit = target.subject.units()[STOPPED]
    words = {"unit": unit, "safety": SAFETY_SECONDS, "timer": SAFETY_TIMER}
    row: dict[str, object] = {"service": STOPPED}
    stopped = guest.run_script(target, STOP_SCRIPT % words, deadline, root=True)
    row["stopped"] = since = _moment(stopped, "stopped")
    try:
        until = min(deadline, time.monotonic() + ARRIVES_SECONDS + 10)
        row["fired"] = _event(target, "firing", since, until)
    finally:
        started = guest.run_script(target, START_SCRIPT % words, deadline + 15, root=True)
    row["started"] = _moment(started, "started")
    if row["fired"] is not None:
        until = min(deadline, time.monotonic() + RESOLVES_SECONDS + 10)
        row["resolved"] = _event(target, "resolved", since, until)
    return json.dumps(row) + "\n"


def _moment(output: str, section: str) -> float:
    lines = (guest.sections(output) or {}).get(section, "").splitlines()
    found = [float(x) for x in lines if re.fullmatch(r"\d+\.\d+", x)]
    if not found:
        raise RavectlError("the machine did not say when it stopped the service", _LOGS)
    return found[0]


def _event(
    target: VerifyTarget, status: str, since: float, until: float
) -> float | None:  # fmt: skip
    """When the dispatcher stored such a notification; None when none came."""
    token = {"Authorization": f"Bearer {target.delivery[API_TOKEN].strip()}"}
    path = f"/api/v1/events?source=alertmanager&event_type=alert.{status}&limit=20"
    context = web.trusting(target.ca_cert)
    port = target.endpoint.https_port
    while True:
        with web.Client(port, web.DEFAULT_HOST, context, until + 5) as client:
            found = arrived(client.get(path, token).body, since)
        if found is not None or time.monotonic() > until:
            return found
        time.sleep(0.5)


def arrived(body: bytes, since: float) -> float | None:
    """When an event came that tells of the stopped service, after `since`; epoch seconds."""
    page = _document(body.decode(errors="replace"))
    items = page.get("items") if isinstance(page, dict) else None
    moments = []
    for event in items if isinstance(items, list) else []:
        try:
            labels = [a["labels"] for a in event["payload"]["alerts"]]
            at = datetime.datetime.fromisoformat(event["timestamp"]).timestamp()
        except (KeyError, TypeError, ValueError):
            continue
        if at >= since and any(_tells(one) for one in labels):
            moments.append(at)
    return min(moments, default=None)


def _tells(labels: Mapping[str, Any]) -> bool:
    return labels.get("alertname") == ALERT and labels.get("service") == STOPPED


def judge_alert(subject: Subject, output: str) -> Judgement:
    """The alert of a stopped service arrives in time, and its end, too."""
    expected = (
        f"{ALERT} of a stopped service at the dispatcher in < {ARRIVES_SECONDS:.0f} s, and its end"
    )
    rows = records(output)
    if not rows or not all(_is_moment(rows[0].get(k)) for k in ("stopped", "started")):
        return unreadable(expected, "no record of the service's stop")
    row = rows[0]
    took: Callable[[str, str], float] = lambda a, b: float(row[b]) - float(row[a])  # noqa: E731
    faults, seen = [], ""
    if not _is_moment(row.get("fired")):
        faults.append(f"no alert came while {row.get('service')} was stopped")
    else:
        delay = took("stopped", "fired")
        seen = f"{row.get('service')}: told after {delay:.1f} s"
        if delay >= ARRIVES_SECONDS:
            faults.append(f"the alert came after {delay:.1f} s")
        if not _is_moment(row.get("resolved")):
            faults.append("the alert's end did not come")
        else:
            end = took("started", "resolved")
            seen += f", its end {end:.1f} s after the start"
            if end >= RESOLVES_SECONDS:
                faults.append(f"the alert's end came after {end:.1f} s")
    return judged(expected, seen, faults, _LOGS)


def _is_moment(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


DATA_CHECKS = (
    Check("D5", Suite.DATA, "retention is the profile's", RULES, judge_retention),
)  # fmt: skip
OBSERVABILITY_CHECKS = (
    Check("O2", Suite.OBSERVABILITY, "rules, limits and receivers are the Plan's", RULES,
          judge_rules),
    Check(
        "O3", Suite.OBSERVABILITY, "a stopped service is told of within 30 s",
        Probe("alert", _collect_alert, 140.0, alone=True), judge_alert, disruptive=True,
    ),
)  # fmt: skip
