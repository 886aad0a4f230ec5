"""Events and tasks as rows, and back."""

from __future__ import annotations

import base64
import binascii
import functools
from typing import Any

from rave_dispatcher.application.errors import MalformedError
from rave_dispatcher.domain.events import Event, Trace
from rave_dispatcher.domain.tasks import AgentType, Lease, Outcome, Status, Task, Usage

EVENT_COLUMNS = (
    "seq, event_uuid, source, delivery_id, event_type, project, received_ms, payload, signature, "
    "trace_id, span_id, processed, task_id"
)
_EVENT_FIELDS = (
    "event_uuid, source, delivery_id, event_type, project, received_ms, payload, signature, "
    "trace_id, span_id"
)
_TASK_FIELDS = (
    "task_id", "event_uuid", "agent_type", "project", "priority", "prompt", "trace_id", "span_id",
    "status", "attempt", "max_attempts", "created_ms", "not_before_ms", "completed_ms",
    "lease_token", "lease_until_ms", "cancel_requested", "outcome", "detail", "duration_ms",
    "memory_usage_mb", "cpu_usage_percent", "rule",
)  # fmt: skip
TASK_COLUMNS = "seq, " + ", ".join(_TASK_FIELDS)
INSERT_TASK = (
    f"INSERT INTO tasks ({', '.join(_TASK_FIELDS)}) "  # noqa: S608 - names of our own
    f"VALUES ({', '.join('?' * len(_TASK_FIELDS))})"
)
UPDATE_TASK = (
    f"UPDATE tasks SET {', '.join(f'{f} = ?' for f in _TASK_FIELDS)} "  # noqa: S608
    "WHERE task_id = ?"
)


@functools.cache
def insert_events_sql(rows: int) -> str:
    """The statement that keeps so many events, but for those that are there."""
    row = "(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    return (
        f"INSERT INTO events ({_EVENT_FIELDS}) VALUES {', '.join([row] * rows)} "  # noqa: S608
        "ON CONFLICT (delivery_id, source) DO NOTHING"
    )


def event_row(event: Event) -> tuple[Any, ...]:
    """A row of what that takes."""
    return (
        event.event_uuid, event.source, event.delivery_id, event.event_type, event.project,
        event.received_ms, event.payload, event.signature, event.trace.trace_id,
        event.trace.span_id,
    )  # fmt: skip


def event_of(row: tuple[Any, ...]) -> Event:
    """The event in a row of EVENT_COLUMNS."""
    _, uuid, source, delivery, kind, project, received, payload, signature, *rest = row
    trace_id, span_id, processed, task_id = rest
    return Event(
        event_uuid=uuid, source=source, delivery_id=delivery, event_type=kind, project=project,
        received_ms=received, payload=payload, signature=signature,
        trace=Trace(trace_id, span_id), processed=bool(processed), task_id=task_id,
    )  # fmt: skip


def task_row(task: Task) -> tuple[Any, ...]:
    """What INSERT_TASK takes."""
    lease, usage = task.lease, task.usage
    return (
        task.task_id, task.event_uuid, task.agent_type.value, task.project, task.priority,
        task.prompt, task.trace.trace_id, task.trace.span_id, task.status.value, task.attempt,
        task.max_attempts, task.created_ms, task.not_before_ms, task.completed_ms,
        lease.token if lease else None, lease.until_ms if lease else None,
        int(task.cancel_requested), task.outcome.value if task.outcome else None, task.detail,
        usage.duration_ms if usage else None, usage.memory_usage_mb if usage else None,
        usage.cpu_usage_percent if usage else None, task.rule,
    )  # fmt: skip


def task_of(row: tuple[Any, ...]) -> Task:
    """The task in a row of TASK_COLUMNS."""
    r = dict(zip(("seq", *_TASK_FIELDS), row, strict=True))
    lease = Lease(r["lease_token"], r["lease_until_ms"]) if r["lease_token"] else None
    usage = None
    if r["duration_ms"] is not None:
        usage = Usage(r["duration_ms"], r["memory_usage_mb"], r["cpu_usage_percent"])
    return Task(
        task_id=r["task_id"], agent_type=AgentType(r["agent_type"]), prompt=r["prompt"],
        created_ms=r["created_ms"], trace=Trace(r["trace_id"], r["span_id"]),
        project=r["project"], priority=r["priority"], max_attempts=r["max_attempts"],
        event_uuid=r["event_uuid"], status=Status(r["status"]), attempt=r["attempt"],
        not_before_ms=r["not_before_ms"], lease=lease,
        cancel_requested=bool(r["cancel_requested"]),
        outcome=Outcome(r["outcome"]) if r["outcome"] else None, detail=r["detail"],
        completed_ms=r["completed_ms"], usage=usage, rule=r["rule"],
    )  # fmt: skip


def cursor_of(seq: int) -> str:
    """Where the next page begins; opaque to clients."""
    return base64.urlsafe_b64encode(f"v1:{seq}".encode()).decode().rstrip("=")


def seq_of(cursor: str | None) -> int:
    """The inverse of `cursor_of`; of None, what is before everything."""
    if cursor is None:
        return 2**62
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), "-_", validate=True).decode()
        version, _, seq = text.partition(":")
        if version == "v1" and seq.isascii() and seq.isdigit() and len(seq) < 19:
            return int(seq)
    except (binascii.Error, ValueError):
        pass
    raise MalformedError("the cursor is not one that was handed out")
