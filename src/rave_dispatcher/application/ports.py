"""What the use cases need of the outside. Adapters have these forms."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from rave_dispatcher.domain.events import Event, Trace
from rave_dispatcher.domain.metrics import Metric
from rave_dispatcher.domain.queue import Waiting
from rave_dispatcher.domain.tasks import AgentType, Outcome, Status, Task, Usage

T = TypeVar("T")


class Clock(Protocol):
    """Time, of two kinds."""

    def wall_ms(self) -> int:
        """Milliseconds of the epoch, as the machine believes; may jump."""
        ...

    def steady_ms(self) -> int:
        """The same kind of number, which never jumps while the dispatcher runs."""
        ...


class Chance(Protocol):
    """Randomness."""

    def token(self, size: int) -> bytes:
        """So many bytes that nobody can guess."""
        ...

    def fraction(self) -> float:
        """A number in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Verified:
    """What a webhook's headers say, once its signature held."""

    delivery_id: str
    event_type: str | None  # None: the payload says it
    signature: str  # never a shared token itself


class Verifier(Protocol):
    """Signatures over raw bodies."""

    def verify(self, source: str, headers: Mapping[str, str], body: bytes) -> Verified:
        """Raises UnauthenticatedError, MalformedError; NotFoundError for an unknown source."""
        ...


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a delivery: an event, which may have been there before."""

    event_uuid: str
    trace_id: str
    duplicate: bool


@dataclass(frozen=True, slots=True)
class Incoming:
    """An event that no rule has seen yet, without its payload, which may be large."""

    seq: int
    event_uuid: str
    source: str
    event_type: str
    project: str
    received_ms: int
    trace: Trace
    replayed: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What the rules made of an event."""

    event_uuid: str
    task: Task | None


@dataclass(frozen=True, slots=True)
class Figures:
    """How full the store and its queues are."""

    pending: int
    running: int
    failed: int
    unprocessed: int
    longest_wait_ms: int  # of the tasks that might run
    oldest_unprocessed_ms: int | None
    store_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list, and where the next one begins."""

    items: Sequence[T]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events."""

    source: str | None = None
    event_type: str | None = None
    processed: bool | None = None


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks."""

    status: Status | None = None
    agent_type: AgentType | None = None
    project: str | None = None


class Store(Protocol):
    """The event store. What an awaited call did is durable when it returns.

    Raises StorageFullError, StoreError; NotFoundError for what is not there.
    """

    async def add_event(self, event: Event) -> Receipt:
        """Keep an event, unless one of its source and delivery id is there."""
        ...

    async def incoming(self, limit: int) -> list[Incoming]:
        """The oldest events that no rule has seen."""
        ...

    async def payload(self, event_uuid: str) -> bytes:
        """What an event carried."""
        ...

    async def decide(self, decisions: Sequence[Decision]) -> None:
        """Mark events as processed, and keep the tasks that they became, in one step."""
        ...

    async def event(self, event_uuid: str) -> Event:
        """An event."""
        ...

    async def events(self, which: EventFilter, cursor: str | None, limit: int) -> Page[Event]:
        """Events, the newest first."""
        ...

    async def replay_event(self, event_uuid: str) -> Event:
        """Have the rules see an event once more."""
        ...

    async def add_task(self, task: Task) -> None:
        """Keep a new task."""
        ...

    async def task(self, task_id: str) -> Task:
        """A task."""
        ...

    async def tasks(self, which: TaskFilter, cursor: str | None, limit: int) -> Page[Task]:
        """Tasks, the newest first."""
        ...

    async def step(self, task_id: str, change: Callable[[Task], Task]) -> Task:
        """Change a task in one transaction. Passes on what `change` raises."""
        ...

    async def hasten(self, latest_ms: int) -> None:
        """Have no task wait for its next attempt until later than `latest_ms`."""
        ...

    async def waiting(self, now_ms: int) -> list[Waiting]:
        """The task that waits longest, of each project and priority."""
        ...

    async def running(self) -> list[Task]:
        """The tasks that are leased."""
        ...

    async def append_log(self, task_id: str, attempt: int, data: bytes) -> None:
        """Keep a piece of a task's output."""
        ...

    async def log(self, task_id: str, offset: int, limit: int) -> tuple[bytes, int]:
        """A piece of a task's output from `offset`, and how long all of it is."""
        ...

    async def add_metrics(self, metrics: Sequence[Metric]) -> None:
        """Keep pushed metrics."""
        ...

    async def figures(self, now_ms: int) -> Figures:
        """How full it is at `now_ms`, of the clock that tasks wait by."""
        ...

    async def trace_coverage(self, since_ms: int, until_ms: int) -> tuple[int, int]:
        """Of the tasks that ended between: how many have a complete trace, how many there are."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """An attempt at a task, as its runner gets it."""

    task_id: str
    attempt: int
    agent_type: AgentType
    prompt: str
    trace: Trace
    rule: str | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """How an attempt ended."""

    outcome: Outcome
    detail: str
    usage: Usage


class RunnerUnavailableError(Exception):
    """No task can be started now, whichever it is: that is no attempt at this one. The text says
    why, and holds nothing of the task."""


class Runner(Protocol):
    """Runs agents. Cancelling `run` has all that it started end."""

    async def run(self, job: Job, on_output: Callable[[bytes], Awaitable[None]]) -> Ran:
        """Run an agent to its end. Raises RunnerUnavailableError when it could not begin."""
        ...


class Span(Protocol):
    """A piece of work in a trace."""

    @property
    def trace(self) -> Trace:
        """Where its children belong."""
        ...

    def set(self, name: str, value: str | int | float | bool) -> None:
        """Say more about it."""
        ...

    def fail(self, why: str) -> None:
        """It did not do what it should."""
        ...


class Tracer(Protocol):
    """Makes spans."""

    def span(
        self, name: str, parent: Trace | None, attributes: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[Span]:
        """A span that ends with the block."""
        ...


class Observer(Protocol):
    """Counts what happens, for the metrics."""

    def received(self, source: str, duplicate: bool) -> None:
        """A delivery was stored, or was there."""
        ...

    def refused(self, source: str, reason: str) -> None:
        """A delivery was refused."""
        ...

    def processed(self, seconds: float | None, became_task: bool, trace_id: str) -> None:
        """The rules saw an event, so long after it came; None: once more."""
        ...

    def rules_failed(self) -> None:
        """The rules failed on an event, or took too long; it becomes no task."""
        ...

    def task_ended(
        self, agent_type: str, outcome: str, seconds: float | None, trace_id: str
    ) -> None:
        """An attempt at a task ended, after so many seconds where that is known."""
        ...

    def task_retried(self, agent_type: str) -> None:
        """A task will be tried again."""
        ...

    def pushed(self, metric: Metric) -> None:
        """A metric was pushed."""
        ...

    def gauge(self, figures: Figures, wall_ms: int, coverage: tuple[int, int]) -> None:
        """How full things are now."""
        ...


class Log(Protocol):
    """Structured log lines."""

    def info(self, message: str, **fields: object) -> None:
        """Something that went as it should."""
        ...

    def warning(self, message: str, **fields: object) -> None:
        """Something that somebody should look at."""
        ...

    def error(self, message: str, **fields: object) -> None:
        """Something that somebody must look at."""
        ...
