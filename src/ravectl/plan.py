"""Profile -> Plan: everything that a profile implies, resolved. Pure.

Both engines render from the Plan and `verify` derives its expectations from it, so whatever a
machine must be is said here and nowhere else. The tables follow docs/contracts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ravectl.model import (
    CONSOLE_SOCKET,
    INGRESS_PORT,
    RESERVED_MB,
    SSH_PORT,
    Access,
    Account,
    Activation,
    Agent,
    AlertReceiver,
    AptSource,
    Containment,
    EngineName,
    Hardening,
    Health,
    HttpProbe,
    Limits,
    Logs,
    Machine,
    Network,
    Plan,
    Retention,
    Route,
    RouterProvider,
    ScrapeJob,
    Secret,
    SecretKind,
    SecretScope,
    Service,
    WebhookRule,
)

OPERATOR = "rave"  # Debian has a group called operator already


class _Limits(Protocol):
    @property
    def memory_mb(self) -> int: ...
    @property
    def cpu_percent(self) -> int: ...
    @property
    def oom_score_adjust(self) -> int: ...
    @property
    def tasks(self) -> int: ...


class _Provider(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def url(self) -> str: ...
    @property
    def models(self) -> tuple[str, ...]: ...


def make_plan(
    *,
    profile: str,
    machine: Machine,
    retention: Retention,
    logs: Logs,
    egress: bool,
    ssh_host_port: int | None,
    https_host_port: int | None,
    limits: Mapping[str, _Limits],
    providers: tuple[_Provider, ...],
    agent_concurrency: int,
    agents: tuple[Agent, ...],
    rules: tuple[WebhookRule, ...],
    otlp_endpoint: str | None,
    scrape_seconds: int,
    remote_write: tuple[str, ...] = (),
    alert_receivers: tuple[AlertReceiver, ...] = (),
    grafana_source: AptSource | None = None,
) -> Plan:
    """The Plan of a validated profile. The same arguments give the same Plan on every host.

    It has the services that `limits` names. `Plan.on` says what of it a machine of an engine has.
    """
    rows = tuple(row for row in (*SERVICES, *_optional(grafana_source)) if row.name in limits)
    readers = {n for row in rows for n in row.secrets}
    unread = {n for row in _optional(None) for n in row.secrets} - readers
    ports = {p for row in rows for p in row.ports}
    return Plan(
        profile=profile,
        machine=machine,
        hostname=f"rave-{profile}",
        operator=OPERATOR,
        accounts=ACCOUNTS,
        services=tuple(_service(row, limits[row.name]) for row in rows),
        routes=tuple(r for r in ROUTES if r.upstream_port is None or r.upstream_port in ports),
        scrape_jobs=tuple(j for j in scrape_jobs(scrape_seconds) if j.port in ports),
        scrape_seconds=scrape_seconds,
        remote_write=(LONG_TERM, *remote_write),
        alerts=ALERTS,
        alert_receivers=alert_receivers,
        dashboards=DASHBOARDS if "grafana" in limits else (),
        grafana_source=grafana_source if "grafana" in limits else None,
        secrets=tuple(s for s in SECRETS if s.name not in unread),
        retention=retention,
        logs=logs,
        network=Network(
            egress=egress,
            open_ports=(SSH_PORT, INGRESS_PORT),
            ssh_host_port=ssh_host_port,
            https_host_port=https_host_port,
        ),
        router_providers=tuple(
            RouterProvider(name=p.name, url=p.url, models=tuple(p.models)) for p in providers
        ),
        agent_concurrency=agent_concurrency,
        agents=agents,
        hardening=hardening(machine, agents, agent_concurrency),
        webhook_rules=rules,
        otlp_endpoint=otlp_endpoint,
        service_memory_mb=machine.memory_mb - RESERVED_MB,
    )


# uids above those that Debian and NixOS give to packages, below those of people
ACCOUNTS = (
    Account(name=OPERATOR, uid=1000, home=f"/home/{OPERATOR}", login=True, sudo=True),
    Account(name="agent", uid=1001, home="/home/agent", login=False, sudo=False),
    Account(name="vibe-kanban", uid=901, home="/var/lib/vibe-kanban", login=False, sudo=False),
    Account(
        name="rave-dispatcher", uid=903, home="/var/lib/rave-dispatcher", login=False, sudo=False
    ),
    Account(name="ccr", uid=902, home="/run/claude-code-router", login=False, sudo=False),
)


# What `systemd-analyze security` may say of a unit. Ours need nothing of the system. Others do
# what their distribution lets them, less what our drop-ins take.
OUR_EXPOSURE = 2.0
OTHERS_EXPOSURE = 4.0
# All that a session may do its daemon must be allowed to do: what sshd is denied, root is by sudo
LOGIN_EXPOSURE = 9.0

# Shares of the processors (CPUWeight=) when several want them
MUST_GET_THROUGH = 3000  # whoever comes in by SSH while the machine drowns in work
SOMEBODY_WAITS = 1000
USUAL = 100
NOBODY_WAITS = 20  # who measures waits for those who answer

# What the kernel denies: settings of the Linux Kernel Self-Protection Project and of CIS that a
# machine without a keyboard, a router's work or a kernel developer does not miss.
SYSCTLS = {
    # nobody learns of addresses in the kernel, nor reads its messages
    "kernel.kptr_restrict": "2",
    "kernel.dmesg_restrict": "1",
    "kernel.perf_event_paranoid": "3",
    # a program looks into its own children only
    "kernel.yama.ptrace_scope": "1",
    "kernel.unprivileged_bpf_disabled": "1",
    "net.core.bpf_jit_harden": "2",
    "kernel.kexec_load_disabled": "1",
    "kernel.sysrq": "0",
    "kernel.randomize_va_space": "2",
    "dev.tty.ldisc_autoload": "0",
    "vm.unprivileged_userfaultfd": "0",
    "vm.mmap_min_addr": "65536",
    # files and pipes that others left in common folders are not followed, linked or opened
    "fs.protected_hardlinks": "1",
    "fs.protected_symlinks": "1",
    "fs.protected_fifos": "2",
    "fs.protected_regular": "2",
    # memory is written to no disk: no dumps, and nothing is swapped before it must be
    "fs.suid_dumpable": "0",
    # a way around filters of system calls, with a history; nothing here uses it
    "kernel.io_uring_disabled": "2",
    "kernel.core_pattern": "|/bin/false",
    "kernel.core_uses_pid": "1",
    "vm.swappiness": "1",
    # one address, one gateway: what says otherwise is wrong or an attack
    **{
        f"net.ipv4.conf.{where}.{key}": value
        for where in ("all", "default")
        for key, value in (
            ("accept_redirects", "0"), ("secure_redirects", "0"), ("send_redirects", "0"),
            ("accept_source_route", "0"), ("forwarding", "0"), ("log_martians", "1"),
            ("rp_filter", "1"),
        )
    },
    **{
        f"net.ipv6.conf.{where}.{key}": "0"
        for where in ("all", "default")
        for key in ("accept_redirects", "accept_source_route", "accept_ra")
    },
    "net.ipv4.icmp_echo_ignore_broadcasts": "1",
    "net.ipv4.icmp_ignore_bogus_error_responses": "1",
    "net.ipv4.tcp_syncookies": "1",
    "net.ipv4.tcp_rfc1337": "1",
    # nginx tells mtail of each request by a datagram, and does not wait when none is taken: the
    # default of 10 is a hundredth of a second of a busy ingress. What a sender may have under way
    # bounds it, too: the default of 208 KB is some 270 of them. Of 4,000 in 20 s a third was lost
    # (emulated, 512 in the queue).
    "net.unix.max_dgram_qlen": "4096",
    "net.core.wmem_default": "2097152",
}  # fmt: skip
# a switch of Debian's kernel: namespaces for users are the way to most of the kernel's own defects
ENGINE_SYSCTLS = {EngineName.DEBIAN.value: {"kernel.unprivileged_userns_clone": "0"}}

# Protocols, file systems and buses that nothing here uses, each with a history of defects
BLOCKED_MODULES = (
    "dccp", "sctp", "rds", "tipc", "ax25", "netrom", "rose", "x25", "can", "atm", "appletalk",
    "cramfs", "freevxfs", "jffs2", "hfs", "hfsplus", "udf", "squashfs", "nfs", "cifs", "ksmbd",
    "usb-storage", "firewire-core", "firewire-ohci", "thunderbolt", "bluetooth", "vivid",
    "floppy", "pcspkr", "algif_aead", "n_hdlc",
)  # fmt: skip

_NO_RIGHTS = ("nosuid", "nodev")
MOUNTS = {
    # programs of tasks are built and run there, so it is not noexec
    "/home/agent": _NO_RIGHTS,
    **dict.fromkeys(("/tmp", "/var/tmp", "/dev/shm", "/run/secrets.d"), (*_NO_RIGHTS, "noexec")),  # noqa: S108
    "/run": _NO_RIGHTS,
    "/proc": (*_NO_RIGHTS, "noexec"),
    "/sys": (*_NO_RIGHTS, "noexec"),
}

# The one way to another's rights. Nobody has a password to change or to be asked for, nobody
# mounts by himself, and systemd, not a helper of D-Bus, starts services.
SETUID = {
    EngineName.DEBIAN.value: ("/usr/bin/sudo",),
    # the second is D-Bus' own, which NixOS makes or not by its implementation of D-Bus
    EngineName.NIX.value: (
        "/run/wrappers/bin/sudo", "/run/wrappers/bin/dbus-daemon-launch-helper",
    ),
}  # fmt: skip

# What the kernel notes in the journal: who opens a secret by hand, who uses sudo and who changes
# its rules. Nothing that a service or an agent does is noted: nobody signed in, and it could fill
# the journal, or make so many notes that those of others are lost.
_OPEN = "-a always,exit -F arch=b64 -S open,openat,openat2"


def _audit(engine: EngineName, *sudoers: str) -> tuple[str, ...]:
    secrets, sudo = "-F key=rave-secrets", "-F key=rave-sudo"
    return (
        # what PAM, sudo and systemd tell is in the journal by themselves
        "-a always,exclude -F msgtype>=USER_AUTH -F msgtype<=1199",
        # once more what the other lines of a note say; and each unit's firewall of systemd
        "-a always,exclude -F msgtype=PROCTITLE",
        "-a always,exclude -F msgtype=BPF",
        f"{_OPEN} -F dir=/run/secrets.d -F auid>=1000 -F auid!=-1 {secrets}",
        f"-a always,exit -F arch=b64 -S execve,execveat -F path={SETUID[engine.value][0]} {sudo}",
        *(f"-a always,exit -F arch=b64 -S all {where} -F perm=wa {sudo}" for where in sudoers),
    )


AUDIT = {
    EngineName.DEBIAN.value: _audit(
        EngineName.DEBIAN, "-F path=/etc/sudoers", "-F dir=/etc/sudoers.d"
    ),
    EngineName.NIX.value: _audit(EngineName.NIX, "-F path=/etc/sudoers"),
}

# Units that look after the others
HELPERS = ("rave-bans.service", "rave-clock.service", "rave-units.service")
ENGINE_HELPERS = {
    EngineName.DEBIAN: ("rave-apparmor.service", "rave-audit.service", "rave-secrets.service"),
    EngineName.NIX: (),
}

# What a machine itself writes where else only the image's files are
OWN_FILES = {EngineName.DEBIAN.value: ("/etc/machine-id",), EngineName.NIX.value: ()}

# Units beside the services
EXPOSURES = {
    "rave-launcher@.service": OTHERS_EXPOSURE,  # root's: it starts units
    "rave-bans.service": OUR_EXPOSURE,
    "rave-units.service": OUR_EXPOSURE,
    "rave-agents-disk.service": OUR_EXPOSURE,
    "rave-clock.service": OUR_EXPOSURE,
}
ENGINE_EXPOSURES = {
    # root's, too: it gives files to their owners. On NixOS sops-nix does, before there are units
    EngineName.DEBIAN: {
        "rave-secrets.service": OTHERS_EXPOSURE,
        "rave-apparmor.service": OTHERS_EXPOSURE,  # it may change profiles
        "rave-audit.service": OUR_EXPOSURE,
    },
    EngineName.NIX: {},
}

# Services that answer who comes through the ingress, and the ingress. Not sshd: its sessions would
# inherit the profile, and an operator's may do all. Not those that only loopback reaches.
CONFINED = ("ingress", "kanban", "router", "dispatcher")

AGENTS_SPARE_MB = 32
AGENTS_SPARE_TASKS = 32
AGENTS_DISK_SHARE = 4  # the part of the disk that agents may fill: a fourth


def hardening(machine: Machine, agents: tuple[Agent, ...], concurrency: int) -> Hardening:
    """What the kernel and the file systems deny, and what agent tasks together may use."""
    return Hardening(
        sysctls=SYSCTLS,
        engine_sysctls=ENGINE_SYSCTLS,
        blocked_modules=BLOCKED_MODULES,
        mounts=MOUNTS,
        setuid=SETUID,
        exposures={e.value: EXPOSURES | own for e, own in ENGINE_EXPOSURES.items()},
        profiles={name: f"rave-{name}" for name in CONFINED},
        agents=Containment(
            # a little more, so that a task meets its own limit first, which says whose it was
            memory_mb=concurrency * max(a.memory_mb for a in agents) + AGENTS_SPARE_MB,
            cpu_percent=100 * machine.cpus,
            tasks=concurrency * max(a.tasks for a in agents) + AGENTS_SPARE_TASKS,
            disk_mb=machine.disk_gb * 1024 // AGENTS_DISK_SHARE,
        ),
        audit=AUDIT,
        helpers={e.value: (*HELPERS, *own) for e, own in ENGINE_HELPERS.items()},
        own_files=OWN_FILES,
    )


class _Row:
    """A service as the table has it: everything but its limits, which the profile gives."""

    def __init__(
        self,
        name: str,
        description: str,
        unit: str,
        user: str,
        health: Health,
        *,
        debian: str | None = None,
        ports: tuple[int, ...] = (),
        after: tuple[str, ...] = (),
        secrets: tuple[str, ...] = (),
        engines: tuple[EngineName, ...] = tuple(EngineName),
        exposure: float = OTHERS_EXPOSURE,
        weight: int = NOBODY_WAITS,
    ) -> None:
        self.name = name
        self.description = description
        self.unit = {EngineName.NIX.value: unit, EngineName.DEBIAN.value: debian or unit}
        self.user = user
        self.health = health
        self.ports = ports or (health.port,)
        self.after = after
        self.secrets = secrets
        self.engines = engines
        self.exposure = exposure
        self.weight = weight


def _service(row: _Row, limits: _Limits) -> Service:
    return Service(
        name=row.name,
        description=row.description,
        unit=row.unit,
        user=row.user,
        ports=row.ports,
        limits=Limits(
            memory_mb=limits.memory_mb,
            cpu_percent=limits.cpu_percent,
            oom_score_adjust=limits.oom_score_adjust,
            tasks=limits.tasks,
            cpu_weight=row.weight,
        ),
        health=row.health,
        exposure=row.exposure,
        after=row.after,
        secrets=row.secrets,
        engines=row.engines,
    )


SERVICES = (
    _Row(
        "ssh", "SSH, keys only", "sshd.service", "root", Health(SSH_PORT, None),
        debian="ssh.service", secrets=("ssh/host-key", "ssh/authorized-keys"),
        exposure=LOGIN_EXPOSURE, weight=MUST_GET_THROUGH,
    ),
    _Row(
        "ingress", "HTTPS ingress, the single way in", "nginx.service", "www-data",
        Health(8080, "/status"), ports=(INGRESS_PORT, 8080),
        secrets=("ingress/tls-key", "ingress/tls-cert", "ingress/htpasswd", "ccr/api-key"),
        weight=SOMEBODY_WAITS,
    ),
    _Row(
        "kanban", "Vibe Kanban", "vibe-kanban.service", "vibe-kanban",
        Health(3000, "/api/health"),
        exposure=OUR_EXPOSURE, weight=USUAL,
    ),
    _Row(
        "router", "Claude Code Router", "claude-code-router.service", "ccr",
        Health(3456, "/health"), secrets=("agents/anthropic-api-key",),
        exposure=OUR_EXPOSURE, weight=SOMEBODY_WAITS,
    ),
    _Row(
        "dispatcher", "Webhook dispatcher", "rave-dispatcher.service", "rave-dispatcher",
        Health(3001, "/healthz"),
        secrets=(
            "dispatcher/api-token", "dispatcher/alerts-token", "dispatcher/gitlab-token",
            "dispatcher/github-secret", "dispatcher/standard-secret",
        ),
        exposure=OUR_EXPOSURE, weight=SOMEBODY_WAITS,
    ),
    _Row(
        "postgresql", "PostgreSQL", "postgresql.service", "postgres", Health(5432, None),
        debian="postgresql@17-main.service", secrets=("postgres/exporter-scram",),
        weight=USUAL,
    ),
    _Row(
        "prometheus", "Prometheus", "prometheus.service", "prometheus",
        Health(9090, "/-/ready"),
    ),
    _Row(
        "alertmanager", "Alertmanager", "alertmanager.service", "prometheus",
        Health(9093, "/-/ready"), debian="prometheus-alertmanager.service",
        secrets=("dispatcher/alerts-token",),
    ),
    _Row(
        "victoriametrics", "VictoriaMetrics, for what is kept long", "victoriametrics.service",
        "_victoria-metrics", Health(8428, "/health"), debian="victoria-metrics.service",
    ),
    _Row(
        "pushgateway", "Pushgateway, for what does not run long", "pushgateway.service",
        "prometheus", Health(9091, "/-/ready"), debian="prometheus-pushgateway.service",
    ),
    _Row(
        "node-exporter", "Prometheus node exporter", "prometheus-node-exporter.service",
        "prometheus", Health(9100, "/"),
    ),
    _Row(
        "nginx-exporter", "Prometheus exporter of nginx's connections",
        "prometheus-nginx-exporter.service", "prometheus", Health(9113, "/"),
    ),
    _Row(
        "postgres-exporter", "Prometheus exporter of PostgreSQL",
        "prometheus-postgres-exporter.service", "prometheus", Health(9187, "/"),
        secrets=("postgres/exporter-password",),
    ),
    _Row(
        "blackbox-exporter", "Prometheus exporter that asks services as their clients do",
        "prometheus-blackbox-exporter.service", "prometheus", Health(9115, "/-/healthy"),
    ),
    _Row(
        "mtail", "Counts and times the ingress's requests by route", "mtail.service", "mtail",
        Health(3903, "/"),
        weight=USUAL,
    ),
)  # fmt: skip


def _optional(grafana_source: AptSource | None) -> tuple[_Row, ...]:
    """The services of which a profile may have none. Debian has neither of their packages."""
    both = tuple(EngineName)
    return (
        _Row(
            "grafana", "Grafana, dashboards", "grafana.service", "grafana",
            Health(3030, "/api/health"), debian="grafana-server.service",
            secrets=("grafana/secret-key", "grafana/admin-password"),
            engines=both if grafana_source else (EngineName.NIX,),
        ),
        _Row(
            "tempo", "Tempo, which keeps traces", "tempo.service", "tempo",
            Health(3200, "/ready"), ports=(3200, 4318, 9095), engines=(EngineName.NIX,),
        ),
    )  # fmt: skip


ROUTES = (
    Route("console", "/", None, None, "/", Access.SIGNED_IN, "/", 200, CONSOLE_SOCKET),
    Route(
        "console-data",
        "/console/",
        None,
        None,
        "/console/",
        Access.SIGNED_IN,
        "/console/status",
        200,
        CONSOLE_SOCKET,
    ),
    Route("healthz", "/healthz", None, 3001, "/healthz", Access.ANYONE, "/healthz", 200),
    Route(
        "api",
        "/api/v1/",
        None,
        3001,
        "/v1/",
        Access.BEARER,
        "/api/v1/tasks?limit=1",
        200,
    ),
    # asked without a body they answer that they take none
    Route(
        "gitlab",
        "/webhooks/gitlab",
        None,
        3001,
        "/webhooks/gitlab",
        Access.SIGNED,
        "/webhooks/gitlab",
        405,
    ),
    Route(
        "github",
        "/webhooks/github",
        None,
        3001,
        "/webhooks/github",
        Access.SIGNED,
        "/webhooks/github",
        405,
    ),
    Route(
        "standard",
        "/webhooks/standard",
        None,
        3001,
        "/webhooks/standard",
        Access.SIGNED,
        "/webhooks/standard",
        405,
    ),
    # Vibe Kanban addresses its assets and API from the root, so it gets a host name of its
    # own; the path leads there.
    Route("kanban", "/kanban/", None, None, None, Access.SIGNED_IN, "/kanban/", 302),
    Route("kanban-host", "/", "kanban.localhost", 3000, "/", Access.SIGNED_IN, "/api/health", 200),
    Route("router", "/ccr/", None, 3456, "/", Access.SIGNED_IN_OR_KEY, "/ccr/health", 200),
    Route("router-host", "/", "ccr.localhost", 3456, "/", Access.SIGNED_IN_OR_KEY, "/ui/", 200),
    # it knows the same user and password, so who signed in once is signed in there
    Route(
        "grafana",
        "/grafana/",
        None,
        3030,
        "/grafana/",
        Access.SIGNED_IN,
        "/grafana/api/health",
        200,
        shows_login=True,
    ),
    Route("metrics", "/metrics", None, None, None, Access.NOBODY, "/metrics", 404),
    Route("prometheus", "/prometheus/", None, None, None, Access.NOBODY, "/prometheus/", 404),
)

# templates/common/files/alerts.yml.j2 has their rules, docs/runbooks/ what to do about each
ALERTS = (
    "ServiceDown", "OomKill", "ServiceFlapping", "MemoryPressure", "ServiceMemory", "CpuSaturated",
    "DiskFilling", "AgentForkBomb", "MonitoringBroken", "HttpErrors", "HttpSlow", "AuthFailures",
    "BruteForce", "WebhookErrors", "RuleFailures", "QueueStuck", "TaskFailures",
    "TraceCoverageLow", "DatabaseCorrupt", "BackupStale", "BackupBroken", "CertificateExpiring",
    "SecretsStale", "AvailabilityBurnFast", "AvailabilityBurnSlow",
)  # fmt: skip

# templates/common/dashboards/ has them: a file of the same name each
DASHBOARDS = ("rave-project-health", "rave-agent-performance", "rave-system-health")

LONG_TERM = "http://127.0.0.1:8428/api/v1/write"  # VictoriaMetrics
UNIT_STATE_SECONDS = 5  # how often the state of units is looked at: ServiceDown's deadline
SELF_SECONDS = 15  # how often those who measure are measured
_PROCESS = "process_(resident_memory_bytes|cpu_seconds_total|start_time_seconds|open_fds)"

PROBES = (
    HttpProbe("kanban", "http://127.0.0.1:3000/api/health", "http"),
    HttpProbe("router", "http://127.0.0.1:3456/health", "http"),
    HttpProbe("dispatcher", "http://127.0.0.1:3001/readyz", "http"),
    # as from outside: its certificate is looked at, too
    HttpProbe("ingress", "https://localhost:3002/healthz", "tls"),
)


def scrape_jobs(seconds: int) -> tuple[ScrapeJob, ...]:
    """What is collected, where a profile says `seconds` between two collections.

    Of programs that only serve the monitoring little is kept: each series costs Prometheus some
    4 KB of memory.
    """
    own = max(seconds, SELF_SECONDS)
    return (
        ScrapeJob(
            "units", 9100, "/metrics", min(seconds, UNIT_STATE_SECONDS),
            "rave_unit_.*|node_textfile_mtime_seconds", collect=("textfile",), honor_labels=True,
        ),
        # rules reckon with it by the minute
        ScrapeJob(
            "node", 9100, "/metrics", SELF_SECONDS, "node_.*|rave_(secret|backup|bans|agents).*"
        ),
        ScrapeJob("probes", 9115, "/probe", seconds, probes=PROBES),
        ScrapeJob("requests", 3903, "/metrics", seconds, "rave_.*|mtail_line.*_total"),
        ScrapeJob("dispatcher", 3001, "/metrics", seconds, "rave_.*|agent_.*|" + _PROCESS),
        ScrapeJob("nginx", 9113, "/metrics", seconds, "nginx_.*"),
        ScrapeJob("postgresql", 9187, "/metrics", own, "(pg_|rave_).*"),
        ScrapeJob(
            "pushgateway", 9091, "/metrics", own, "(push_|rave_|agent_).*|" + _PROCESS,
            honor_labels=True,
        ),
        ScrapeJob(
            "prometheus", 9090, "/metrics", own,
            "prometheus_(tsdb_(head_series|head_samples_appended_total|storage_blocks_bytes|"
            "wal_corruptions_total)|rule_.*(failures|missed)_total|rule_group_.*duration_seconds|"
            "notifications_(dropped|errors|sent)_total|target_.*exceeded.*|"
            "remote_storage_(samples.*_total|shards|highest_timestamp_in_seconds|"
            "queue_highest_sent_timestamp_seconds)|config_last_reload_successful)|" + _PROCESS,
        ),
        ScrapeJob(
            "alertmanager", 9093, "/metrics", own,
            "alertmanager_(alerts|notifications.*_total|config_last_reload_successful)|" + _PROCESS,
        ),
        ScrapeJob(
            "victoriametrics", 8428, "/metrics", own,
            "vm_(rows|free_disk_space_bytes|data_size_bytes|rows_inserted_total|"
            "slow_queries_total|http_request_errors_total)|" + _PROCESS,
        ),
        ScrapeJob("grafana", 3030, "/metrics", own, _PROCESS),
        ScrapeJob(
            "tempo", 3200, "/metrics", own,
            "tempo_(distributor_spans_received_total|discarded_spans_total)|" + _PROCESS,
        ),
    )  # fmt: skip


_PER_MACHINE = SecretScope.INSTANCE
_SHARED = SecretScope.WORKSPACE
_MADE = SecretScope.DERIVED
GRACE_HOURS = 24  # senders of webhooks are told their new secret by hand, within a working day

# Names are part of the contract with the encrypted files: a change needs a migration.
SECRETS = (
    Secret(
        "ssh/host-key", SecretKind.SSH_KEY, _PER_MACHINE, Activation.RELOAD, in_all=False,
    ),
    Secret(
        "ssh/authorized-keys", SecretKind.AUTHORIZED_KEYS, _MADE, Activation.NONE, mode="0644",
        in_all=False,
    ),
    # the authority stays on the host, and in --all: who trusts it would have to trust another
    Secret(
        "ca/key", SecretKind.CA_KEY, _SHARED, Activation.NONE, delivered=False, in_all=False,
    ),
    Secret(
        "ca/cert", SecretKind.CA_CERT, _SHARED, Activation.NONE, delivered=False, in_all=False,
    ),
    Secret("ingress/tls-key", SecretKind.TLS_KEY, _PER_MACHINE, Activation.RELOAD),
    Secret("ingress/tls-cert", SecretKind.TLS_CERT, _PER_MACHINE, Activation.RELOAD, mode="0644"),
    Secret("ingress/password", SecretKind.PASSWORD, _SHARED, Activation.NONE, delivered=False),
    # nginx's workers, not its master, open the password file: at each request
    Secret(
        "ingress/htpasswd", SecretKind.HTPASSWD, _MADE, Activation.NONE, group="www-data",
        mode="0640", source="ingress/password",
    ),
    Secret("ccr/api-key", SecretKind.PASSWORD, _SHARED, Activation.RELOAD),
    # data sources hold no secrets that it could encrypt; what a person enters there would be lost
    Secret(
        "grafana/secret-key", SecretKind.PASSWORD, _SHARED, Activation.RESTART, owner="grafana",
        group="grafana", mode="0400", in_all=False,
    ),
    Secret(
        "grafana/admin-password", SecretKind.COPY, _MADE, Activation.RESTART, owner="grafana",
        group="grafana", mode="0400", source="ingress/password",
    ),
    # read by the exporter when it starts
    Secret(
        "postgres/exporter-password", SecretKind.PASSWORD, _SHARED, Activation.RESTART,
        group="prometheus", mode="0640",
    ),
    Secret(
        "postgres/exporter-scram", SecretKind.SCRAM, _MADE, Activation.ROLE, owner="postgres",
        group="postgres", mode="0400", role="exporter", source="postgres/exporter-password",
    ),
    # the dispatcher looks at its files at each request, so a new value needs nothing else
    Secret(
        "dispatcher/api-token", SecretKind.PASSWORD, _SHARED, Activation.NONE,
        owner="rave-dispatcher", group="rave-dispatcher", mode="0400",
    ),
    # what Alertmanager shows, which opens /alerts and nothing else; both look at each request
    Secret(
        "dispatcher/alerts-token", SecretKind.PASSWORD, _SHARED, Activation.NONE,
        owner="rave-dispatcher", group="prometheus", mode="0440",
    ),
    Secret(
        "dispatcher/gitlab-token", SecretKind.PASSWORD, _SHARED, Activation.NONE,
        owner="rave-dispatcher", group="rave-dispatcher", mode="0400", grace_hours=GRACE_HOURS,
    ),
    Secret(
        "dispatcher/github-secret", SecretKind.PASSWORD, _SHARED, Activation.NONE,
        owner="rave-dispatcher", group="rave-dispatcher", mode="0400", grace_hours=GRACE_HOURS,
    ),
    Secret(
        "dispatcher/standard-secret", SecretKind.WEBHOOK, _SHARED, Activation.NONE,
        owner="rave-dispatcher", group="rave-dispatcher", mode="0400", grace_hours=GRACE_HOURS,
    ),
    Secret("agents/anthropic-api-key", SecretKind.GIVEN, _SHARED, Activation.RESTART),
    # Alertmanager reads them at each notification
    *(
        Secret(
            f"alerts/{name}", SecretKind.GIVEN, _SHARED, Activation.NONE, group="prometheus",
            mode="0640",
        )
        for name in ("webhook-url", "slack-url", "smtp-password")
    ),
    # no secret: what the node exporter shows of them
    Secret(
        "monitoring/secrets.prom", SecretKind.DATES, _MADE, Activation.NONE, mode="0644",
        in_all=False,
    ),
)  # fmt: skip
