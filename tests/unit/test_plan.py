"""The Plan says everything, agrees with itself, and is the same for the same profile."""

from __future__ import annotations

import itertools

import pytest

from ravectl import building, model, profile
from ravectl.model import (
    CONSOLE_SOCKET,
    INGRESS_PORT,
    RESERVED_MB,
    SERVICE_NAMES,
    SSH_PORT,
    TEMPO_OTLP,
    Access,
    AptSource,
    EngineName,
    Plan,
)
from ravectl.plan import DASHBOARDS, SERVICES, make_plan


def plan_of(name: str) -> Plan:
    return make_plan(**profile.load(name, None).plan_arguments())


@pytest.fixture(params=profile.shipped())
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_of(request.param)


def test_profiles_and_plan_speak_of_the_same_services() -> None:
    assert tuple(row.name for row in SERVICES) == SERVICE_NAMES


def test_same_profile_same_plan(plan: Plan) -> None:
    assert plan_of(plan.profile) == plan


def test_plan_survives_json(plan: Plan) -> None:
    assert model.from_json(Plan, model.to_json(plan)) == plan


def test_plan_carries_every_number_of_its_profile(plan: Plan) -> None:
    p = profile.load(plan.profile, None)
    assert model.to_json(plan.machine) == p.machine.model_dump()
    for name, limits in p.services.items():
        given = model.to_json(plan.service(name).limits)
        assert given.pop("cpu_weight") >= 20  # the Plan's own, in no profile
        assert given == limits.model_dump()
    # memory runs out for the database last
    assert min(plan.services, key=lambda s: s.limits.oom_score_adjust).name == "postgresql"
    kept = p.retention
    assert plan.retention == model.Retention(
        metrics_days=kept.metrics,
        metrics_mb=kept.metrics_size,
        critical_metrics_days=kept.critical_metrics,
        events_days=kept.events,
        backups_days=kept.backups,
        backup_every_minutes=kept.backup_every,
    )
    assert plan.network.egress == p.network.egress
    assert (plan.agent_concurrency, plan.scrape_seconds) == (
        p.agents.concurrency,
        p.scrape_seconds,
    )
    assert [model.to_json(r) for r in plan.router_providers] == [
        r.model_dump(mode="json") for r in p.router.providers
    ]
    assert plan.service_memory_mb == p.machine.memory_mb - RESERVED_MB


def test_profiles_differ_where_they_promise_to() -> None:
    safe, full = plan_of("safe"), plan_of("full-pipe")
    assert safe.hostname != full.hostname
    assert (safe.network.egress, full.network.egress) == (False, True)
    # the machine has the same parts, whatever its size
    full = full.on(EngineName.DEBIAN)
    assert safe.routes == full.routes
    assert safe.secrets == full.secrets
    assert [s.unit for s in safe.services] == [s.unit for s in full.services]


def test_what_an_engine_does_not_have_goes_with_all_that_belongs_to_it() -> None:
    full = plan_of("full-pipe")
    nix, debian = full.on(EngineName.NIX), full.on(EngineName.DEBIAN)
    assert nix.has("grafana")
    assert nix.has("tempo")
    assert (nix.otlp_endpoint, debian.otlp_endpoint) == (TEMPO_OTLP, None)
    assert {s.name for s in nix.services} - {s.name for s in debian.services} == {
        "grafana", "tempo",
    }  # fmt: skip
    assert {r.name for r in nix.routes} - {r.name for r in debian.routes} == {"grafana"}
    assert {j.name for j in nix.scrape_jobs} - {j.name for j in debian.scrape_jobs} == {
        "grafana", "tempo",
    }  # fmt: skip
    assert {s.name for s in nix.secrets} - {s.name for s in debian.secrets} == {
        "grafana/secret-key", "grafana/admin-password",
    }  # fmt: skip
    assert (nix.dashboards, debian.dashboards) == (DASHBOARDS, ())
    assert nix.on(EngineName.NIX) == nix
    assert plan_of("safe").on(EngineName.NIX) == plan_of("safe")


def test_with_a_package_source_debian_has_grafana_too() -> None:
    source = AptSource("https://apt.example.org/ stable main", "key")
    arguments = profile.load("full-pipe", None).plan_arguments()
    found = make_plan(**{**arguments, "grafana_source": source}).on(EngineName.DEBIAN)
    assert found.service("grafana").unit["debian"] == "grafana-server.service"
    assert found.dashboards == DASHBOARDS
    assert not found.has("tempo")


def test_only_ssh_and_the_ingress_are_open(plan: Plan) -> None:
    assert plan.network.open_ports == (SSH_PORT, INGRESS_PORT)
    assert set(plan.network.open_ports) < set(plan.listeners())


def test_no_two_services_share_a_port_or_a_unit(plan: Plan) -> None:
    for a, b in itertools.combinations(plan.services, 2):
        assert not set(a.ports) & set(b.ports), (a.name, b.name)
        for engine in EngineName:
            assert a.unit[engine] != b.unit[engine]


def test_each_service_is_asked_for_its_health_on_a_port_of_its_own(plan: Plan) -> None:
    for service in plan.services:
        assert service.health.port in service.ports, service.name


def test_routes_and_scrape_jobs_lead_to_a_service(plan: Plan) -> None:
    ports = plan.listeners()
    for route in plan.routes:
        assert route.upstream_port is None or route.upstream_port in ports, route.name
        assert (route.upstream_path is not None) == bool(
            route.upstream_port or route.upstream_socket
        )
    assert {job.port for job in plan.scrape_jobs} <= set(ports)
    # nothing that is scraped is reachable from outside
    assert not {job.port for job in plan.scrape_jobs} & set(plan.network.open_ports)


def test_the_console_is_for_who_signed_in_and_at_no_port(plan: Plan) -> None:
    console = [r for r in plan.routes if r.name.startswith("console")]
    assert {(r.upstream_socket, r.upstream_port, r.access) for r in console} == {
        (CONSOLE_SOCKET, None, Access.SIGNED_IN)
    }
    assert [r.name for r in plan.routes if r.upstream_socket] == [r.name for r in console]


def test_metrics_are_for_nobody_outside(plan: Plan) -> None:
    closed = {r.path for r in plan.routes if r.access is Access.NOBODY}
    assert {"/metrics", "/prometheus/"} <= closed
    unasked = {r.path for r in plan.routes if r.access is Access.ANYONE}
    assert unasked == {"/healthz"}


def test_secrets_are_known_readable_and_closed_to_others(plan: Plan) -> None:
    secrets = {s.name: s for s in plan.secrets}
    assert len(secrets) == len(plan.secrets)
    for service in plan.services:
        assert set(service.secrets) <= set(secrets), service.name
    public = {"ssh/authorized-keys", "ingress/tls-cert", "monitoring/secrets.prom"}
    for name, secret in secrets.items():
        assert int(secret.mode, 8) & 0o007 == (0o004 if name in public else 0), name


def test_accounts_are_distinct_and_only_the_operator_is_powerful(plan: Plan) -> None:
    assert len({a.uid for a in plan.accounts}) == len(plan.accounts)
    assert [a.name for a in plan.accounts if a.login or a.sudo] == [plan.operator]


def test_every_service_user_is_an_account_or_comes_with_a_package(plan: Plan) -> None:
    packaged = {"root", "www-data", "postgres", "prometheus", "_victoria-metrics", "mtail"}
    packaged |= {"grafana", "tempo"}
    ours = {a.name for a in plan.accounts}
    assert {s.user for s in plan.services} <= packaged | ours


def test_what_a_machine_will_lack_is_told_with_its_remedy() -> None:
    full = plan_of("full-pipe")
    assert building.absent(full, EngineName.NIX) == []
    assert building.absent(plan_of("safe"), EngineName.DEBIAN) == []
    grafana, tempo = building.absent(full, EngineName.DEBIAN)
    assert grafana.startswith("the engine debian has no Grafana, so this machine has none: ")
    assert "monitoring.grafana.apt_source" in grafana
    assert tempo.startswith("the engine debian has no Tempo, so this machine has none: ")
    assert "tracing.otlp_endpoint" in tempo
