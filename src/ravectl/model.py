"""The values of the flow. Read this first.

    profiles/*.yaml -> Profile -> Plan -> RenderedTree -> Image -> Instance -> Report
                       (YAML)    (pure)  (Jinja)         (engine) (QEMU)     (checks over SSH)

Everything here is a frozen value or an enum: no I/O, no defaults that depend on the host.
Sizes are in MB meaning MiB (what QEMU's -m and systemd's M suffix mean), unless a name says
otherwise.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SSH_PORT = 22
AGENT_MB_LEAST = 64  # a profile whose services leave less gets tasks that run out of memory
INGRESS_PORT = 3002
CONSOLE_SOCKET = "/run/rave-dispatcher/console.sock"  # only the ingress's user can open it
SSH_ANNOUNCEMENT = "rave: ssh listens"  # what the guest says on its console, for `up`
TEMPO_OTLP = "http://127.0.0.1:4318/v1/traces"  # OTLP's own port and path for HTTP
# who floods the kernel's notes loses his own, and slows nobody
AUDIT_WAITING, AUDIT_A_SECOND = 1024, 400  # messages; `ravectl verify` makes some 100 a second
LOG_BURST_SECONDS = 30  # what journald itself has: RateLimitIntervalSec= in journald.conf(5)
HOST_ADDRESS = "10.0.2.2"  # this host, as a machine on QEMU's user network sees it
# where a closed machine finds its log receiver: in that network, and nobody else's
RELAY_ADDRESS = "10.0.2.100"
LOGIN_FAILURES = 3  # from one address; the fourth attempt is refused: docs/adr/0010
BLOCK_SECONDS = 60  # after which an address that was refused may try again, at the latest
RESERVED_MB = 384  # kernel, systemd, journal and sessions: what the services' limits leave free

# New connections of one address to a port: so many a second, and at once (docs/adr/0010)
NEW_CONNECTIONS = ((SSH_PORT, 5, 30), (INGRESS_PORT, 100, 300))
# accounts that run code which nobody here wrote, and the services that they need
REACHES = {"agent": ("router",), "vibe-kanban": ("kanban", "router"), "ccr": ("router",)}

# in the order in which a person reads them; a profile gives each its limits, plan.SERVICES the rest
SERVICE_NAMES = (
    "ssh",
    "ingress",
    "kanban",
    "router",
    "dispatcher",
    "postgresql",
    "prometheus",
    "alertmanager",
    "victoriametrics",
    "pushgateway",
    "node-exporter",
    "nginx-exporter",
    "postgres-exporter",
    "blackbox-exporter",
    "mtail",
)
# what a machine has where its profile asks for it and its engine has it
OPTIONAL_SERVICES = ("grafana", "tempo")


class EngineName(enum.StrEnum):
    """What makes an image."""

    NIX = "nix"
    DEBIAN = "debian"


class ImageFormat(enum.StrEnum):
    """How the disk of an image is stored."""

    QCOW2 = "qcow2"
    RAW = "raw"
    # NixOS' own, which boot by themselves: on other hypervisors, too
    QEMU = "qemu"
    RAW_EFI = "raw-efi"
    VMWARE = "vmware"
    VIRTUALBOX = "virtualbox"
    ISO = "iso"
    AMAZON = "amazon"
    KUBEVIRT = "kubevirt"

    @property
    def boots_directly(self) -> bool:
        """Whether QEMU is given kernel and initrd beside the disk, as `up` does."""
        return self in (ImageFormat.QCOW2, ImageFormat.RAW)


class Accelerator(enum.StrEnum):
    """How QEMU runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


class Access(enum.StrEnum):
    """Who may use a route of the ingress."""

    ANYONE = "anyone"
    SIGNED_IN = "signed-in"
    SIGNED_IN_OR_KEY = "signed-in-or-key"
    BEARER = "bearer"  # who has the dispatcher's API token
    SIGNED = "signed"  # whose requests carry a signature; the service behind it judges
    NOBODY = "nobody"


class SecretKind(enum.StrEnum):
    """What a secret's value is, which says how it is made and what it must look like."""

    PASSWORD = "password"  # noqa: S105 - 24 letters and digits
    WEBHOOK = "webhook"  # whsec_ and 32 bytes in base64, as Standard Webhooks writes it
    SSH_KEY = "ssh-key"  # Ed25519, OpenSSH's private form
    TLS_KEY = "tls-key"  # P-256, PKCS#8
    TLS_CERT = "tls-cert"  # of the machine, signed by the workspace's authority
    CA_KEY = "ca-key"
    CA_CERT = "ca-cert"
    HTPASSWD = "htpasswd"  # derived: the ingress's password, hashed
    SCRAM = "scram"  # derived: a PostgreSQL role's password, as the server keeps it
    AUTHORIZED_KEYS = "authorized-keys"  # derived: the operator's public key
    DATES = "dates"  # derived: when each secret was changed last, as metrics
    COPY = "copy"  # derived: another secret's value, for a reader that may see no more
    GIVEN = "given"  # by a person; never made, and a machine works without it


class SecretScope(enum.StrEnum):
    """Where a value is kept."""

    WORKSPACE = "workspace"  # secrets.yaml: the same for all machines of the workspace
    INSTANCE = "instance"  # the encrypted file of one machine
    DERIVED = "derived"  # nowhere: made of others when it is delivered


class Activation(enum.StrEnum):
    """What makes a reader use a value that was just delivered."""

    NONE = "none"  # it reads the file whenever it needs it
    RELOAD = "reload"
    RESTART = "restart"
    ROLE = "role"  # ALTER ROLE


class ReceiverKind(enum.StrEnum):
    """How Alertmanager tells people."""

    WEBHOOK = "webhook"
    SLACK = "slack"
    EMAIL = "email"


class Suite(enum.StrEnum):
    """The families of checks."""

    SERVICE = "service"
    HTTP = "http"
    DATA = "data"
    SECURITY = "security"
    OBSERVABILITY = "observability"


class Outcome(enum.StrEnum):
    """How a check ended. ERROR means that it could not be run, which is never a pass."""

    PASSED = "passed"
    FAILED = "failed"
    ERROR = "error"


# --- Profile -> Plan -------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The virtual hardware."""

    memory_mb: int
    cpus: int
    disk_gb: int


@dataclass(frozen=True)
class Limits:
    """What systemd holds a unit to."""

    memory_mb: int
    cpu_percent: int  # 100 is one core, as in CPUQuota=
    oom_score_adjust: int  # -1000 (never killed) to 1000 (first)
    tasks: int
    cpu_weight: int = 100  # 1 to 10000: its share when the processors are wanted by several


@dataclass(frozen=True)
class Health:
    """A request on loopback inside the guest that a working service answers."""

    port: int
    path: str | None  # None: the port accepts connections (not HTTP)
    status: int = 200


@dataclass(frozen=True)
class Service:
    """A service of the machine.

    `name` is ours and the same for every engine; `unit` is keyed by engine because Debian and
    NixOS name some units differently.
    """

    name: str
    description: str
    unit: dict[str, str]
    user: str
    ports: tuple[int, ...]
    limits: Limits
    health: Health
    exposure: float  # the most that `systemd-analyze security` may say: 0 (closed) to 10
    after: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    engines: tuple[EngineName, ...] = tuple(EngineName)  # whose machines have it


@dataclass(frozen=True)
class Hardening:
    """What the kernel and the file systems deny, beyond what each unit denies itself."""

    sysctls: dict[str, str]
    # what only one engine's kernel knows
    engine_sysctls: dict[str, dict[str, str]]
    blocked_modules: tuple[str, ...]  # never loaded, whatever asks for them
    mounts: dict[str, tuple[str, ...]]  # a mount point, and the options that it has at least
    setuid: dict[str, tuple[str, ...]]  # by engine: the programs that give others' rights
    exposures: dict[str, dict[str, float]]  # by engine: of units beside the services
    profiles: dict[str, str]  # a service, and the AppArmor profile that it is held to
    agents: Containment
    audit: dict[str, tuple[str, ...]]  # by engine: what the kernel notes, in auditctl's words
    helpers: dict[str, tuple[str, ...]]  # by engine: units that are active beside the services
    own_files: dict[str, tuple[str, ...]]  # by engine: what a machine writes beside the image's

    def kernel(self, engine: str) -> dict[str, str]:
        """The kernel's settings on `engine`, by their names."""
        return {**self.sysctls, **self.engine_sysctls.get(engine, {})}


@dataclass(frozen=True)
class Containment:
    """What all agent tasks together are held to (agents.slice), and the disk that they have."""

    memory_mb: int
    cpu_percent: int
    tasks: int
    disk_mb: int


@dataclass(frozen=True)
class Route:
    """A way through the ingress.

    A route is a path on the default host, or a whole `host` (a virtual host below .localhost).
    A path with a slash at its end stands for all below it, but for `/`, which is that page alone.
    `probe` is the path that shows that it works, `status` what that answers when allowed.
    """

    name: str
    path: str
    host: str | None
    upstream_port: int | None
    upstream_path: str | None
    access: Access
    probe: str
    status: int
    upstream_socket: str | None = None  # a unix socket, in place of a port: the console's
    shows_login: bool = False  # what signed a client in is passed on: the service asks for it, too


@dataclass(frozen=True)
class HttpProbe:
    """A request that the blackbox exporter makes to a service, as its clients would."""

    service: str
    url: str
    module: str  # of the exporter's configuration


@dataclass(frozen=True)
class ScrapeJob:
    """What Prometheus collects, from loopback.

    `keep` is a regular expression of the metrics that are stored (None: all). With `probes` the
    target is the blackbox exporter, which is asked once for each.
    """

    name: str
    port: int
    path: str
    every_seconds: int
    keep: str | None = None
    collect: tuple[str, ...] = ()  # of the node exporter: only these collectors
    honor_labels: bool = False  # what is collected says itself whose it is
    probes: tuple[HttpProbe, ...] = ()

    @property
    def targets(self) -> int:
        """How many targets Prometheus has of it."""
        return len(self.probes) or 1


@dataclass(frozen=True)
class Account:
    """A login or service account that the machine gets beside those of its packages."""

    name: str
    uid: int
    home: str
    login: bool
    sudo: bool


@dataclass(frozen=True)
class Secret:
    """A secret as it is declared: all but its value, which is never in a Plan.

    `owner`, `group` and `mode` are those of its file in the guest, /run/secrets/NAME.
    """

    name: str
    kind: SecretKind
    scope: SecretScope
    activation: Activation
    owner: str = "root"
    group: str = "root"
    mode: str = "0600"  # octal, as in tmpfiles.d
    delivered: bool = True  # False: stays on the host
    grace_hours: int = 0  # how long the value before the last rotation is accepted too
    role: str | None = None  # PostgreSQL's, whose password it is
    source: str | None = None  # the secret that a derived one is made of
    in_all: bool = True  # part of `rotate-secrets --all`

    @property
    def previous(self) -> str:
        """The name of the file that holds the value before the last rotation."""
        return f"{self.name}.previous"

    @property
    def files(self) -> tuple[str, ...]:
        """The files in which a guest may have it, below /run/secrets."""
        more = (self.previous, f"{self.previous}-until") if self.grace_hours else ()
        return (self.name, *more)


@dataclass(frozen=True)
class Retention:
    """How long data is kept."""

    metrics_days: int
    metrics_mb: int
    critical_metrics_days: int
    events_days: int
    backups_days: int
    backup_every_minutes: int


@dataclass(frozen=True)
class LogForward:
    """Where the journal is sent: a systemd-journal-remote or what speaks its protocol."""

    url: str  # as the profile has it: scheme, host and port
    ca: str | None  # PEM; None: the authorities that the machine's distribution trusts

    @property
    def host(self) -> str:
        """The receiver's host name or address."""
        return self.url.partition("://")[2].rpartition(":")[0]

    @property
    def port(self) -> int:
        """The receiver's TCP port."""
        return int(self.url.rpartition(":")[2])

    @property
    def encrypted(self) -> bool:
        """Whether it is sent by TLS."""
        return self.url.startswith("https:")


@dataclass(frozen=True)
class Logs:
    """What journald keeps, for how long, and how much it takes from one service."""

    keep_days: int
    size_mb: int
    keep_free_mb: int
    burst: int  # messages of one service within LOG_BURST_SECONDS
    forward: LogForward | None


@dataclass(frozen=True)
class RouterProvider:
    """An endpoint that Claude Code Router may send prompts to."""

    name: str
    url: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class AlertReceiver:
    """Whom alerts go to beside the dispatcher. Addresses that let anybody in are secrets."""

    kind: ReceiverKind
    channel: str | None = None  # of Slack
    to: str | None = None  # of email, as are these
    sender: str | None = None
    smarthost: str | None = None
    username: str | None = None

    @property
    def secret(self) -> str | None:
        """The secret without which nothing reaches it, by its name."""
        if self.kind is ReceiverKind.EMAIL:
            return "alerts/smtp-password" if self.username else None
        return f"alerts/{self.kind.value}-url"


@dataclass(frozen=True)
class AptSource:
    """A package source beside Debian's own, from which the debian engine takes Grafana."""

    line: str  # what follows `deb` in sources.list(5): URI, suite, components
    key: str  # OpenPGP public key, armored, by which its lists must be signed


@dataclass(frozen=True)
class Network:
    """What crosses the machine's border."""

    egress: bool
    open_ports: tuple[int, ...]
    ssh_host_port: int | None  # None: chosen at `up`
    https_host_port: int | None


VERIFY_RULE = "what ravectl verify sends"  # the dispatcher has it before the profile's
AGENT_TYPES = ("backend-architect", "frontend-developer", "ai-engineer")


@dataclass(frozen=True)
class Agent:
    """What does the tasks of a type, and what systemd holds each of them to."""

    agent_type: str
    command: tuple[str, ...]  # words, never a shell's line; the prompt is its standard input
    seconds: int
    memory_mb: int
    cpu_percent: int
    tasks: int
    network: bool  # beyond the machine
    environment: dict[str, str]
    credentials: dict[str, str]  # a file's name in $CREDENTIALS_DIRECTORY, and its secret


@dataclass(frozen=True)
class RuleCondition:
    """What the payload of a webhook must have at a JSONPath."""

    path: str
    equals: str | None  # as JSON
    matches: str | None
    negate: bool


@dataclass(frozen=True)
class WebhookRule:
    """Which webhooks become which task; rave_dispatcher.domain.rules says how it is read."""

    name: str
    agent_type: str
    prompt: str
    sources: tuple[str, ...]
    types: tuple[str, ...]
    conditions: tuple[RuleCondition, ...]
    priority: int
    max_attempts: int | None
    command: tuple[str, ...] | None


@dataclass(frozen=True)
class Plan:
    """Everything that a profile implies, resolved. The same profile gives the same Plan."""

    profile: str
    machine: Machine
    hostname: str
    operator: str
    accounts: tuple[Account, ...]
    services: tuple[Service, ...]
    routes: tuple[Route, ...]
    scrape_jobs: tuple[ScrapeJob, ...]
    scrape_seconds: int  # evaluation of rules; a job may have another interval
    remote_write: tuple[str, ...]  # where the critical metrics (rave:*) go
    alerts: tuple[str, ...]
    alert_receivers: tuple[AlertReceiver, ...]
    dashboards: tuple[str, ...]  # Grafana's, by uid; none where there is no Grafana
    grafana_source: AptSource | None  # of the debian engine
    secrets: tuple[Secret, ...]
    retention: Retention
    logs: Logs
    network: Network
    router_providers: tuple[RouterProvider, ...]
    agent_concurrency: int
    agents: tuple[Agent, ...]  # one for each of AGENT_TYPES
    hardening: Hardening
    webhook_rules: tuple[WebhookRule, ...]
    otlp_endpoint: str | None  # where spans go beside the dispatcher's store
    service_memory_mb: int  # what the limits of all services may sum to

    @property
    def forward_relayed(self) -> bool:
        """Whether QEMU relays the journal, since the machine itself reaches nothing."""
        return self.logs.forward is not None and not self.network.egress

    @property
    def forward_url(self) -> str | None:
        """Where the machine sends its journal, as it sees it; None: nowhere."""
        target = self.logs.forward
        if target is None or not self.forward_relayed or target.host != HOST_ADDRESS:
            return None if target is None else target.url
        return f"http://{RELAY_ADDRESS}:{target.port}"

    @property
    def forward_alias(self) -> str | None:
        """The receiver's name that leads to the relay: TLS needs the name that was certified."""
        target = self.logs.forward
        if target is None or not self.forward_relayed or target.host == HOST_ADDRESS:
            return None
        return target.host

    def on(self, engine: EngineName) -> Plan:
        """The Plan of a machine that `engine` makes: without what that engine does not have.

        What belongs to a service goes with it: its routes, scrape jobs, dashboards and the secrets
        that nobody else reads. Spans go to Tempo where there is one.
        """
        here = tuple(s for s in self.services if engine in s.engines)
        lost = tuple(s for s in self.services if engine not in s.engines)
        ports = {p for s in lost for p in s.ports}
        unread = {n for s in lost for n in s.secrets} - {n for s in here for n in s.secrets}
        names = {s.name for s in here}
        return dataclasses.replace(
            self,
            services=here,
            routes=tuple(r for r in self.routes if r.upstream_port not in ports),
            scrape_jobs=tuple(j for j in self.scrape_jobs if j.port not in ports),
            dashboards=self.dashboards if "grafana" in names else (),
            secrets=tuple(s for s in self.secrets if s.name not in unread),
            otlp_endpoint=TEMPO_OTLP if "tempo" in names else self.otlp_endpoint,
        )

    def has(self, name: str) -> bool:
        """Whether there is a service called `name`."""
        return any(s.name == name for s in self.services)

    def service(self, name: str) -> Service:
        """The service called `name`; KeyError when the Plan has none."""
        for service in self.services:
            if service.name == name:
                return service
        raise KeyError(name)

    def serving(self, port: int) -> Service:
        """The service that listens on `port`; KeyError when none does."""
        for service in self.services:
            if port in service.ports:
                return service
        raise KeyError(port)

    def health_path(self, route: Route) -> str | None:
        """Where through the ingress the service behind `route` tells its health, if it does."""
        for s in self.services:
            if s.health.port == route.upstream_port and s.health.path:
                below = route.upstream_path or "/"
                if s.health.path.startswith(below):
                    return route.path + s.health.path.removeprefix(below)
        return None

    def secret(self, name: str) -> Secret:
        """The secret called `name`; KeyError when the Plan has none."""
        for secret in self.secrets:
            if secret.name == name:
                return secret
        raise KeyError(name)

    def delivered(self) -> tuple[Secret, ...]:
        """The secrets that the guest gets."""
        return tuple(s for s in self.secrets if s.delivered)

    def readers(self, name: str) -> tuple[Service, ...]:
        """The services that read a secret, in the order of their start."""
        return tuple(s for s in self.services if name in s.secrets)

    def units(self, engine: EngineName) -> tuple[str, ...]:
        """The units that must be active, by the names that `engine` gives them."""
        return tuple(s.unit[engine] for s in self.services)

    def closed_to(self) -> tuple[tuple[Account, tuple[int, ...]], ...]:
        """Accounts that run foreign code, each with the services' ports that it cannot reach."""
        own = {n: {p for s in names for p in self.service(s).ports} for n, names in REACHES.items()}
        return tuple(
            (a, tuple(p for p in self.listeners() if p not in own[a.name]))
            for a in self.accounts
            if a.name in own
        )

    def listeners(self) -> tuple[int, ...]:
        """Every port that something may listen on, inside the machine."""
        return tuple(sorted({p for s in self.services for p in s.ports}))


@dataclass(frozen=True)
class NixSettings:
    """How Nix builds; nothing of it changes what is built, so it is no part of a Plan."""

    max_jobs: int = 1
    cores: int = 2
    substituters: tuple[str, ...] = ()  # beyond those of the host's nix.conf
    trusted_public_keys: tuple[str, ...] = ()


# --- RenderedTree -> Image -------------------------------------------------------------------


@dataclass(frozen=True)
class RenderedFile:
    """One file of a rendered tree; a symlink when `target` is set."""

    path: str  # relative, "/" as separator
    content: str = ""
    mode: int = 0o644
    target: str | None = None


@dataclass(frozen=True)
class RenderedTree:
    """The files that a Plan renders to, sorted by path."""

    files: tuple[RenderedFile, ...]

    def file(self, path: str) -> RenderedFile:
        """The file at `path`; KeyError when the tree has none."""
        for f in self.files:
            if f.path == path:
                return f
        raise KeyError(path)


MANIFEST = "image.json"  # of an image, in its folder: what it is made of


@dataclass(frozen=True)
class Image:
    """An immutable image in the store, addressed by the digest of what went into it."""

    digest: str
    engine: EngineName
    format: ImageFormat
    folder: Path
    disk: Path
    kernel: Path
    initrd: Path
    cmdline: str
    plan: Plan
    sizes: dict[str, int]  # bytes of each file, to notice a truncated one
    hashes: dict[str, str]  # SHA-256 of each file
    manifest: str  # SHA-256 of the manifest that said all this


# --- Instance --------------------------------------------------------------------------------


class InstanceState(enum.StrEnum):
    """What is true of an instance right now."""

    ABSENT = "absent"
    STOPPED = "stopped"
    RUNNING = "running"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Endpoint:
    """Where an instance can be reached on this host, and as whom."""

    ssh_port: int
    https_port: int
    operator: str


# --- Report ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckResult:
    """What a check found."""

    id: str
    suite: Suite
    title: str
    outcome: Outcome
    expected: str
    seen: str
    remedy: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """The results of a verification, in the order of the checks' table."""

    instance: str
    profile: str
    image: str
    results: tuple[CheckResult, ...]
    seconds: float
    started: str  # RFC 3339, UTC, by this host's clock
    not_checked: tuple[str, ...] = ()  # ids of the checks that were not chosen

    @property
    def holds(self) -> bool:
        """True when every check ran and passed."""
        return bool(self.results) and all(r.outcome is Outcome.PASSED for r in self.results)


# --- as JSON and back ------------------------------------------------------------------------


def to_json(value: object) -> Any:
    """A dataclass (or tuple, enum, path) as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value


def from_json(kind: type[T], value: Any) -> T:
    """The inverse of to_json for the dataclasses of this module.

    Raises ValueError (or KeyError, TypeError) when `value` is not of that form.
    """
    return typing.cast(T, _build(kind, value))


def form_of(kind: type) -> str:
    """A digest of which fields a dataclass has, and those within it: it tells what was written
    by a ravectl whose model is another."""
    rows: dict[str, list[str]] = {}
    _collect_form(kind, rows)
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _collect_form(kind: Any, rows: dict[str, list[str]]) -> None:
    for inner in typing.get_args(kind):
        _collect_form(inner, rows)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and kind.__name__ not in rows:
        hints = typing.get_type_hints(kind)
        rows[kind.__name__] = [f"{name}: {hint}" for name, hint in hints.items()]
        for hint in hints.values():
            _collect_form(hint, rows)


def _build(kind: Any, value: Any) -> Any:  # noqa: PLR0911
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        return typing.cast(Any, kind)(**{k: _build(hints[k], v) for k, v in value.items()})
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _build(next(a for a in args if a is not types.NoneType), value)
    if origin is tuple:
        return tuple(_build(args[0], v) for v in value)
    if origin is dict:
        return {k: _build(args[1], v) for k, v in value.items()}
    if kind in (int, float, str, bool):
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{value!r} is not of type {kind.__name__}")
        return value
    return kind(value)
