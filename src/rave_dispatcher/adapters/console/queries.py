"""What the console asks of Prometheus, and what it makes of the answers. Pure.

Every query is written here: the page names a period and a panel's data, never a query.
A metric that is not there gives no rows, and a point that is not there is None: neither is ever
shown as zero.
"""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rave_dispatcher.config import ConsoleUnit

QUERY_SECONDS = 2  # what Prometheus may take for one
POINTS = 120  # of each series, at most: what a chart of 400 to 800 pixels can show
PERIODS = {"15m": 900, "1h": 3600, "6h": 6 * 3600, "24h": 24 * 3600}  # in seconds
DEFAULT_PERIOD = "1h"
LEAST_OUTCOME_WINDOW = 300  # seconds over which outcomes of tasks are counted
MOST_TEXT = 300  # characters of an alert's texts

# what people and machines ask of the dispatcher; not its health, nor this page
_ASKED = 'route!~"/|/console.*|/healthz|/readyz|/metrics|/openapi.json"'
_SECONDS = f"rave_dispatcher_http_request_duration_seconds_bucket{{{_ASKED}}}"
_ATTEMPTS = "rave_dispatcher_task_attempts_total"


@dataclass(frozen=True)
class Chart:
    """A chart. In `query`, WINDOW is what a rate is taken over, SPAN what counts are made of."""

    key: str
    title: str
    unit: str  # percent, seconds, per-second, count: how the page writes a value
    query: str
    series: Mapping[str, str]  # the value of the label `series` in the answer -> its name


CHARTS = (
    Chart(
        "cpu", "CPU", "percent",
        'label_replace(100 * (1 - avg(rate(node_cpu_seconds_total{mode="idle"}[WINDOW]))), '
        '"series", "used", "", "")',
        {"used": "used"},
    ),
    Chart(
        "memory", "Memory", "percent",
        "label_replace(100 * (1 - max(node_memory_MemAvailable_bytes) / "
        'max(node_memory_MemTotal_bytes)), "series", "used", "", "")',
        {"used": "used"},
    ),
    Chart(
        "disk", "Disk", "percent",
        'label_replace(100 * (1 - max(node_filesystem_avail_bytes{mountpoint="/"}) / '
        'max(node_filesystem_size_bytes{mountpoint="/"})), "series", "used", "", "")',
        {"used": "used"},
    ),
    Chart(
        "requests", "Requests to the dispatcher", "per-second",
        f"sum by (series) (label_replace(rate(rave_dispatcher_http_requests_total{{{_ASKED}}}"
        '[WINDOW]), "series", "${1}xx", "status", "(.).."))',
        {"2xx": "2xx", "3xx": "3xx", "4xx": "4xx", "5xx": "5xx"},
    ),
    Chart(
        "latency", "Response time", "seconds",
        f"label_replace(histogram_quantile(0.99, sum by (le) (rate({_SECONDS}[WINDOW]))), "
        '"series", "p99", "", "") or '
        f"label_replace(histogram_quantile(0.5, sum by (le) (rate({_SECONDS}[WINDOW]))), "
        '"series", "p50", "", "")',
        {"p99": "p99", "p50": "median"},
    ),
    Chart(
        "queue", "Queue", "count",
        "sum by (series) (label_replace(rave_dispatcher_queue_depth"
        '{state=~"pending|running|unprocessed"}, "series", "$1", "state", "(.*)"))',
        {"pending": "waiting", "running": "running", "unprocessed": "events"},
    ),
    Chart(
        "outcomes", "Task attempts", "count",
        f'label_replace(sum(increase({_ATTEMPTS}{{outcome="succeeded"}}[SPAN])), '
        '"series", "succeeded", "", "") or '
        f'label_replace(sum(increase({_ATTEMPTS}{{outcome!~"succeeded|cancelled"}}[SPAN])), '
        '"series", "failed", "", "") or '
        f'label_replace(sum(increase({_ATTEMPTS}{{outcome="cancelled"}}[SPAN])), '
        '"series", "cancelled", "", "")',
        {"succeeded": "succeeded", "failed": "failed", "cancelled": "cancelled"},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The points of time of a chart, in seconds of the epoch; `end` is the last one."""

    start: int
    end: int
    step: int

    @property
    def count(self) -> int:
        """How many points."""
        return (self.end - self.start) // self.step + 1


def grid(period: str, now: float, scrape_seconds: float) -> Grid:
    """The grid of a period of PERIODS that ends now. Aligned, so that points stay as they were;
    no finer than there are values.
    """
    seconds = PERIODS[period]
    step = max(seconds // POINTS, math.ceil(scrape_seconds))
    end = int(now) // step * step
    return Grid(end - seconds // step * step, end, step)


def window(points: Grid, scrape_seconds: float) -> int:
    """What a rate is taken over, in seconds: four scrapes, so that a failed one leaves no gap."""
    return max(points.step, 60, math.ceil(4 * scrape_seconds))


def outcome_window(points: Grid) -> int:
    """What outcomes are counted over, in seconds."""
    return max(points.step, LEAST_OUTCOME_WINDOW)


def chart_path(chart: Chart, points: Grid, scrape_seconds: float) -> str:
    """The request for a chart's data."""
    query = chart.query.replace("WINDOW", f"{window(points, scrape_seconds)}s")
    query = query.replace("SPAN", f"{outcome_window(points)}s")
    return "/api/v1/query_range?" + urllib.parse.urlencode(
        {"query": query, "start": points.start, "end": points.end, "step": points.step,
         "timeout": f"{QUERY_SECONDS}s"}
    )  # fmt: skip


def _instant(query: str) -> str:
    return "/api/v1/query?" + urllib.parse.urlencode(
        {"query": query, "timeout": f"{QUERY_SECONDS}s"}
    )


def running_path() -> str:
    """The request for which services' units run."""
    return _instant("rave_unit_running")


def answering_path() -> str:
    """The request for which services answer: who scrapes them, and who asks as clients do."""
    # the job that probes is collected from the prober, whatever the probed service does
    return _instant('min by (service) (up{job!="probes"} or probe_success)')


def alerts_path() -> str:
    """The request for the alerts, of which Prometheus itself knows: Alertmanager may be down."""
    return "/api/v1/alerts"


def chart_data(chart: Chart, points: Grid, answer: Any) -> list[dict[str, Any]]:
    """The series of a chart: name and values, None where there is none.

    Raises KeyError, TypeError or ValueError when the answer is not Prometheus'.
    """
    found: dict[str, list[float | None]] = {}
    for row in answer["data"]["result"]:
        values: list[float | None] = [None] * points.count
        for at, text in row["values"]:
            index = round((float(at) - points.start) / points.step)
            if 0 <= index < points.count:
                values[index] = _number(text)
        if any(v is not None for v in values):
            found[row["metric"].get("series", "")] = values
    return [
        {"key": key, "name": name, "values": found[key]}
        for key, name in chart.series.items()
        if key in found
    ]


def _number(text: str) -> float | None:
    value = float(text)
    # NaN is what a quantile of nothing is
    return float(f"{value:.4g}") if math.isfinite(value) else None


def by_service(answer: Any) -> dict[str, float | None]:
    """An instant query's values by the service that they are of."""
    return {
        row["metric"]["service"]: _number(row["value"][1])
        for row in answer["data"]["result"]
        if "service" in row["metric"]
    }


def unit_rows(
    units: Sequence[ConsoleUnit],
    running: Mapping[str, float | None],
    answering: Mapping[str, float | None],
) -> list[dict[str, str]]:
    """Each unit with its state: whether it runs, and whether its service answers."""
    return [
        {"name": u.name, "title": u.title, "unit": u.unit,
         "state": _state(running.get(u.name), answering.get(u.name))}
        for u in units
    ]  # fmt: skip


def _state(runs: float | None, answers: float | None) -> str:
    if runs == 0:
        return "not running"
    if answers == 0:
        return "not answering"
    return "no data" if runs is None and answers is None else "active"


_SEVERITIES = ("critical", "warning")


def alert_rows(answer: Any) -> list[dict[str, Any]]:
    """The alerts, what is worst first."""
    rows = []
    for alert in answer["data"]["alerts"]:
        labels, notes = alert["labels"], alert.get("annotations") or {}
        rows.append(
            {
                "name": str(labels.get("alertname", "alert"))[:MOST_TEXT],
                "severity": str(labels.get("severity", "none"))[:MOST_TEXT],
                "state": "firing" if alert["state"] == "firing" else "pending",
                "since": str(alert["activeAt"])[:40],
                "summary": str(notes.get("summary") or notes.get("description") or "")[:MOST_TEXT],
                "labels": {
                    str(k)[:MOST_TEXT]: str(v)[:MOST_TEXT]
                    for k, v in sorted(labels.items())
                    if k not in ("alertname", "severity")
                },
            }
        )
    return sorted(rows, key=_urgency)


def _urgency(row: Mapping[str, Any]) -> tuple[bool, int, str, str]:
    known = row["severity"] in _SEVERITIES
    rank = _SEVERITIES.index(row["severity"]) if known else len(_SEVERITIES)
    return (row["state"] != "firing", rank, row["since"], row["name"])
