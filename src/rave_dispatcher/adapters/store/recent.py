"""What came last, as a page lists it: without payloads, prompts cut short."""

from __future__ import annotations

import sqlite3
from typing import Any

MOST_TEXT = 200  # characters of what a sender or an agent wrote

_EVENTS = (
    "event_uuid", "source", "event_type", "project", "received_ms", "processed", "task_id",
    "trace_id",
)  # fmt: skip
_TASKS = (
    "task_id", "agent_type", "project", "status", "outcome", "attempt", "max_attempts",
    "created_ms", "completed_ms", "duration_ms", "event_uuid", "trace_id",
)  # fmt: skip

Rows = list[dict[str, Any]]


def recent(c: sqlite3.Connection, limit: int) -> tuple[Rows, Rows]:
    """So many of the newest events, and of the newest tasks."""
    events = c.execute(
        f"SELECT {', '.join(_EVENTS)} FROM events ORDER BY seq DESC LIMIT ?",  # noqa: S608
        (limit,),
    ).fetchall()
    tasks = c.execute(
        f"SELECT {', '.join(_TASKS)}, substr(prompt, 1, {MOST_TEXT}), "  # noqa: S608
        f"substr(detail, 1, {MOST_TEXT}) FROM tasks ORDER BY seq DESC LIMIT ?",
        (limit,),
    ).fetchall()
    return (
        [dict(zip(_EVENTS, row, strict=True)) for row in events],
        [dict(zip((*_TASKS, "prompt", "detail"), row, strict=True)) for row in tasks],
    )
