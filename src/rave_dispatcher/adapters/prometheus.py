"""Metrics for Prometheus; exemplars lead from a histogram to a trace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rave_dispatcher import __version__
from rave_dispatcher.application.ports import Figures
from rave_dispatcher.domain.metrics import Metric
from rave_dispatcher.domain.tasks import AgentType, Outcome

_WEBHOOK_FAILURES = ("400", "401", "404", "413", "415", "429", "500", "503", "507")
_AUTH_FAILURES = ("api-token", "alerts-token", "no-secret", "timestamp", "signature", "missing")
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
_SLOW = (0.1, 0.5, 1, 5, 15, 30, 60, 120, 300, 600, 1200, 1800, 3600)


class Pushed(Collector):
    """The last value of each series that was pushed."""

    def __init__(self) -> None:
        self._last: dict[object, Metric] = {}

    def take(self, metric: Metric) -> None:
        """Keep a value unless a newer one is there."""
        known = self._last.get(metric.series)
        if known is None or known.timestamp_ms <= metric.timestamp_ms:
            self._last[metric.series] = metric

    def collect(self) -> Iterable[Family]:
        """As gauges."""
        families: dict[str, Family] = {}
        for metric in self._last.values():
            family = families.setdefault(metric.name, Family(metric.name, "pushed", "gauge"))
            family.add_sample(metric.name, dict(metric.labels), metric.value)
        return families.values()


class Metrics:
    """The observer port, and the page that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self._pushed = Pushed()
        r.register(self._pushed)
        ns = "rave_dispatcher"
        Gauge(f"{ns}_build_info", "Version", ["version"], registry=r).labels(__version__).set(1)
        self._requests = Counter(
            f"{ns}_http_requests", "Requests", ["method", "route", "status"], registry=r
        )
        # here and below: a series that began with the failures would be no increase of anything
        for status in _WEBHOOK_FAILURES:
            self._requests.labels("POST", "/webhooks/{source}", status)
        self._seconds = Histogram(
            f"{ns}_http_request_duration_seconds", "Time until the answer", ["route"],
            buckets=_FAST, registry=r,
        )  # fmt: skip
        self._console = Counter(
            f"{ns}_console_requests", "Requests of the console page", ["status"], registry=r
        )
        self._in_flight = Gauge(f"{ns}_http_requests_in_flight", "Under way", registry=r)
        self._received = Counter(
            f"{ns}_events_received", "Verified deliveries", ["source"], registry=r
        )
        self._duplicates = Counter(
            f"{ns}_events_duplicate", "Deliveries of events that were there", ["source"], registry=r
        )
        self._refused = Counter(
            f"{ns}_webhooks_refused", "Refused deliveries", ["source", "reason"], registry=r
        )
        self._auth = Counter(f"{ns}_auth_failures", "Requests by who may not", ["kind"], registry=r)
        for kind in _AUTH_FAILURES:
            self._auth.labels(kind)
        self._limited = Counter(f"{ns}_rate_limited", "Requests beyond the rate", registry=r)
        self._latency = Histogram(
            f"{ns}_event_processing_seconds", "From receipt until the rules saw it",
            buckets=_FAST, registry=r,
        )  # fmt: skip
        self._processed = Counter(
            f"{ns}_events_processed", "Events that the rules saw", ["became_task"], registry=r
        )
        self._rules_failed = Counter(
            f"{ns}_rules_failed", "Events that the rules failed on: no task", registry=r
        )
        self._attempts = Counter(
            f"{ns}_task_attempts", "Attempts at tasks", ["agent_type", "outcome"], registry=r
        )
        for kind, outcome in itertools.product(AgentType, Outcome):
            self._attempts.labels(kind.value, outcome.value)
        self._durations = Histogram(
            f"{ns}_task_duration_seconds", "Time of an attempt", ["agent_type"], buckets=_SLOW,
            registry=r,
        )  # fmt: skip
        self._retries = Counter(f"{ns}_task_retries", "Retried", ["agent_type"], registry=r)
        self._gauges(ns, r)

    def _gauges(self, ns: str, r: CollectorRegistry) -> None:
        self._queue = Gauge(f"{ns}_queue_depth", "What waits", ["state"], registry=r)
        self._age = Gauge(f"{ns}_queue_oldest_seconds", "Age of the oldest", ["state"], registry=r)
        self._store = Gauge(f"{ns}_store_bytes", "Size of the event store", registry=r)
        self._free = Gauge(f"{ns}_store_free_bytes", "Space left for it", registry=r)
        self.corrupt = Gauge(f"{ns}_store_corrupt", "1: the store is damaged", registry=r)
        self._coverage = Gauge(
            f"{ns}_trace_coverage_ratio", "Of the last hour's tasks, with a complete trace",
            registry=r,
        )  # fmt: skip
        self._dedup = Gauge(
            f"{ns}_deduplication_ratio", "Of all deliveries, duplicates", registry=r
        )
        self._counts = [0, 0]

    def page(self, accept: str) -> tuple[bytes, str]:
        """All metrics, in the format asked for; exemplars are in OpenMetrics only."""
        encoder, content_type = choose_encoder(accept)
        return encoder(self.registry), content_type

    def answered(self, method: str, route: str, status: int, seconds: float, trace: str) -> None:
        """A request was answered."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds, {"trace_id": trace} if trace else None)

    def console_answered(self, status: int) -> None:
        """A request of the console page was answered."""
        self._console.labels(str(status)).inc()

    def in_flight(self, change: int) -> None:
        """A request began or ended."""
        self._in_flight.inc(change)

    def auth_failed(self, kind: str) -> None:
        """A request by who may not."""
        self._auth.labels(kind).inc()

    def rate_limited(self) -> None:
        """A request beyond the rate."""
        self._limited.inc()

    def received(self, source: str, duplicate: bool) -> None:
        """A delivery was stored, or was there."""
        self._received.labels(source).inc()
        self._counts[0] += 1
        if duplicate:
            self._duplicates.labels(source).inc()
            self._counts[1] += 1

    def refused(self, source: str, reason: str) -> None:
        """A delivery was refused. `source` is one that is configured."""
        self._refused.labels(source, reason).inc()

    def processed(self, seconds: float | None, became_task: bool, trace_id: str) -> None:
        """The rules saw an event."""
        self._processed.labels(str(became_task).lower()).inc()
        if seconds is not None:
            self._latency.observe(seconds, {"trace_id": trace_id})

    def rules_failed(self) -> None:
        """The rules failed on an event, or took too long."""
        self._rules_failed.inc()

    def task_ended(
        self, agent_type: str, outcome: str, seconds: float | None, trace_id: str
    ) -> None:
        """An attempt at a task ended."""
        self._attempts.labels(agent_type, outcome).inc()
        if seconds is not None:
            self._durations.labels(agent_type).observe(seconds, {"trace_id": trace_id})

    def task_retried(self, agent_type: str) -> None:
        """A task will be tried again."""
        self._retries.labels(agent_type).inc()

    def pushed(self, metric: Metric) -> None:
        """A metric was pushed."""
        self._pushed.take(metric)

    def gauge(self, figures: Figures, wall_ms: int, coverage: tuple[int, int]) -> None:
        """How full things are now."""
        for state in ("pending", "running", "failed", "unprocessed"):
            self._queue.labels(state).set(getattr(figures, state))
        since = figures.oldest_unprocessed_ms
        unseen = 0 if since is None else max(wall_ms - since, 0)
        for state, age in (("pending", figures.longest_wait_ms), ("unprocessed", unseen)):
            self._age.labels(state).set(age / 1000)
        self._store.set(figures.store_bytes)
        self._free.set(figures.free_bytes)
        complete, every = coverage
        self._coverage.set(complete / every if every else 1.0)
        all_of_them, duplicates = self._counts
        self._dedup.set(duplicates / all_of_them if all_of_them else 0.0)
