"""The configuration file, /etc/rave/dispatcher.yaml: what it may say, and what follows.

Rendered from the Plan; a person may write it too. An unknown key is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rave_dispatcher.domain.rules import MAX_NAME, Condition, Rule, RuleError
from rave_dispatcher.domain.tasks import MAX_PRIORITY, MIN_PRIORITY, AgentType, Backoff


class ConfigError(Exception):
    """The configuration cannot be used; the text names the file and the key."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Listen(_Part):
    """Where requests come in, unless systemd hands over a socket."""

    host: str = "127.0.0.1"
    port: int = Field(default=3001, ge=0, le=65535)


class StoreConfig(_Part):
    """The event store."""

    path: Path = Path("/var/lib/rave-dispatcher/events.db")
    retention_days: float = Field(default=7, gt=0)
    reserve_mb: float = Field(default=64, ge=0)  # kept free for what is under way


class Source(_Part):
    """A sender of webhooks: how it signs, and the file of its secret below `secrets_dir`."""

    scheme: Literal["gitlab", "github", "standard"]
    secret: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class Limits(_Part):
    """What is taken of a client."""

    body_bytes: int = Field(default=5 * 2**20, gt=0)
    body_seconds: float = Field(default=10, gt=0)
    header_bytes: int = Field(default=32 * 2**10, gt=0)
    header_seconds: float = Field(default=10, gt=0)
    depth: int = Field(default=64, gt=0, le=150)
    connections: int = Field(default=512, gt=0)
    requests_per_second: float = Field(default=100, gt=0)  # of one client
    burst: int = Field(default=400, gt=0)


class ConditionConfig(_Part):
    """See domain.rules.Condition."""

    path: str
    equals: Any = None
    matches: str | None = None
    negate: bool = False


class RuleConfig(_Part):
    """See domain.rules.Rule."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    agent_type: AgentType
    prompt: str
    sources: tuple[str, ...] = ("*",)
    types: tuple[str, ...] = ("*",)
    conditions: tuple[ConditionConfig, ...] = ()
    priority: int = Field(default=5, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    max_attempts: int | None = Field(default=None, ge=1, le=100)
    command: tuple[str, ...] | None = Field(default=None, min_length=1)  # not the agent's own

    def rule(self) -> Rule:
        """The rule; RuleError when it can never work."""
        conditions = tuple(
            Condition(c.path, c.equals, c.matches, c.negate, "equals" in c.model_fields_set)
            for c in self.conditions
        )
        return Rule(
            name=self.name, agent_type=self.agent_type, prompt=self.prompt, sources=self.sources,
            types=self.types, conditions=conditions, priority=self.priority,
            max_attempts=self.max_attempts,
        )  # fmt: skip


CredentialName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
SecretName = Annotated[str, Field(pattern=r"^[a-z0-9-]+/[a-z0-9-]+$")]


class Agent(_Part):
    """What does the tasks of a type: a command (never a shell's line) and its limits."""

    command: tuple[str, ...] = Field(min_length=1)
    seconds: int = Field(default=1800, gt=0)
    memory_mb: int = Field(default=512, gt=0)
    cpu_percent: int = Field(default=100, gt=0)
    processes: int = Field(default=128, gt=0)
    network: bool = False  # beyond this machine
    environment: dict[str, str] = {}
    # a file's name in $CREDENTIALS_DIRECTORY of the task, and the secret that it is to hold
    credentials: dict[CredentialName, SecretName] = {}


class Tasks(_Part):
    """How tasks are run."""

    concurrency: int = Field(default=1, ge=1, le=64)
    lease_seconds: float = Field(default=30, ge=1)
    max_attempts: int = Field(default=3, ge=1, le=100)
    backoff_seconds: float = Field(default=5, gt=0)
    backoff_most_seconds: float = Field(default=600, gt=0)
    max_output: int = Field(default=1_000_000, gt=0)

    def backoff(self) -> Backoff:
        """The domain's."""
        return Backoff(int(self.backoff_seconds * 1000), 2.0, int(self.backoff_most_seconds * 1000))


class RunnerConfig(_Part):
    """What runs agents: transient units of systemd, or plain processes for development."""

    kind: Literal["systemd", "unconfined"] = "systemd"
    socket: Path = Path("/run/rave-dispatcher/launcher.sock")
    user: str = "agent"
    home: Path = Path("/home/agent")
    cgroup: Path | None = None  # of `unconfined`: a cgroup v2 folder that we may write


class Tracing(_Part):
    """Where spans go beside the store."""

    otlp_endpoint: str | None = None

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError("must be an http(s) URL, such as http://127.0.0.1:4318/v1/traces")
        return value


class ConsoleUnit(_Part):
    """A service as the console lists it, by the name that its metrics have too."""

    name: str
    title: str
    unit: str


class Link(_Part):
    """A way from the console to another tool behind the same ingress."""

    title: str
    # of this origin, so no other scheme
    href: Annotated[str, Field(pattern=r"^/([^/\s\\][^\s\\]*)?$")]
    about: str = ""


class Console(_Part):
    """The console page. Without a socket, configured or handed over by systemd, there is none."""

    socket: Path | None = None
    machine: str = "this machine"
    prometheus: Annotated[str, Field(pattern=r"^http://[^/\s]+$")] = "http://127.0.0.1:9090"
    scrape_seconds: float = Field(default=15, gt=0)
    units: tuple[ConsoleUnit, ...] = ()
    links: tuple[Link, ...] = ()


class Config(_Part):
    """All of it."""

    listen: Listen = Listen()
    store: StoreConfig = StoreConfig()
    secrets_dir: Path = Path("/run/secrets/dispatcher")
    api_token: str = "api-token"  # noqa: S105 - a file's name
    alerts_token: str = "alerts-token"  # noqa: S105 - opens /alerts and nothing else
    sources: dict[str, Source] = {
        "gitlab": Source(scheme="gitlab", secret="gitlab-token"),  # noqa: S106
        "github": Source(scheme="github", secret="github-secret"),  # noqa: S106
        "standard": Source(scheme="standard", secret="standard-secret"),  # noqa: S106
    }
    limits: Limits = Limits()
    rules: tuple[RuleConfig, ...] = ()
    agents: dict[AgentType, Agent] = {}
    tasks: Tasks = Tasks()
    runner: RunnerConfig = RunnerConfig()
    tracing: Tracing = Tracing()
    console: Console = Console()

    @field_validator("rules")
    @classmethod
    def _work(cls, value: tuple[RuleConfig, ...]) -> tuple[RuleConfig, ...]:
        for row in value:
            try:
                row.rule()
            except RuleError as e:
                raise ValueError(f"rule {row.name!r}: {e}") from None
        names = [row.name for row in value]
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"rule {min(twice)!r} is there twice")
        return value

    def has_rule(self, name: str) -> bool:
        """Whether there is a rule of this name."""
        return any(r.name == name for r in self.rules)

    def agent(self, agent_type: str, rule: str | None) -> Agent | None:
        """What does a task of a type that a rule made (None: that a person made); None: nothing.

        A rule's own command replaces that of the type, whose limits stay. Of a rule that is gone
        the command is not known: that of the type was not meant for its prompt.
        """
        if rule is not None and not self.has_rule(rule):
            return None
        found = self.agents.get(AgentType(agent_type)) if agent_type in set(AgentType) else None
        own = next((r.command for r in self.rules if r.name == rule), None)
        if own is None:
            return found
        return found.model_copy(update={"command": own}) if found else Agent(command=own)


def load(path: Path) -> Config:
    """The configuration in a file. Raises ConfigError."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read: {getattr(e, 'strerror', None) or e}") from None
    except RecursionError:
        raise ConfigError(f"{path}: it nests too deeply") from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: {getattr(e, 'problem', None) or 'not YAML'}") from None
    try:
        return Config.model_validate(document or {})
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ConfigError(f"{path}: {key}: {first['msg']}") from None
