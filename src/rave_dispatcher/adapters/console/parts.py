"""The parts of the console's data, each as JSON, each with an error of its own."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rave_dispatcher.adapters.console import queries
from rave_dispatcher.adapters.console.cached import Cached
from rave_dispatcher.adapters.console.prometheus import Prometheus, PrometheusError
from rave_dispatcher.adapters.store.sqlite import EventStore
from rave_dispatcher.application.errors import DispatcherError
from rave_dispatcher.config import Console

ROWS = 25  # of events and of tasks

# How old what is shown may be, and how old what is shown while something newer is made, in
# seconds. Prometheus has no newer values than its last scrape's.
FEED = (1.0, 1.0)
STATE = (4.0, 30.0)
CHARTS = {"15m": (10.0, 60.0), "1h": (15.0, 120.0), "6h": (60.0, 300.0), "24h": (120.0, 600.0)}

_ODD = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class Parts:
    """Makes the document of the page."""

    def __init__(
        self,
        config: Console,
        store: EventStore,
        faults: Callable[[], list[str]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._config, self._store, self._faults, self._now = config, store, faults, now
        self._prometheus = Prometheus(config.prometheus)
        self._feed = Cached(self._make_feed, *FEED)
        self._state = Cached(self._make_state, *STATE)
        self._charts = {p: Cached(self._charts_of(p), *CHARTS[p]) for p in queries.PERIODS}
        self._about = _json(
            {
                "machine": config.machine,
                "periods": list(queries.PERIODS),
                "links": [link.model_dump() for link in config.links],
            }
        )

    async def document(self, period: str) -> bytes:
        """All of it, with the charts of a period of queries.PERIODS."""
        feed, state, charts = await asyncio.gather(
            self._feed.get(), self._state.get(), self._charts[period].get()
        )
        return (
            b'{"about":%b,"dispatcher":%b,"prometheus":%b,"charts":%b}'
            % (self._about, feed, state, charts)
        )  # fmt: skip

    async def _make_feed(self) -> bytes:
        found: dict[str, Any] = {"faults": self._faults(), "error": None}
        try:
            events, tasks = await self._store.recent(ROWS)
            found |= {"events": events, "tasks": tasks}
        except DispatcherError as e:
            found |= {"events": [], "tasks": [], "error": e.detail}
        return _json(found)

    async def _make_state(self) -> bytes:
        paths = (queries.running_path(), queries.answering_path(), queries.alerts_path())
        running, answering, alerts = await asyncio.to_thread(self._prometheus.ask, paths)
        return _json({"units": self._units(running, answering), "alerts": _alerts(alerts)})

    def _units(self, running: Any, answering: Any) -> dict[str, Any]:
        answers = (running, answering)
        error = next((str(a) for a in answers if isinstance(a, PrometheusError)), None)
        runs: Mapping[str, float | None] = {}
        responds: Mapping[str, float | None] = {}
        if error is None:
            try:
                runs, responds = (queries.by_service(a) for a in answers)
            except _ODD:
                error = ODD
        return {"rows": queries.unit_rows(self._config.units, runs, responds), "error": error}

    def _charts_of(self, period: str) -> Callable[[], Any]:
        async def make() -> bytes:
            points = queries.grid(period, self._now(), self._config.scrape_seconds)
            paths = [
                queries.chart_path(c, points, self._config.scrape_seconds) for c in queries.CHARTS
            ]
            answers = await asyncio.to_thread(self._prometheus.ask, paths)
            charts = [_chart(c, points, a) for c, a in zip(queries.CHARTS, answers, strict=True)]
            return _json(
                {
                    "period": period, "start": points.start, "step": points.step,
                    "count": points.count, "outcome_seconds": queries.outcome_window(points),
                    "charts": charts,
                }
            )  # fmt: skip

        return make


ODD = "Prometheus' answer is not understood"


def _chart(chart: queries.Chart, points: queries.Grid, answer: Any) -> dict[str, Any]:
    error, series = None, []
    if isinstance(answer, PrometheusError):
        error = str(answer)
    else:
        try:
            series = queries.chart_data(chart, points, answer)
        except _ODD:
            error = ODD
    return {
        "key": chart.key, "title": chart.title, "unit": chart.unit, "series": series,
        "error": error,
    }  # fmt: skip


def _alerts(answer: Any) -> dict[str, Any]:
    if isinstance(answer, PrometheusError):
        return {"rows": [], "error": str(answer)}
    try:
        return {"rows": queries.alert_rows(answer), "error": None}
    except _ODD:
        return {"rows": [], "error": ODD}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
