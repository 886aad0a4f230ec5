"""The data contract of API v1: unknown fields are refused on input, and kept out of output."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints

from rave_dispatcher.domain import events, metrics, tasks
from rave_dispatcher.domain.rules import MAX_PROMPT

T = TypeVar("T")

TraceId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
_UUID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
Uuid = Annotated[str, StringConstraints(pattern=_UUID)]
# what SQLite can hold as text: no surrogates (pydantic refuses them) and no NUL
_TEXT = r"^[^\x00]*$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", use_enum_values=False)


class TaskMetrics(_Model):
    """What a task used, as its cgroup counted; null where that could not be counted."""

    duration_ms: int
    memory_usage_mb: float | None
    cpu_usage_percent: float | None


class AgentTask(_Model):
    """A task for an agent."""

    task_id: Uuid
    trace_id: TraceId
    agent_type: tasks.AgentType
    status: tasks.Status
    created_at: AwareDatetime
    completed_at: AwareDatetime | None = None
    metrics: TaskMetrics | None = None
    # beyond the contract's core: what a person wants to know of a task
    project: str
    priority: int
    attempt: int
    max_attempts: int
    outcome: tasks.Outcome | None = None
    detail: str = ""
    event_uuid: Uuid | None = None
    cancel_requested: bool = False


class WebhookEvent(_Model):
    """An event as it was received."""

    event_uuid: Uuid
    event_type: str
    timestamp: AwareDatetime
    payload: Any
    signature: str
    processed: bool = False
    task_id: Uuid | None = None
    trace_id: TraceId
    source: str
    project: str


class Metric(_Model):
    """A measured value."""

    metric_name: Annotated[str, Field(max_length=100)]
    value: Annotated[float, Field(allow_inf_nan=False)]
    timestamp: AwareDatetime
    labels: dict[str, Annotated[str, StringConstraints(pattern=_TEXT)]] = {}
    trace_id: TraceId | None = None


class MetricBatch(_Model):
    """Metrics that are kept all or none."""

    metrics: Annotated[list[Metric], Field(min_length=1, max_length=500)]


class NewTask(_Model):
    """A task to be done."""

    agent_type: tasks.AgentType
    prompt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT, pattern=_TEXT)]
    project: Annotated[
        str, StringConstraints(min_length=1, max_length=events.MAX_PROJECT, pattern=_TEXT)
    ] = events.NO_PROJECT
    priority: Annotated[int, Field(ge=tasks.MIN_PRIORITY, le=tasks.MAX_PRIORITY)] = (
        tasks.DEFAULT_PRIORITY
    )


class Receipt(_Model):
    """What became of a delivery."""

    event_uuid: Uuid
    trace_id: TraceId
    duplicate: bool


class Page(_Model, Generic[T]):
    """A part of a list; `next_cursor` asks for the part that follows."""

    items: list[T]
    next_cursor: str | None = None


class Span(_Model):
    """A piece of work in a trace."""

    trace_id: TraceId
    span_id: str
    parent_id: str | None
    name: str
    start: AwareDatetime
    duration_ms: float
    ok: bool
    attributes: dict[str, Any]


class Ready(_Model):
    """Whether requests can be served, and if not, why."""

    ready: bool
    reasons: list[str] = []


class Problem(_Model):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    trace_id: str = ""
    errors: list[dict[str, Any]] | None = None


def moment(ms: float) -> datetime.datetime:
    """A time as JSON has it."""
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)


def task_out(t: tasks.Task) -> AgentTask:
    """A task as clients see it."""
    return AgentTask(
        task_id=t.task_id, trace_id=t.trace.trace_id, agent_type=t.agent_type, status=t.status,
        created_at=moment(t.created_ms),
        completed_at=None if t.completed_ms is None else moment(t.completed_ms),
        metrics=_metrics_out(t.usage),
        project=t.project, priority=t.priority, attempt=t.attempt, max_attempts=t.max_attempts,
        outcome=t.outcome, detail=t.detail, event_uuid=t.event_uuid,
        cancel_requested=t.cancel_requested,
    )  # fmt: skip


def _metrics_out(usage: tasks.Usage | None) -> TaskMetrics | None:
    if usage is None:
        return None
    return TaskMetrics(
        duration_ms=usage.duration_ms, memory_usage_mb=usage.memory_usage_mb,
        cpu_usage_percent=usage.cpu_usage_percent,
    )  # fmt: skip


def event_json(e: events.Event) -> bytes:
    """An event as clients see it: a WebhookEvent as JSON.

    The payload goes out as it came in: it was read as JSON before it was kept, and parsed again
    it would take thirty times its size.
    """
    rest = WebhookEvent(
        event_uuid=e.event_uuid, event_type=e.event_type, timestamp=moment(e.received_ms),
        payload=None, signature=e.signature, processed=e.processed,
        task_id=e.task_id, trace_id=e.trace.trace_id, source=e.source, project=e.project,
    ).model_dump_json(exclude={"payload"})  # fmt: skip
    return rest[:-1].encode() + b',"payload":' + e.payload + b"}"


def page_json(items: Sequence[bytes], next_cursor: str | None) -> bytes:
    """A Page of what is JSON already."""
    return b'{"items":[%b],"next_cursor":%b}' % (
        b",".join(items), json.dumps(next_cursor).encode(),
    )  # fmt: skip


def metric_in(m: Metric) -> metrics.Metric:
    """A pushed metric as the domain has it."""
    ms = int(m.timestamp.timestamp() * 1000)
    return metrics.Metric(m.metric_name, m.value, ms, m.labels, m.trace_id)
