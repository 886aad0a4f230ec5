"""Alert and recording rules, by promtool's own unit tests.

Each alert fires when it should, with the text that a person reads, and is silent otherwise.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ravectl import images
from tests import nixos, rules_table

ROOT = Path(__file__).resolve().parents[2]
PLANS = {p.profile: p for p in nixos.shipped()}
FILES = ("alerts.yml", "slo.yml")

Firing = tuple[dict[str, str], str]  # labels beside alertname and severity; summary


@dataclass(frozen=True)
class Case:
    """What is measured, and what is to be told of it at a time."""

    alert: str
    series: dict[str, str]
    at: str
    firing: tuple[Firing, ...] = ()
    interval: str = "5s"  # between two values and between two evaluations


UNIT = 'rave_unit_running{service="kanban"}'
SEEN = (
    'node_textfile_mtime_seconds{job="units", file="/run/rave-units/rave-units.prom", '
    'service="node-exporter"}'
)
MEMORY = "node_memory_MemTotal_bytes"
FREE = "node_memory_MemAvailable_bytes"
DISK = 'node_filesystem_size_bytes{mountpoint="/"}'
LEFT = 'node_filesystem_avail_bytes{mountpoint="/"}'
AGENTS_DISK = 'node_filesystem_size_bytes{mountpoint="/home/agent"}'
AGENTS_LEFT = 'node_filesystem_avail_bytes{mountpoint="/home/agent"}'
OK = 'rave_http_requests_total{route="kanban-host", status="200"}'
BAD = 'rave_http_requests_total{route="kanban-host", status="502"}'
REFUSED = 'rave_http_requests_total{route="router", status="401"}'
BUCKET = 'rave_http_request_duration_seconds_bucket{{route="router", le="{}"}}'
COUNT = 'rave_http_request_duration_seconds_count{route="router"}'
HOOK = 'rave_dispatcher_http_requests_total{{route="/webhooks/{{source}}", status="{}"}}'
ATTEMPT = 'rave_dispatcher_task_attempts_total{{agent_type="ai-engineer", outcome="{}"}}'
PROBE = 'probe_success{service="router"}'
DAYS = 86400


def times(slow: int) -> dict[str, str]:
    """100 requests a minute to the router, of which `slow` take between 0.2 and 0.3 s."""
    every, fast = "0+100x20", f"0+{100 - slow}x20"
    return {
        **{BUCKET.format(le): fast for le in ("0.1", "0.15", "0.2")},
        **{BUCKET.format(le): every for le in ("0.3", "+Inf")},
        COUNT: every,
    }


STOPPED = {"service": "kanban", "cause": "stopped"}
CASES = [
    Case("ServiceDown", {UNIT: "1x6 0x10"}, "40s", ((STOPPED, "kanban does not run"),)),
    # five seconds after it was seen to have stopped
    Case("ServiceDown", {UNIT: "1x6 0x10"}, "35s"),
    Case("ServiceDown", {UNIT: "1x6 0 1x10"}, "45s"),
    Case(
        "ServiceDown", {'up{job="postgresql", instance="i", service="postgres-exporter"}': "1 0x9"},
        "25s",
        (
            (
                {"service": "postgres-exporter", "cause": "silent", "job": "postgresql",
                 "instance": "i"},
                "postgres-exporter does not answer (postgresql, i)",
            ),
        ),
    ),
    Case("ServiceDown", {'up{job="postgresql", instance="i", service="p"}': "1 0x9"}, "20s"),
    Case(
        "ServiceDown", {'probe_success{job="probes", instance="u", service="router"}': "1 0x9"},
        "25s",
        (
            (
                {"service": "router", "cause": "silent", "job": "probes", "instance": "u"},
                "router does not answer (probes, u)",
            ),
        ),
    ),
    # who asks the others hangs: nothing is known of them
    Case(
        "ServiceDown",
        {'up{job="probes", instance="u", service="router"}': "1 0x9",
         'up{job="probes", instance="v", service="kanban"}': "1 0x9"},
        "25s",
        (
            ({"service": "blackbox-exporter", "cause": "silent", "job": "probes"},
             "blackbox-exporter does not answer (probes)"),
        ),
    ),
    Case("ServiceDown", {'up{job="probes", instance="u", service="router"}': "1 0x9",
                         'up{job="probes", instance="v", service="kanban"}': "1x9"}, "25s"),
    Case(
        "ServiceDown", {'up{job="units", service="node-exporter"}': "1 0x9"}, "15s",
        (
            ({"service": "node-exporter", "cause": "unseen", "job": "units"},
             "nothing is known of the machine and its units"),
        ),
    ),
    # who writes the states of units has ended: they look as they last were
    Case(
        "ServiceDown", {SEEN: "0x20", UNIT: "1x20"}, "30s",
        (
            ({"service": "node-exporter", "cause": "unseen", "job": "units",
              "file": "/run/rave-units/rave-units.prom"},
             "nothing is known of the machine and its units"),
        ),
    ),
    Case("ServiceDown", {SEEN: "0+5x20", UNIT: "1x20"}, "90s"),
    Case(
        "OomKill", {"node_vmstat_oom_kill": "0x3 1x9"}, "30s",
        (({}, "a process was killed for want of memory"),),
    ),
    Case("OomKill", {"node_vmstat_oom_kill": "7x9"}, "30s"),
    Case(
        "ServiceFlapping", {'rave_unit_starts_total{service="router"}': "1 3 4 6x9"}, "1m",
        (({"service": "router"}, "router is restarted again and again"),),
    ),
    Case("ServiceFlapping", {'rave_unit_starts_total{service="router"}': "1x3 2x9"}, "1m"),
    Case(
        "MemoryPressure", {MEMORY: "1000x30", FREE: "140x30"}, "3m",
        (({}, "86% of the memory is used"),), "15s",
    ),
    Case("MemoryPressure", {MEMORY: "1000x30", FREE: "160x30"}, "3m", (), "15s"),
    Case("MemoryPressure", {MEMORY: "1000x30", FREE: "140x30"}, "1m", (), "15s"),
    Case(
        "ServiceMemory",
        {'rave_unit_memory_bytes{service="mtail"}': "86x60",
         'rave_unit_memory_limit_bytes{service="mtail"}': "100x60"},
        "12m", (({"service": "mtail"}, "mtail uses 86% of the memory that it may"),), "15s",
    ),
    Case(
        "ServiceMemory",
        {'rave_unit_memory_bytes{service="mtail"}': "86x60",
         'rave_unit_memory_limit_bytes{service="mtail"}': "0x60"},
        "12m", (), "15s",
    ),
    Case(
        "CpuSaturated", {'node_cpu_seconds_total{cpu="0", mode="idle"}': "0+1.5x60"}, "12m",
        (({}, "the processors are busy for 90% of the time"),), "15s",
    ),
    Case(
        "CpuSaturated", {'node_cpu_seconds_total{cpu="0", mode="idle"}': "0+4x60"}, "12m", (),
        "15s",
    ),
    Case(
        "DiskFilling", {DISK: "1000x30", LEFT: "190x30"}, "3m",
        (({"mountpoint": "/"}, "81% of the disk at / is used"),), "15s",
    ),
    Case(
        "DiskFilling", {AGENTS_DISK: "100x30", AGENTS_LEFT: "0x30"},
        "3m", (({"mountpoint": "/home/agent"}, "100% of the disk at /home/agent is used"),), "15s",
    ),
    Case(
        "AgentForkBomb", {"rave_agents_denied_processes_total": "0x4 150x12"}, "3m",
        (({}, "an agent task went on starting processes beyond what it may have"),), "15s",
    ),
    Case(
        "AgentForkBomb", {"rave_agents_denied_processes_total": "0x4 30x12"}, "3m", (), "15s",
    ),
    Case("DiskFilling", {DISK: "1000x30", LEFT: "210x30"}, "3m", (), "15s"),
    *(
        Case(
            "MonitoringBroken", {f'{metric}{{x="y"}}': "0x3 1x9"}, "2m",
            (({}, "rules, alerts or what is kept long do not get where they belong"),), "15s",
        )
        for metric in (
            "prometheus_rule_evaluation_failures_total", "prometheus_notifications_dropped_total",
            "prometheus_remote_storage_samples_failed_total",
            "alertmanager_notifications_failed_total",
        )
    ),
    Case("MonitoringBroken", {"prometheus_rule_evaluation_failures_total": "1x9"}, "2m", (), "15s"),
    Case(
        "HttpErrors", {OK: "0+96x20", BAD: "0+4x20"}, "12m",
        (({"route": "kanban-host"}, "4% of the requests to kanban-host fail"),), "1m",
    ),
    Case("HttpErrors", {OK: "0+1000x20", BAD: "0+9x20"}, "12m", (), "1m"),
    Case(
        "HttpSlow", times(slow=3), "12m",
        (({"route": "router"},
          "one of a hundred requests to router takes 266.7ms or longer"),), "1m",
    ),
    Case("HttpSlow", times(slow=0), "12m", (), "1m"),
    # nobody asks it any more
    Case("HttpSlow", dict.fromkeys(times(slow=3), "7x20"), "12m", (), "1m"),
    Case(
        "AuthFailures", {REFUSED: "0+3x20"}, "6m",
        (({}, "15 requests of 5 minutes showed no valid credentials"),), "1m",
    ),
    Case(
        "AuthFailures", {'rave_dispatcher_auth_failures_total{kind="api-token"}': "0+3x20"}, "6m",
        (({}, "15 requests of 5 minutes showed no valid credentials"),), "1m",
    ),
    Case("AuthFailures", {REFUSED: "0+1x20"}, "6m", (), "1m"),
    Case(
        "BruteForce", {'rave_bans_total{jail="sshd"}': "0x3 1x9"}, "4m",
        (({"jail": "sshd"}, "an address was banned (sshd)"),), "1m",
    ),
    Case("BruteForce", {'rave_bans_total{jail="sshd"}': "3x9"}, "4m", (), "1m"),
    Case(
        "WebhookErrors", {HOOK.format("401"): "0+3x20", HOOK.format("202"): "0+90x20"}, "6m",
        (({"service": "dispatcher"}, "15 webhooks of 5 minutes were refused or failed"),), "1m",
    ),
    Case("WebhookErrors", {HOOK.format("202"): "0+90x20"}, "6m", (), "1m"),
    Case(
        "RuleFailures", {"rave_dispatcher_rules_failed_total": "0x3 2x20"}, "10m",
        (({"service": "dispatcher"},
          "the rules failed on 2 events of 15 minutes, which became no tasks"),), "1m",
    ),
    # told once, not for as long as the dispatcher runs
    Case("RuleFailures", {"rave_dispatcher_rules_failed_total": "0x3 2x30"}, "25m", (), "1m"),
    Case("RuleFailures", {"rave_dispatcher_rules_failed_total": "2x20"}, "10m", (), "1m"),
    Case(
        "QueueStuck", {'rave_dispatcher_queue_oldest_seconds{state="pending"}': "0+60x20"}, "8m",
        (({"service": "dispatcher"}, "a task or event has waited for 8m 0s"),), "1m",
    ),
    Case("QueueStuck", {'rave_dispatcher_queue_oldest_seconds{state="pending"}': "299x20"}, "8m",
         (), "1m"),
    Case(
        "TaskFailures", {ATTEMPT.format("error"): "0+1x60", ATTEMPT.format("succeeded"): "0+3x60"},
        "59m",
        (({"service": "dispatcher"}, "25% of the last hour's attempts at tasks failed"),), "1m",
    ),
    Case("TaskFailures", {ATTEMPT.format("cancelled"): "0+9x60",
                          ATTEMPT.format("succeeded"): "0+3x60"}, "59m", (), "1m"),
    Case("TaskFailures", {ATTEMPT.format("error"): "0 1x60"}, "30m", (), "1m"),
    Case(
        "TraceCoverageLow", {"rave_dispatcher_trace_coverage_ratio": "0.9x20"}, "8m",
        (({"service": "dispatcher"}, "only 90% of the last hour's tasks have a complete trace"),),
        "1m",
    ),
    Case("TraceCoverageLow", {"rave_dispatcher_trace_coverage_ratio": "0.95x20"}, "8m", (), "1m"),
    *(
        Case(
            "DatabaseCorrupt", {metric: "0 1x9"}, "2m",
            (({}, f"damaged data was found ({metric})"),), "1m",
        )
        for metric in ("rave_dispatcher_store_corrupt", "rave_postgres_checksum_failures")
    ),
    Case("DatabaseCorrupt", {"rave_dispatcher_store_corrupt": "0x9",
                             "rave_postgres_checksum_failures": "0x9"}, "2m", (), "1m"),
    Case(
        "BackupStale", {"rave_backup_last_success_timestamp_seconds": "0x30"}, "16m",
        (({}, "the newest backup is 16m 0s old"),), "1m",
    ),
    Case("BackupStale", {"rave_backup_last_success_timestamp_seconds": "0x30"}, "15m", (), "1m"),
    Case(
        "BackupBroken", {"rave_backup_check_ok": "1 0x9"}, "2m",
        (({}, "the backup's repository does not check"),), "1m",
    ),
    Case("BackupBroken", {"rave_backup_check_ok": "1x9"}, "2m", (), "1m"),
    Case(
        "CertificateExpiring",
        {'probe_ssl_earliest_cert_expiry{instance="u"}': f"{13 * DAYS + 60}x9"},
        "1m", (({"instance": "u"}, "the certificate of u ends in 13d 0h 0m 0s"),), "1m",
    ),
    Case("CertificateExpiring",
         {'probe_ssl_earliest_cert_expiry{instance="u"}': f"{15 * DAYS}x9"}, "1m", (), "1m"),
    Case(
        "SecretsStale", {'rave_secret_changed_timestamp_seconds{secret="ccr/api-key"}':
                         f"-{91 * DAYS - 60}x9"},
        "1m", (({"secret": "ccr/api-key"}, "secret ccr/api-key is 91d 0h 0m 0s old"),), "1m",
    ),
    Case("SecretsStale", {'rave_secret_changed_timestamp_seconds{secret="s"}': f"-{89 * DAYS}x9"},
         "1m", (), "1m"),
    # all answers of the last hour were errors
    Case(
        "AvailabilityBurnFast", {OK: "0x60", BAD: "0+60x60"}, "59m",
        (({"slo": "requests"},
          "requests: the error budget of 99.9% is being spent fast (100% fail)"),), "1m",
    ),
    # one service did not answer for 15 minutes; four are asked
    Case(
        "AvailabilityBurnFast", {PROBE: "0x60 1x400"}, "15m",
        (({"slo": "probes"},
          "probes: the error budget of 99.9% is being spent fast (4.167% fail)"),), "15s",
    ),
    # a machine that just started, whose first probes failed
    Case("AvailabilityBurnFast", {PROBE: "0x2 1x60"}, "5m", (), "10s"),
    Case("AvailabilityBurnFast", {OK: "0+1000x60", BAD: "0+1x60"}, "59m", (), "1m"),
    Case(
        "AvailabilityBurnSlow", {OK: "0+996x800", BAD: "0+4x800"}, "48h",
        (({"slo": "requests"},
          "requests: the error budget of 99.9% is being spent faster than it comes (0.4% fail)"),),
        "4m",
    ),
    Case("AvailabilityBurnSlow", {OK: "0+9995x800", BAD: "0+5x800"}, "48h", (), "4m"),
]  # fmt: skip


@pytest.fixture(scope="session", params=PLANS)
def rules(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rules")
    tree = images.render_debian(PLANS[request.param])
    for name in FILES:
        (folder / name).write_text(tree.file(f"etc/prometheus/{name}").content)
    return folder


def severities(folder: Path) -> dict[str, str]:
    document = yaml.safe_load((folder / "alerts.yml").read_text())
    rows = [r for g in document["groups"] for r in g["rules"]]
    return {r["alert"]: r["labels"]["severity"] for r in rows}


def test_case(case: Case, severity: str) -> dict[str, Any]:
    expected = [
        {
            "exp_labels": {"severity": severity, **labels},
            "exp_annotations": {
                "summary": summary, "runbook_url": f"docs/runbooks/{case.alert}.md",
            },
        }
        for labels, summary in case.firing
    ]  # fmt: skip
    return {
        "interval": case.interval,
        "input_series": [{"series": k, "values": v} for k, v in case.series.items()],
        "alert_rule_test": [
            {"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}
        ],
    }


test_case.__test__ = False  # type: ignore[attr-defined]


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("interval", sorted({c.interval for c in CASES}))
def test_alerts_fire_when_they_should_and_only_then(rules: Path, interval: str) -> None:
    known = severities(rules)
    document = {
        "rule_files": list(FILES),
        "evaluation_interval": interval,
        "group_eval_order": ["rave-http", "rave-slo", "rave-slo-days", "rave-saturation"],
        "tests": [test_case(c, known[c.alert]) for c in CASES if c.interval == interval],
    }
    path = rules / f"test-{interval}.yml"
    path.write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_a_case_that_fires_and_one_that_does_not(rules: Path) -> None:
    assert {c.alert for c in CASES if c.firing} == set(severities(rules))
    assert {c.alert for c in CASES if not c.firing} == set(severities(rules))


def test_each_alert_has_a_runbook_and_each_runbook_an_alert(rules: Path) -> None:
    document = yaml.safe_load((rules / "alerts.yml").read_text())
    alerts = [r for g in document["groups"] for r in g["rules"]]
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks/{rule['alert']}.md"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
    pages = {p.stem: p.read_text() for p in (ROOT / "docs/runbooks").glob("*.md")}
    assert set(pages) == {r["alert"] for r in alerts}
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n")
        for part in ("## Look", "## Mend"):
            assert part in text, name
        # the operator's account sees none of the system's journal; journalctl does not say so
        assert "exec -- journalctl" not in text, name


def test_the_plan_names_the_alerts(rules: Path) -> None:
    assert {p.alerts for p in PLANS.values()} == {tuple(severities(rules))}


def test_prometheus_accepts_the_rules(rules: Path) -> None:
    done = promtool("check", "rules", *(rules / n for n in FILES))
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_recorded_is_kept_long_and_has_one_name(rules: Path) -> None:
    document = yaml.safe_load((rules / "slo.yml").read_text())
    names = [r["record"] for g in document["groups"] for r in g["rules"]]
    assert all(re.fullmatch(r"rave:[a-z_]+:[a-z0-9_]+", n) for n in names)


RECORDED = [
    ("rave:http_requests:rate_5m", {OK: "0+60x10"}, '{route="kanban-host"}', 1),
    ("rave:http_errors:ratio_5m", {OK: "0+60x10"}, '{route="kanban-host"}', 0),
    ("rave:http_errors:ratio_5m", {OK: "0+30x10", BAD: "0+30x10"}, '{route="kanban-host"}', 0.5),
    ("rave:http_request_duration_seconds:p50_5m", times(slow=0), '{route="router"}', 0.05),
    ("rave:http_request_duration_seconds:p99_5m", times(slow=2), '{route="router"}', 0.25),
    ("rave:memory:used_ratio", {MEMORY: "100x10", FREE: "75x10"}, "{}", 0.25),
    ("rave:disk:used_ratio", {DISK: "100x10", LEFT: "75x10"}, '{mountpoint="/"}', 0.25),
    ("rave:cpu:used_ratio", {'node_cpu_seconds_total{mode="idle"}': "0+45x10"}, "{}", 0.25),
    ("rave:service:up", {UNIT: "1x10"}, '{service="kanban"}', 1),
    ("rave:events:rate_5m", {'rave_dispatcher_events_received_total{source="github"}': "0+60x10"},
     "{}", 1),
    ("rave:queue:depth", {'rave_dispatcher_queue_depth{state="pending"}': "3x10"},
     '{state="pending"}', 3),
]  # fmt: skip


@pytest.mark.parametrize(("record", "series", "labels", "value"), RECORDED)
def test_recorded_values(
    rules: Path, record: str, series: dict[str, str], labels: str, value: float
) -> None:
    document = {
        "rule_files": list(FILES),
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": record,
                        "eval_time": "8m",
                        "exp_samples": [
                            {"labels": record + labels.replace("{}", ""), "value": value}
                        ],
                    }
                ],
            }
        ],
    }
    path = rules / "recorded.yml"
    path.write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_of_the_docs_is_that_of_the_rules() -> None:
    page = rules_table.PAGE.read_text()
    assert page == rules_table.written(page), "run: python -m tests.rules_table"
    for alert in PLANS["safe"].alerts:
        assert f"[{alert}](runbooks/{alert}.md)" in page
