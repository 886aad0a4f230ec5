"""CollectMetrics: what was pushed, and how full the queues are."""

from __future__ import annotations

from collections.abc import Sequence

from rave_dispatcher.application.errors import DispatcherError, InvalidError
from rave_dispatcher.application.ports import Clock, Observer, Store
from rave_dispatcher.domain.metrics import MAX_SERIES, Metric, fault_of

COVERAGE_MS = 3_600_000
SETTLED_MS = 30_000  # spans are kept in batches, after what they tell of
AHEAD_MS = 300_000  # that a sender's clock may be
FRESH_MS = 2_000  # figures that are this young are good enough for another scrape


class CollectMetrics:
    """Keeps pushed metrics and refreshes the gauges."""

    def __init__(self, store: Store, clock: Clock, observer: Observer) -> None:
        self._store, self._clock, self._observer = store, clock, observer
        self._series: set[object] = set()
        self._refreshed_ms: int | None = None

    async def push(self, metrics: Sequence[Metric]) -> None:
        """Keep metrics, all of them or none."""
        for metric in metrics:
            if fault := fault_of(metric.name, metric.labels):
                raise InvalidError(fault)
            # it would be taken for the newest for ever
            if metric.timestamp_ms > self._clock.wall_ms() + AHEAD_MS:
                raise InvalidError(f"a timestamp of {metric.name} is ahead of the machine's clock")
        series = {m.series for m in metrics}
        if len(self._series | series) > MAX_SERIES:
            raise InvalidError(f"there may be at most {MAX_SERIES} series of pushed metrics")
        await self._store.add_metrics(metrics)
        self._series |= series
        for metric in metrics:
            self._observer.pushed(metric)

    async def refresh(self) -> None:
        """Bring the gauges up to date, unless they just were."""
        now = self._clock.steady_ms()
        if self._refreshed_ms is not None and now - self._refreshed_ms < FRESH_MS:
            return
        try:
            figures = await self._store.figures(now)
            wall = self._clock.wall_ms()
            coverage = await self._store.trace_coverage(wall - COVERAGE_MS, wall - SETTLED_MS)
        except DispatcherError:
            return  # the old figures, and the error shows elsewhere
        self._refreshed_ms = now
        self._observer.gauge(figures, self._clock.wall_ms(), coverage)
