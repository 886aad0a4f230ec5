"""Metrics that agents and scripts push. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,99}")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,49}")
RESERVED = ("rave_dispatcher_", "process_")  # ours
MAX_LABELS = 10
MAX_LABEL_VALUE = 100
MAX_SERIES = 1000  # names times label values that are kept: pushers must not fill the memory


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured value."""

    name: str
    value: float
    timestamp_ms: int
    labels: Mapping[str, str]
    trace_id: str | None = None

    @property
    def series(self) -> tuple[str, tuple[tuple[str, str], ...]]:
        """What makes it one series with others."""
        return (self.name, tuple(sorted(self.labels.items())))


def fault_of(name: str, labels: Mapping[str, str]) -> str | None:
    """Why Prometheus would not take a metric of this name and labels, or None."""
    if not _NAME.fullmatch(name):
        return "metric_name must match [a-zA-Z_][a-zA-Z0-9_]* and have at most 100 characters"
    if name.startswith(RESERVED):
        return f"metric_name must not begin with one of {', '.join(RESERVED)}"
    if len(labels) > MAX_LABELS:
        return f"there may be at most {MAX_LABELS} labels"
    for label, value in labels.items():
        if not _LABEL.fullmatch(label) or label.startswith("__"):
            return "labels must match [a-zA-Z_][a-zA-Z0-9_]{0,49} and not begin with __"
        if len(value) > MAX_LABEL_VALUE:
            return f"a label's value may have at most {MAX_LABEL_VALUE} characters"
    return None
