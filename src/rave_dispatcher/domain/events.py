"""Events: what a sender told us, once, however often it was delivered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_TYPE = 200
MAX_PROJECT = 300
NO_PROJECT = "-"


@dataclass(frozen=True, slots=True)
class Trace:
    """Where in a trace something happened: W3C's trace-id and parent-id, lower-case hex."""

    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class Event:
    """A webhook that was verified. `source` and `delivery_id` together are its identity.

    `signature` says how it was verified; of a shared token only that it was one, never the
    token itself. Times are milliseconds of the epoch.
    """

    event_uuid: str
    source: str
    delivery_id: str
    event_type: str
    project: str
    received_ms: int
    payload: bytes  # as it was signed
    signature: str
    trace: Trace
    processed: bool = False
    task_id: str | None = None


def project_of(payload: Any) -> str:
    """The project that an event belongs to, by what GitLab and GitHub call it."""
    if not isinstance(payload, Mapping):
        return NO_PROJECT
    for outer, inner in (
        ("project", "path_with_namespace"),
        ("repository", "full_name"),
        ("organization", "login"),
        ("group", "group_path"),
    ):
        found = payload.get(outer)
        if isinstance(found, Mapping):
            name = found.get(inner)
            if isinstance(name, str) and name:
                return name[:MAX_PROJECT]
    name = payload.get("project_path") or payload.get("path_with_namespace")
    return name[:MAX_PROJECT] if isinstance(name, str) and name else NO_PROJECT


def type_of(payload: Any) -> str | None:
    """The type that a payload of Standard Webhooks says it is of."""
    kind = payload.get("type") if isinstance(payload, Mapping) else None
    return kind if isinstance(kind, str) else None


def too_deep(body: bytes, payload: Any, most: int) -> bool:
    """Whether JSON nests deeper than `most`. `body` is what `payload` was parsed from."""
    # as many brackets as the limit cannot nest deeper: true of most, and counted in C
    if body.count(b"{") + body.count(b"[") <= most:
        return False
    level = [payload]
    for _ in range(most):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return bool(level)
