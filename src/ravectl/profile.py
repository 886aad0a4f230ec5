"""YAML -> Profile: what a person writes, held to what a machine can keep.

Three steps: a file is read into a tree that remembers each key's line; a workspace's
`rave.yaml` is laid over the shipped profile that it extends; the result is validated. Whatever
is wrong ends as a ProfileError that names file, line, key and remedy.
"""

from __future__ import annotations

import difflib
import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from rave_dispatcher.domain.rules import Condition, Rule, RuleError
from rave_dispatcher.domain.tasks import AgentType
from ravectl import files, model
from ravectl.errors import ProfileError, UsageError
from ravectl.model import (
    AGENT_MB_LEAST,
    AGENT_TYPES,
    OPTIONAL_SERVICES,
    RESERVED_MB,
    SERVICE_NAMES,
)

DEFAULT = "safe"
WORKSPACE_FILE = "rave.yaml"
REFERENCE = "docs/profiles.md"
MAX_BYTES = 64 * 2**10  # the shipped profiles have 2 KB; the parser takes a second for 64
MAX_DEPTH = 12
MAX_SHOWN = 40
MAX_PORT = 65535

Keys = tuple[str | int, ...]  # of keys and indexes, from the top of the document


# --- what a profile says ---------------------------------------------------------------------


def _wrong(cause: str, remedy: str, *at: Keys) -> PydanticCustomError:
    """An error of ours. `at` are the keys that it may be about, below where it is raised, the
    likeliest first: one that the person wrote is shown."""
    return PydanticCustomError("rave", "{cause}", {"cause": cause, "remedy": remedy, "at": at})


@dataclass(frozen=True)
class _Kind:
    """A kind of quantity: each accepted spelling of a unit, in multiples of the smallest."""

    noun: str
    units: dict[str, int]
    examples: str


SIZE = _Kind(
    "a size",
    {"MB": 1, "MiB": 1, "GB": 2**10, "GiB": 2**10, "TB": 2**20, "TiB": 2**20},
    "'512 MB' or '2 GB'",
)
TIME = _Kind(
    "a time",
    {"s": 1, "sec": 1, "second": 1, "seconds": 1}
    | {"min": 60, "minute": 60, "minutes": 60, "h": 3600, "hour": 3600, "hours": 3600}
    | {"day": 86400, "days": 86400, "week": 604800, "weeks": 604800},
    "'10 s', '15 min' or '3 days'",
)
SHARE = _Kind("a share of one core", {"%": 1}, "'50 %' or '200 %'")


def _quantity(kind: _Kind, unit: str, low: int, high: int) -> BeforeValidator:
    """Reads '2 GB' into a whole number of `unit`, within bounds given in that unit."""

    def read(value: object) -> int:
        text = "" if isinstance(value, bool | dict | list) else str(value).strip()
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*([A-Za-z%]*)", text)
        if not match:
            raise _wrong(
                f"{_show(value)} is not {kind.noun}", f"write {kind.noun}, such as {kind.examples}"
            )
        number, spelled = match.groups()
        factors = {name.lower(): factor for name, factor in kind.units.items()}
        if not spelled:
            raise _wrong(f"{number} has no unit", f"write it with one: '{number} {unit}'")
        if spelled.lower() not in factors:
            accepted = f"use one of {', '.join(kind.units)}"
            raise _wrong(
                f"{spelled!r} is not a unit of {kind.noun}",
                _nearest(spelled, kind.units, f"'{number} {{}}'") or accepted,
            )
        exact = Decimal(number) * factors[spelled.lower()] / kind.units[unit]
        if exact != int(exact):
            raise _wrong(f"{_show(value)} is not a whole number of {unit}", f"write it in {unit}")
        if not low <= exact <= high:
            side = "less than the least" if exact < low else "more than the most"
            bound = low if exact < low else high
            raise _wrong(
                f"{_show(value)} is {side} that is possible, {bound} {unit}",
                f"write a value from '{low} {unit}' to '{high} {unit}'",
            )
        return int(exact)

    return BeforeValidator(read)


def _word(pattern: str, what: str, example: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise _wrong(f"{_show(value)} is not {what}", f"write it like {example}")
        return value

    return AfterValidator(check)


WHOLE = Field(strict=True)


def _within(low: int, high: int) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise _wrong(f"{value} is out of bounds", f"write a number from {low} to {high}")
        return value

    return AfterValidator(check)


def _filled(value: tuple[object, ...]) -> tuple[object, ...]:
    if not value:
        raise _wrong("the list is empty", "write at least one entry")
    return value


# unlike min_length it is not asked when an entry is wrong
FILLED = AfterValidator(_filled)


def _known_service(name: str) -> str:
    names = (*SERVICE_NAMES, *OPTIONAL_SERVICES)
    if name not in names:
        known = f"the services are {', '.join(names)}"
        raise _wrong("unknown service", _nearest(name, names) or known)
    return name


def _known_agent(name: str) -> str:
    if name not in AGENT_TYPES:
        known = f"the types are {', '.join(AGENT_TYPES)}"
        raise _wrong("unknown type of agent", _nearest(name, AGENT_TYPES) or known)
    return name


def _agents_secret(name: str) -> str:
    if name not in AGENT_SECRETS:
        raise _wrong(
            f"{_show(name)} is no secret that agents may have",
            _nearest(name, AGENT_SECRETS) or f"use one of {', '.join(AGENT_SECRETS)}",
        )
    return name


# it needs no account: it keeps the prompt in the task's folder and repeats it
DEFAULT_COMMAND = ("/usr/bin/env", "tee", "TASK.md")
AGENT_SECRETS = ("ccr/api-key", "agents/anthropic-api-key")
VariableName = Annotated[
    str, _word("[A-Za-z_][A-Za-z0-9_]{0,63}", "the name of a variable", "'ANTHROPIC_BASE_URL'")
]
FileName = Annotated[str, _word("[a-z0-9][a-z0-9._-]{0,63}", "the name of a file", "'router-key'")]
AgentSecret = Annotated[str, AfterValidator(_agents_secret)]
Days = Annotated[int, _quantity(TIME, "days", 1, 3650)]
NAME = "[a-z]([a-z0-9-]{0,30}[a-z0-9])?"  # rave-NAME is a host name
Name = Annotated[
    str,
    _word(NAME, "a name (a-z, 0-9, -; at most 32)", "'my-team'"),
]
HostPort = Annotated[int, WHOLE, _within(1024, 65535)] | None
# `@` stays out of both: it would let a text stand for the secrets that are filled in at boot
ModelName = Annotated[
    str, _word(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}", "a model's name", "'claude-sonnet-4-5'")
]
Url = Annotated[
    str,
    _word(
        r"(https://[A-Za-z0-9.-]{1,253}|http://(127\.0\.0\.1|localhost|10\.0\.2\.2))"
        r"(:[0-9]{1,5})?(/[A-Za-z0-9._~/%?=&-]{0,512})?",
        "the address of an API (https, or http to this host; no password in it)",
        "'https://api.anthropic.com/v1/messages'",
    ),
]


Substituter = Annotated[
    str,
    _word(
        r"(https://[A-Za-z0-9.-]{1,253}|http://(127\.0\.0\.1|localhost))(:[0-9]{1,5})?"
        r"(/[A-Za-z0-9._~/?=&-]{0,512})?|file:///[A-Za-z0-9._~/-]{1,512}",
        "the address of a binary cache (https, file, or http to this host; no password in it)",
        "'https://cache.example.org'",
    ),
]
PublicKey = Annotated[
    str,
    _word(
        r"[A-Za-z0-9._-]{1,128}:[A-Za-z0-9+/]{43}=",
        "the public key of a binary cache",
        "'cache.example.org-1:' and 44 characters of base64",
    ),
]


def _port_exists(url: str) -> str:
    if not 1 <= (port := int(url.rpartition(":")[2])) <= MAX_PORT:
        raise _wrong(f"{port} is no port", f"write a port from 1 to {MAX_PORT}")
    return url


LogUrl = Annotated[
    str,
    _word(
        r"(https://[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|http://10\.0\.2\.2):[0-9]{1,5}",
        "the address of a journal receiver (https, or http to this host; with a port, no path)",
        "'https://logs.example.org:19532'",
    ),
    AfterValidator(_port_exists),
]


def _its_port_exists(url: str) -> str:
    port = re.match(r"[a-z]+://[^:/]+:(\d+)", url)
    if port is not None and not 1 <= int(port[1]) <= MAX_PORT:
        raise _wrong(f"{port[1]} is no port", f"write a port from 1 to {MAX_PORT}")
    return url


# not one in the machine: VictoriaMetrics is there already, and agents might be what answers
MetricsUrl = Annotated[
    str,
    _word(
        r"(https://[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|http://10\.0\.2\.2)(:[0-9]{1,5})?"
        r"(/[A-Za-z0-9._~/-]{0,512})?",
        "the address of a receiver of metrics (https, or http to 10.0.2.2, which is this host; "
        "nothing secret in it)",
        "'https://metrics.example.org/api/v1/write'",
    ),
    AfterValidator(_its_port_exists),
]


def _certificates(value: str) -> str:
    """The certificates of a PEM text and nothing else that may stand in it, such as a key."""
    from cryptography import x509  # noqa: PLC0415 - 60 ms that most profiles need not pay
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    remedy = "write the authority's certificate, as openssl x509 prints it, after `ca: |`"
    if "PRIVATE KEY" in value:
        raise _wrong("there is a private key in it", remedy)
    try:
        found = x509.load_pem_x509_certificates(value.encode())
    except ValueError:
        raise _wrong("it is not a certificate in PEM form", remedy) from None
    return "".join(c.public_bytes(Encoding.PEM).decode() for c in found)


Certificate = Annotated[str, AfterValidator(_certificates)]


Address = Annotated[
    str,
    _word(r"[\w.+-]{1,64}@[A-Za-z0-9.-]{1,253}", "an address of email", "'ops@example.org'"),
]
# what a receiver of a kind must have
_OF_KIND = {
    model.ReceiverKind.WEBHOOK: (),
    model.ReceiverKind.SLACK: ("channel",),
    model.ReceiverKind.EMAIL: ("to", "from", "smarthost"),
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MachineSection(_Section):
    """The virtual hardware: memory in MB, disk in GB."""

    memory_mb: Annotated[int, _quantity(SIZE, "MB", 1024, 2**20)] = Field(alias="memory")
    cpus: Annotated[int, WHOLE, _within(1, 64)]
    disk_gb: Annotated[int, _quantity(SIZE, "GB", 4, 2**14)] = Field(alias="disk")


class ServiceLimits(_Section):
    """What systemd holds a service to: memory in MB, CPU in percent of one core."""

    memory_mb: Annotated[int, _quantity(SIZE, "MB", 16, 2**20)] = Field(alias="memory")
    cpu_percent: Annotated[int, _quantity(SHARE, "%", 5, 6400)] = Field(alias="cpu")
    oom_score_adjust: Annotated[int, WHOLE, _within(-1000, 1000)]
    tasks: Annotated[int, WHOLE, _within(8, 32768)]


Word = Annotated[str, _word(r"[^\x00-\x1f\x7f]{1,4096}", "a word of a command", "'--print'")]
Command = Annotated[tuple[Word, ...], Field(max_length=64), FILLED]
AgentName = Annotated[str, AfterValidator(_known_agent)]


class AgentSection(_Section):
    """What does the tasks of a type; what is left out follows from the machine."""

    command: Command = DEFAULT_COMMAND
    seconds: Annotated[int, _quantity(TIME, "s", 1, 7 * 86400)] = Field(1800, alias="time")
    memory_mb: Annotated[int, _quantity(SIZE, "MB", 16, 2**20)] | None = Field(None, alias="memory")
    cpu_percent: Annotated[int, _quantity(SHARE, "%", 5, 6400)] = Field(100, alias="cpu")
    tasks: Annotated[int, WHOLE, _within(8, 32768)] = 128
    network: Annotated[bool, Field(strict=True)] | None = None
    environment: Annotated[dict[VariableName, Word], Field(max_length=64)] = {}
    credentials: Annotated[dict[FileName, AgentSecret], Field(max_length=16)] = {}


class AgentsSection(_Section):
    """How many agent tasks run at once, and what runs them."""

    concurrency: Annotated[int, WHOLE, _within(1, 64)]
    types: dict[AgentName, AgentSection] = {}


class NetworkSection(_Section):
    """What crosses the machine's border. A host port of None is chosen at `up`."""

    egress: Annotated[bool, Field(strict=True)]
    ssh_port: HostPort = None
    https_port: HostPort = None

    @model_validator(mode="after")
    def _ports_differ(self) -> NetworkSection:
        if self.ssh_port is not None and self.ssh_port == self.https_port:
            raise _wrong(
                f"{self.https_port} is ssh_port already",
                "give each a port of its own, or write null to have one chosen",
                ("https_port",),
                ("ssh_port",),
            )
        return self


class RetentionSection(_Section):
    """How long data is kept."""

    metrics: Days
    metrics_size: Annotated[int, _quantity(SIZE, "MB", 64, 2**20)]
    critical_metrics: Days
    events: Days
    backups: Days
    backup_every: Annotated[int, _quantity(TIME, "min", 1, 1440)]


class ForwardSection(_Section):
    """Where the journal is sent as well."""

    url: LogUrl
    ca: Certificate | None = None


class LogsSection(_Section):
    """What the machine's journal keeps, and where it is sent."""

    keep: Days
    size: Annotated[int, _quantity(SIZE, "MB", 32, 2**20)]
    keep_free: Annotated[int, _quantity(SIZE, "MB", 64, 2**20)]
    burst: Annotated[int, WHOLE, _within(100, 1_000_000)]
    forward: ForwardSection | None = None


class ProviderSection(_Section):
    """An endpoint that Claude Code Router may send prompts to."""

    name: Name
    url: Url
    models: Annotated[tuple[ModelName, ...], Field(max_length=64), FILLED]


class RouterSection(_Section):
    """Where prompts may go; the first model of the first provider is the default."""

    # without any the router would listen on every address and ask for no key
    providers: Annotated[tuple[ProviderSection, ...], Field(max_length=16), FILLED]

    @field_validator("providers")
    @classmethod
    def _names_differ(cls, providers: tuple[ProviderSection, ...]) -> tuple[ProviderSection, ...]:
        for i, provider in enumerate(providers):
            if provider.name in [p.name for p in providers[:i]]:
                remedy = "give each provider a name of its own"
                raise _wrong(f"{provider.name!r} is there twice", remedy, (i, "name"))
        return providers


def _is_scalar(value: object) -> object:
    if not isinstance(value, str | int | float | bool | None):
        raise _wrong(
            f"{_show(value)} is not one value", "write a text, a number, true, false or null"
        )
    return value


class ConditionSection(_Section):
    """What a webhook's payload must have at a JSONPath (RFC 9535)."""

    path: Annotated[str, Field(max_length=1024)]
    equals: Annotated[Any, AfterValidator(_is_scalar)] = None
    matches: Annotated[str, Field(max_length=1024)] | None = None
    negate: Annotated[bool, Field(strict=True)] = False

    @property
    def has_equals(self) -> bool:
        """Whether it says what the value is; that may be null."""
        return "equals" in self.model_fields_set


Glob = Annotated[str, _word(r"[^\x00-\x1f\x7f]{1,128}", "the name of events", "'Issue Hook'")]


class RuleSection(_Section):
    """Which webhooks become which task."""

    name: Annotated[str, _word(r"[^\x00-\x1f\x7f]{1,80}", "a rule's name", "'review changes'")]
    agent_type: AgentName
    prompt: Annotated[str, Field(min_length=1, max_length=16384)]
    sources: Annotated[tuple[Glob, ...], Field(max_length=16), FILLED] = ("*",)
    types: Annotated[tuple[Glob, ...], Field(max_length=64), FILLED] = ("*",)
    conditions: Annotated[tuple[ConditionSection, ...], Field(max_length=64)] = ()
    priority: Annotated[int, WHOLE, _within(0, 9)] = 5
    max_attempts: Annotated[int, WHOLE, _within(1, 100)] | None = None
    command: Command | None = None

    @model_validator(mode="after")
    def _works(self) -> RuleSection:
        try:
            for n, c in enumerate(self.conditions):
                at: Keys = ("conditions", n)
                Condition(c.path, c.equals, c.matches, c.negate, c.has_equals)
            at = ("prompt",)
            Rule(self.name, AgentType(self.agent_type), self.prompt)
        except RuleError as e:
            raise _wrong(str(e), "see docs/dispatcher.md for what a rule may say", at) from None
        return self


class WebhooksSection(_Section):
    """What becomes of webhooks: the first rule that matches decides."""

    rules: Annotated[tuple[RuleSection, ...], Field(max_length=128)] = ()

    @field_validator("rules")
    @classmethod
    def _names_differ(cls, rules: tuple[RuleSection, ...]) -> tuple[RuleSection, ...]:
        for i, rule in enumerate(rules):
            if rule.name in (model.VERIFY_RULE, *(r.name for r in rules[:i])):
                remedy = "give each rule a name of its own"
                raise _wrong(f"{rule.name!r} is there already", remedy, (i, "name"))
        return rules


class TracingSection(_Section):
    """Where spans go beside the dispatcher's store, by OTLP over HTTP."""

    otlp_endpoint: Url | None = None
    tempo: Annotated[bool, Field(strict=True)] = False


class ReceiverSection(_Section):
    """Whom alerts go to: `kind` and what that kind needs. Its secret is alerts/..., given apart."""

    kind: model.ReceiverKind
    channel: Annotated[str, _word(r"[#@][\w.-]{1,80}", "a channel", "'#ops'")] | None = None
    to: Address | None = None
    sender: Annotated[Address | None, Field(alias="from")] = None
    smarthost: (
        Annotated[
            str,
            _word(r"[A-Za-z0-9.-]{1,253}:[0-9]{1,5}", "a mail server", "'mail.example.org:587'"),
        ]
        | None
    ) = None
    username: Annotated[str, _word(r"[\w.@+-]{1,254}", "a user name", "'rave'")] | None = None

    @model_validator(mode="after")
    def _complete(self) -> ReceiverSection:
        wanted = _OF_KIND[self.kind]
        values = {"channel": self.channel, "to": self.to, "from": self.sender}
        values |= {"smarthost": self.smarthost, "username": self.username}
        if missing := [k for k in wanted if values[k] is None]:
            raise _wrong(
                f"a receiver of kind {self.kind.value} lacks {', '.join(missing)}",
                f"add {'it' if len(missing) == 1 else 'them'}",
            )
        may = (*wanted, *(("username",) if self.kind is model.ReceiverKind.EMAIL else ()))
        if extra := [k for k, v in values.items() if v is not None and k not in may]:
            raise _wrong(
                f"a receiver of kind {self.kind.value} has no {extra[0]}", "remove it", (extra[0],)
            )
        return self


def _public_key(value: str) -> str:
    """One armored OpenPGP public key block and nothing else that may stand in the text."""
    found = re.findall(
        r"-----BEGIN PGP PUBLIC KEY BLOCK-----\n.*?\n-----END PGP PUBLIC KEY BLOCK-----",
        value,
        re.S,
    )
    if "PRIVATE KEY" in value or len(found) != 1:
        cause = "there is a private key in it" if "PRIVATE KEY" in value else "it is no public key"
        remedy = "write the armored key, as gpg --armor --export prints it, after `apt_key: |`"
        raise _wrong(cause, remedy)
    return str(found[0]) + "\n"


AptLine = Annotated[
    str,
    _word(
        r"(https://[A-Za-z0-9.-]{1,253}(:[0-9]{1,5})?|http://(127\.0\.0\.1|localhost):[0-9]{1,5})"
        r"/[A-Za-z0-9._~/-]{0,256}( [A-Za-z0-9._/-]{1,64}){2,8}",
        "a package source (https, or http to this host; URI, suite, components)",
        "'https://apt.example.org/ stable main'",
    ),
]


class GrafanaSection(_Section):
    """Grafana with the dashboards. Debian has no package of it: the user names a source."""

    enabled: Annotated[bool, Field(strict=True)] = False
    apt_source: AptLine | None = None
    apt_key: Annotated[str, AfterValidator(_public_key)] | None = None

    @model_validator(mode="after")
    def _source_is_signed(self) -> GrafanaSection:
        if (self.apt_source is None) != (self.apt_key is None):
            missing = "apt_key" if self.apt_key is None else "apt_source"
            raise _wrong(f"{missing} is missing", f"add {missing}, or leave both out")
        return self


class MonitoringSection(_Section):
    """Where metrics and alerts go beside this machine, and whether there are dashboards in it."""

    grafana: GrafanaSection = GrafanaSection()
    remote_write: Annotated[tuple[MetricsUrl, ...], Field(max_length=4)] = ()
    receivers: Annotated[tuple[ReceiverSection, ...], Field(max_length=3)] = ()

    @field_validator("remote_write")
    @classmethod
    def _receivers_differ(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for i, one in enumerate(given):
            if one in given[:i]:  # Prometheus would not start
                raise _wrong(f"{one!r} is there twice", "name each receiver once", (i,))
        return given

    @field_validator("receivers")
    @classmethod
    def _kinds_differ(cls, given: tuple[ReceiverSection, ...]) -> tuple[ReceiverSection, ...]:
        for i, one in enumerate(given):
            if one.kind in [r.kind for r in given[:i]]:
                remedy = "name each kind once: its secret has one value"
                raise _wrong(f"{one.kind.value!r} is there twice", remedy, (i, "kind"))
        return given


class NixSection(_Section):
    """How the nix engine builds: how much at once, and where it may fetch from."""

    max_jobs: Annotated[int, WHOLE, _within(1, 64)] = 1
    cores: Annotated[int, WHOLE, _within(1, 256)] = 2
    substituters: Annotated[tuple[Substituter, ...], Field(max_length=16)] = ()
    trusted_public_keys: Annotated[tuple[PublicKey, ...], Field(max_length=16)] = ()


class PlanArguments(TypedDict):
    """The keyword arguments of plan.make_plan."""

    profile: str
    machine: model.Machine
    retention: model.Retention
    logs: model.Logs
    egress: bool
    ssh_host_port: int | None
    https_host_port: int | None
    limits: Mapping[str, ServiceLimits]
    providers: tuple[ProviderSection, ...]
    agent_concurrency: int
    agents: tuple[model.Agent, ...]
    rules: tuple[model.WebhookRule, ...]
    otlp_endpoint: str | None
    scrape_seconds: int
    remote_write: tuple[str, ...]
    alert_receivers: tuple[model.AlertReceiver, ...]
    grafana_source: model.AptSource | None


# of services that a profile may switch on without a word about their limits
OPTIONAL_LIMITS = {
    "grafana": {"memory": "256 MB", "cpu": "100 %", "oom_score_adjust": 200, "tasks": 128},
    "tempo": {"memory": "160 MB", "cpu": "100 %", "oom_score_adjust": 200, "tasks": 64},
}


class Profile(_Section):
    """A valid profile; numbers are in the unit that the field or its section names."""

    name: Name
    machine: MachineSection
    services: dict[Annotated[str, AfterValidator(_known_service)], ServiceLimits]
    agents: AgentsSection
    network: NetworkSection
    scrape_seconds: Annotated[int, _quantity(TIME, "s", 1, 60)] = Field(alias="scrape_every")
    retention: RetentionSection
    logs: LogsSection
    router: RouterSection
    webhooks: WebhooksSection = WebhooksSection()
    tracing: TracingSection = TracingSection()
    monitoring: MonitoringSection = MonitoringSection()
    nix: NixSection = NixSection()

    @field_validator("services")
    @classmethod
    def _every_service(cls, services: dict[str, ServiceLimits]) -> dict[str, ServiceLimits]:
        if missing := [name for name in SERVICE_NAMES if name not in services]:
            keys = ", ".join(_aliases(ServiceLimits))
            raise _wrong(f"no limits for {', '.join(missing)}", f"add each with {keys}")
        known = (*SERVICE_NAMES, *OPTIONAL_SERVICES)
        return {name: services[name] for name in known if name in services}

    def limits(self) -> dict[str, ServiceLimits]:
        """What each service that this profile's machines may have is held to."""
        wanted = {"grafana": self.monitoring.grafana.enabled, "tempo": self.tracing.tempo}
        found = {name: self.services[name] for name in SERVICE_NAMES}
        for name in (n for n in OPTIONAL_SERVICES if wanted[n]):
            usual = ServiceLimits.model_validate(OPTIONAL_LIMITS[name])
            found[name] = self.services.get(name, usual)
        return found

    @model_validator(mode="after")
    def _memory_suffices(self) -> Profile:
        limits = self.limits()
        total = sum(s.memory_mb for s in limits.values())
        limit = self.machine.memory_mb - RESERVED_MB
        if total > limit:
            hungriest = sorted(limits, key=lambda n: -limits[n].memory_mb)
            name = hungriest[0]
            raise _wrong(
                f"the services' memory sums to {total} MB, {limit} MB are there for them "
                f"({self.machine.memory_mb} MB less {RESERVED_MB} MB for the system); "
                f"the largest is {name} with {limits[name].memory_mb} MB",
                f"write at least '{total + RESERVED_MB} MB' as machine.memory, or lower "
                f"services.{name}.memory",
                *(("services", n, "memory") for n in hungriest),
                ("machine", "memory"),
            )
        return self

    @model_validator(mode="after")
    def _disk_suffices(self) -> Profile:
        half = self.machine.disk_gb * 1024 // 2
        if self.retention.metrics_size > half:
            raise _wrong(
                f"{self.retention.metrics_size} MB are more than half of machine.disk, {half} MB",
                f"write at most '{half} MB', or a larger machine.disk",
                ("retention", "metrics_size"),
                ("machine", "disk"),
            )
        return self

    @model_validator(mode="after")
    def _journal_fits(self) -> Profile:
        # that of metrics may have the half of it, and the system needs the rest
        quarter = self.machine.disk_gb * 1024 // 4
        for key, size in (("size", self.logs.size), ("keep_free", self.logs.keep_free)):
            if size > quarter:
                raise _wrong(
                    f"{size} MB are more than a quarter of machine.disk, {quarter} MB",
                    f"write at most '{quarter} MB', or a larger machine.disk",
                    ("logs", key),
                    ("machine", "disk"),
                )
        return self

    @model_validator(mode="after")
    def _receiver_has_a_name(self) -> Profile:
        target = _forward(self.logs.forward)
        if target and target.host.lower() == "localhost":
            raise _wrong(
                "localhost is the machine itself",
                "write the receiver's own name, or for this host 'http://10.0.2.2:PORT'",
                ("logs", "forward", "url"),
            )
        numeric = target and re.fullmatch(r"[0-9.]+", target.host)
        if target and numeric and target.encrypted and not self.network.egress:
            raise _wrong(
                f"{target.host} is an address, and a machine without a way out reaches its "
                "receiver by name only",
                "write the host name that stands in its certificate, or network.egress: true",
                ("logs", "forward", "url"),
                ("network", "egress"),
            )
        return self

    @model_validator(mode="after")
    def _receivers_can_be_reached(self) -> Profile:
        if self.network.egress:
            return self
        for key in ("remote_write", "receivers"):
            if getattr(self.monitoring, key):
                raise _wrong(
                    "the machine reaches nothing outside",
                    "write true as network.egress, or leave this out",
                    ("monitoring", key),
                    ("network", "egress"),
                )
        return self

    def plan_arguments(self) -> PlanArguments:
        """What plan.make_plan takes: `make_plan(**profile.plan_arguments())`."""
        kept = self.retention
        return PlanArguments(
            profile=self.name,
            machine=model.Machine(
                memory_mb=self.machine.memory_mb,
                cpus=self.machine.cpus,
                disk_gb=self.machine.disk_gb,
            ),
            retention=model.Retention(
                metrics_days=kept.metrics,
                metrics_mb=kept.metrics_size,
                critical_metrics_days=kept.critical_metrics,
                events_days=kept.events,
                backups_days=kept.backups,
                backup_every_minutes=kept.backup_every,
            ),
            logs=model.Logs(
                keep_days=self.logs.keep,
                size_mb=self.logs.size,
                keep_free_mb=self.logs.keep_free,
                burst=self.logs.burst,
                forward=_forward(self.logs.forward),
            ),
            egress=self.network.egress,
            ssh_host_port=self.network.ssh_port,
            https_host_port=self.network.https_port,
            limits=self.limits(),
            providers=self.router.providers,
            agent_concurrency=self.agents.concurrency,
            agents=tuple(self._agent(name) for name in AGENT_TYPES),
            rules=tuple(_rule(r) for r in self.webhooks.rules),
            otlp_endpoint=self.tracing.otlp_endpoint,
            scrape_seconds=self.scrape_seconds,
            remote_write=self.monitoring.remote_write,
            alert_receivers=tuple(
                model.AlertReceiver(r.kind, r.channel, r.to, r.sender, r.smarthost, r.username)
                for r in self.monitoring.receivers
            ),
            grafana_source=_apt_source(self.monitoring.grafana),
        )

    def _agent_share_mb(self) -> int:
        """What one task may use: what the services leave, shared among those at once."""
        taken = sum(s.memory_mb for s in self.limits().values())
        left = self.machine.memory_mb - RESERVED_MB - taken
        return max(left // self.agents.concurrency, AGENT_MB_LEAST)

    def _agent(self, name: str) -> model.Agent:
        said = self.agents.types.get(name) or AgentSection.model_validate({})
        return model.Agent(
            agent_type=name,
            command=said.command,
            seconds=said.seconds,
            memory_mb=said.memory_mb or self._agent_share_mb(),
            cpu_percent=said.cpu_percent,
            tasks=said.tasks,
            network=self.network.egress if said.network is None else said.network,
            environment=dict(sorted(said.environment.items())),
            credentials=dict(sorted(said.credentials.items())),
        )

    @model_validator(mode="after")
    def _agents_fit(self) -> Profile:
        share = self._agent_share_mb()
        for name, agent in self.agents.types.items():
            at: Keys = ("agents", "types", name)
            if (agent.memory_mb or 0) > share:
                raise _wrong(
                    f"{agent.memory_mb} MB are more than the services leave for a task, {share} MB",
                    f"write at most '{share} MB', or a larger machine.memory",
                    (*at, "memory"),
                )
            if agent.network and not self.network.egress:
                raise _wrong(
                    "the machine itself reaches nothing outside",
                    "write network.egress: true as well, or false here",
                    (*at, "network"),
                )
        return self

    @model_validator(mode="after")
    def _collector_is_reached(self) -> Profile:
        endpoint = self.tracing.otlp_endpoint or ""
        inside = urllib.parse.urlsplit(endpoint).hostname in (None, "127.0.0.1", "localhost")
        if not inside and not self.network.egress:
            raise _wrong(
                "the machine itself reaches nothing outside",
                "write network.egress: true as well, or a collector in the machine",
                ("tracing", "otlp_endpoint"),
            )
        return self

    def nix_settings(self) -> model.NixSettings:
        """How the nix engine builds this profile."""
        return model.NixSettings(
            max_jobs=self.nix.max_jobs,
            cores=self.nix.cores,
            substituters=self.nix.substituters,
            trusted_public_keys=self.nix.trusted_public_keys,
        )


def _rule(said: RuleSection) -> model.WebhookRule:
    return model.WebhookRule(
        name=said.name,
        agent_type=said.agent_type,
        prompt=said.prompt,
        sources=said.sources,
        types=said.types,
        conditions=tuple(
            model.RuleCondition(
                path=c.path,
                equals=json.dumps(c.equals) if c.has_equals else None,
                matches=c.matches,
                negate=c.negate,
            )
            for c in said.conditions
        ),
        priority=said.priority,
        max_attempts=said.max_attempts,
        command=said.command,
    )


def _apt_source(said: GrafanaSection) -> model.AptSource | None:
    if not (said.apt_source and said.apt_key):
        return None
    return model.AptSource(line=said.apt_source, key=said.apt_key)


def _forward(section: ForwardSection | None) -> model.LogForward | None:
    return None if section is None else model.LogForward(url=section.url, ca=section.ca)


# --- choosing one ----------------------------------------------------------------------------


def shipped() -> tuple[str, ...]:
    """The names of the profiles that come with ravectl, the default first."""
    names = {p.stem for p in files.find_data("profiles").glob("*.yaml")}
    return tuple(sorted(names, key=lambda name: (name != DEFAULT, name)))


def select(flag: str | None, env: Mapping[str, str], workspace_file: Path | None) -> Profile:
    """The profile that is asked for: by `flag`, else by the environment's SAFE or FULL_PIPE,
    else by the workspace's file, else safe.

    Raises UsageError when the environment contradicts itself, else as `load`.
    """
    name = flag or _from_environment(env)
    if name is None and workspace_file is not None:
        return _validate(_extended(_read(workspace_file)))
    return load(name or DEFAULT, workspace_file)


def load(name: str, workspace_file: Path | None) -> Profile:
    """The profile `name`: a shipped one, or the one that the workspace's file defines.

    Where the workspace's file extends the shipped profile `name`, what it overrides holds.
    `workspace_file` is None where there is none. Raises UsageError when there is no such
    profile, ProfileError when a file is missing or wrong.
    """
    over = _read(workspace_file) if workspace_file is not None else None
    if over is not None and name in (over.data.get("name"), over.data.get("extends")):
        return _validate(_extended(over))
    known = list(shipped())
    if name in known:
        return _validate(_shipped(name))
    if over is not None and re.fullmatch(NAME, own := str(over.data.get("name"))):
        known.append(own)
    raise UsageError(
        f"there is no profile {_show(name)}",
        _nearest(name, known) or f"the profiles are {', '.join(known)}",
    )


def _from_environment(env: Mapping[str, str]) -> str | None:
    chosen = [n for n in ("SAFE", "FULL_PIPE") if _is_on(n, env.get(n, ""))]
    if len(chosen) == 2:
        raise UsageError(
            "SAFE and FULL_PIPE are both set, but a machine has one profile",
            "unset one of them, or say --safe or --full-pipe",
        )
    return chosen[0].lower().replace("_", "-") if chosen else None


def _is_on(name: str, value: str) -> bool:
    word = value.strip().lower()
    if word in ("", "0", "false", "no", "off"):
        return False
    if word in ("1", "true", "yes", "on"):
        return True
    raise UsageError(f"{name}={_show(value)} is neither on nor off", f"set {name}=1 or {name}=0")


# --- reading, with lines ---------------------------------------------------------------------


@dataclass
class _Document:
    """The plain values of a YAML file and where each key stands."""

    file: Path
    data: dict[str, Any]
    places: dict[Keys, tuple[Path, int]] = field(default_factory=dict)


def _extended(over: _Document) -> _Document:
    """The workspace's document, laid over the shipped profile that it extends."""
    base_name = over.data.pop("extends", None)
    names = shipped()
    if base_name is None and ("extends",) not in over.places:
        base = _Document(over.file, {})
    elif base_name in names:
        base = _shipped(base_name)
    else:
        raise _error(
            over,
            ("extends",),
            f"there is no profile {_show(base_name)} to extend"
            if isinstance(base_name, str)
            else f"{_show(base_name)} is not the name of a profile",
            _nearest(base_name, names) or f"extend one of {', '.join(names)}",
        )
    if over.data.get("name") in [n for n in names if n != base_name]:
        raise _error(
            over,
            ("name",),
            f"{_show(over.data['name'])} is another profile, which ravectl ships",
            "choose another name, or leave it out",
        )
    return _Document(over.file, _merge(base.data, over.data), {**base.places, **over.places})


def _shipped(name: str) -> _Document:
    return _read(files.find_data("profiles") / f"{name}.yaml")


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings merge; lists and scalars of `over` replace."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read(path: Path) -> _Document:
    text = _text(path)
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        document = _Document(path, {})
        if node is None or node.tag == _TAG + "null":
            raise _at(path, 1, "the file is empty", f"write at least: extends: {DEFAULT}")
        if not isinstance(node, yaml.MappingNode):
            raise _at(path, _line(node), "a profile is made of keys", "write lines of `key: value`")
        document.data = _plain(loader, node, (), document)
    except _RefusedError as e:
        raise _at(path, e.line, str(e), e.remedy) from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark
        line = mark.line + 1 if mark is not None else 1
        problem = " ".join(str(e.problem or e.context).split())
        raise _at(path, line, f"not YAML: {problem}", SYNTAX) from None
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise _at(
            path, line, f"not text: character #x{ord(text[e.position]):04x}", SYNTAX
        ) from None
    except (ValueError, OverflowError, LookupError):
        # PyYAML lets these through for an escape or a number that is none
        line = loader.line + 1 if loader else 1
        raise _at(path, line, "not YAML: an escape or number that is none", SYNTAX) from None
    return document


SYNTAX = "mend that line; write texts with special characters in quotes"


def _text(path: Path) -> str:
    """The file as text; ProfileError when it is no regular, readable, small UTF-8 file."""
    try:
        if path.is_symlink() and not path.exists():
            raise ProfileError(f"{path} is a link to nothing", f"see where it leads: ls -l {path}")
        if not path.exists():
            raise ProfileError(f"there is no file {path}", "make one: ravectl init")
        if not path.is_file():
            raise ProfileError(f"{path} is not a file", "remove it, then: ravectl init")
        with path.open("rb") as f:
            raw = f.read(MAX_BYTES + 1)
    except OSError as e:
        raise ProfileError(
            f"{path} cannot be read: {e.strerror}", f"make it readable: chmod u+r {path}"
        ) from None
    if len(raw) > MAX_BYTES:
        raise ProfileError(
            f"{path} is larger than {MAX_BYTES // 2**10} KB, no profile is",
            "write only what differs from the profile that it extends",
        )
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise _at(path, line, "not text in UTF-8", "save the file as UTF-8") from None


class _RefusedError(Exception):
    def __init__(self, line: int, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.line = line
        self.remedy = remedy


class _Loader(yaml.SafeLoader):
    """Nodes with their lines; no aliases (a few lines of them can stand for gigabytes)."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(line, "aliases are not known here", "write the value out")
        if self.depth > MAX_DEPTH:
            raise _RefusedError(line, "nested too deeply", f"see {REFERENCE} for the keys")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_TAG = "tag:yaml.org,2002:"


def _plain(loader: _Loader, node: yaml.Node, path: Keys, document: _Document) -> Any:
    """`node` as plain values; notes the line of each."""
    document.places[path] = (document.file, _line(node))
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return _mapping(loader, node, path, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [_plain(loader, n, (*path, i), document) for i, n in enumerate(node.value)]
    tag = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and tag in ("null", "bool", "int", "float"):
        value = loader.construct_object(node)
        huge = isinstance(value, int) and abs(value) > 2**63
        return str(node.value) if huge else value
    if isinstance(node, yaml.ScalarNode) and tag in ("str", "timestamp", "value", "merge"):
        return str(node.value)
    raise _RefusedError(_line(node), "the tag of this value is not known here", "leave the tag out")


def _mapping(
    loader: _Loader, node: yaml.MappingNode, path: Keys, document: _Document
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _RefusedError(_line(key_node), "a key is a word", "write lines of `key: value`")
        key = str(key_node.value)
        here = (*path, key)
        if key in values:
            first = document.places[here][1]
            raise _RefusedError(
                _line(key_node),
                f"{_dotted(here)}: is there already, in line {first}",
                "remove one of them",
            )
        values[key] = _plain(loader, value_node, here, document)
        document.places[here] = (document.file, _line(key_node))
    return values


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


# --- saying what is wrong --------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """One thing that is wrong: the key (or several that may be to blame), what, what to do."""

    keys: tuple[Keys, ...]
    cause: str
    remedy: str


def _validate(document: _Document) -> Profile:
    try:
        return Profile.model_validate(document.data)
    except ValidationError as e:
        details = e.errors(include_url=False)
    missing: dict[Keys, list[str]] = {}
    for d in details:
        if d["type"] == "missing":
            missing.setdefault(d["loc"][:-1], []).append(str(d["loc"][-1]))
    # what is below a mistyped service is of no interest
    mistyped = {_keys(d) for d in details if _keys(d) != d["loc"]}
    problems = [_problem(d) for d in details if d["type"] != "missing"]
    problems.sort(key=lambda p: _place(document, p.keys[0])[1])
    # last, as a mistyped key is both unknown and missing
    problems += [_missing(at, names) for at, names in missing.items() if at not in mistyped]
    first, *others = [_report(document, p) for p in problems]
    first.details = "\n".join(f"{e.message}\n  {e.hint}" for e in others)
    raise first


def _missing(at: Keys, names: list[str]) -> _Problem:
    verb, what = ("is", "it") if len(names) == 1 else ("are", "them")
    remedy = f"add {what}" if at else f"add {what}, or start from another: extends: {DEFAULT}"
    return _Problem((at,), f"{', '.join(names)} {verb} missing", remedy)


def _report(document: _Document, problem: _Problem) -> ProfileError:
    own = (k for k in problem.keys if _place(document, k)[0] == document.file)
    return _error(document, next(own, problem.keys[0]), problem.cause, problem.remedy)


def _problem(details: ErrorDetails) -> _Problem:
    keys = _keys(details)
    if details["type"] == "rave":
        context = details["ctx"]
        at = tuple(keys + tuple(k) for k in context["at"]) or (keys,)
        return _Problem(at, context["cause"], context["remedy"])
    value = _show(details["input"])
    known, below = _known(keys[:-1]), ", ".join(_known(keys))
    match details["type"]:
        case "extra_forbidden":
            cause, remedy = "unknown key", _nearest(keys[-1], known)
            remedy = remedy or f"remove it; the keys here are {', '.join(known)}"
        case "model_type" | "dict_type":
            cause, remedy = f"{value} is no group of keys", f"write below it: {below}"
            if details["input"] is None:
                cause = "is empty"
        case "tuple_type":
            cause, remedy = f"{value} is not a list", f"write a list; {REFERENCE} shows one"
        case "bool_type":
            cause = f"{value} is neither true nor false"
            remedy = _nearest(details["input"], ("true", "false")) or "write true or false"
        case "int_type":
            cause, remedy = f"{value} is not a whole number", "write digits, without quotes"
        case "string_type":
            cause, remedy = f"{value} is not a text", "write it in quotes"
        case _:
            cause, remedy = f"{value}: {details['msg']}", f"see {REFERENCE}"
    return _Problem((keys,), cause, remedy)


def _keys(details: ErrorDetails) -> Keys:
    keys = details["loc"]
    # pydantic's mark for: not the value but the key is wrong
    return keys[:-1] if details["type"] == "rave" and keys[-1:] == ("[key]",) else keys


def _known(keys: Keys) -> tuple[str, ...]:
    """The keys that a profile may have below `keys`."""
    kind: Any = Profile
    for key in keys:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = kind.model_fields.items()
            kind = next((f.annotation for n, f in fields if key == (f.alias or n)), None)
        else:
            kind = next((a for a in reversed(get_args(kind)) if a is not Ellipsis), None)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _aliases(kind)
    return (*SERVICE_NAMES, *OPTIONAL_SERVICES) if get_origin(kind) is dict else ()


def _aliases(section: type[BaseModel]) -> tuple[str, ...]:
    return tuple(f.alias or name for name, f in section.model_fields.items())


def _place(document: _Document, keys: Keys) -> tuple[Path, int]:
    """File and line of `keys`, or of the nearest key above that is written anywhere."""
    for end in range(len(keys), -1, -1):
        if keys[:end] in document.places:
            return document.places[keys[:end]]
    return document.file, 1


def _error(document: _Document, keys: Keys, cause: str, remedy: str) -> ProfileError:
    file, line = _place(document, keys)
    return _at(file, line, f"{_dotted(keys)}: {cause}" if keys else cause, remedy)


def _at(file: Path, line: int, cause: str, remedy: str) -> ProfileError:
    return ProfileError(f"{file}:{line}: {cause}", remedy)


def _dotted(keys: Keys) -> str:
    """`router.providers[0].url`; a key that is no plain word is quoted."""
    text = ""
    for key in keys:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            plain = re.fullmatch(r"[\w-]{1,40}", key, re.ASCII)
            text += f".{key if plain else _show(key)}"
    return text.removeprefix(".")


def _show(value: object) -> str:
    """A value as a person would recognize it: on one line, not long, printable."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return ascii(value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "...")
    return str(value)


def _nearest(word: object, known: Iterable[str], form: str = "'{}'") -> str:
    """A question that names the nearest of `known`; empty when nothing is near."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(word)[:MAX_SHOWN].lower(), by_lower, n=1)
    return f"did you mean {form.format(by_lower[near[0]])}?" if near else ""
