"""What the console asks of Prometheus and makes of its answers; what its files may not hold."""

from __future__ import annotations

import asyncio
import html.parser
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rave_dispatcher.adapters.console import app, queries
from rave_dispatcher.adapters.console.cached import Cached
from rave_dispatcher.adapters.console.prometheus import Prometheus, PrometheusError
from rave_dispatcher.adapters.systemd import bind_private
from rave_dispatcher.application.errors import MalformedError
from rave_dispatcher.config import Console, ConsoleUnit, Link

POINTS = queries.grid("1h", 1_800_000_007.5, 10)
CPU = queries.CHARTS[0]
LATENCY = next(c for c in queries.CHARTS if c.key == "latency")
UNITS = (
    ConsoleUnit(name="a", title="A", unit="a.service"),
    ConsoleUnit(name="b", title="B", unit="b@1-main.service"),
)


# --- the grid -----------------------------------------------------------------------------------


@given(st.sampled_from(list(queries.PERIODS)), st.floats(0, 4e9), st.floats(0.5, 60))
def test_the_points_of_a_period_stay_where_they_were(
    period: str, now: float, scrape: float
) -> None:
    points = queries.grid(period, now, scrape)
    assert points.end <= now < points.end + points.step
    assert points.end % points.step == 0
    assert points.step >= scrape
    assert points.count <= queries.POINTS * 15 / 14 + 1
    assert 0 <= queries.PERIODS[period] - (points.end - points.start) < points.step


@pytest.mark.parametrize("scrape", [1, 10, 60])
@pytest.mark.parametrize("period", queries.PERIODS)
def test_a_rate_is_over_scrapes_enough(scrape: int, period: str) -> None:
    points = queries.grid(period, 1e9, scrape)
    assert queries.window(points, scrape) >= max(4 * scrape, points.step)


# --- answers ------------------------------------------------------------------------------------


def matrix(**series: list[list[Any]]) -> dict[str, Any]:
    rows = [{"metric": {"series": name}, "values": v} for name, v in series.items()]
    return {"status": "success", "data": {"result": rows}}


def test_a_point_that_is_not_there_is_none_and_never_zero() -> None:
    answer = matrix(used=[[POINTS.start, "12.3456"], [POINTS.end, "0"]])
    (series,) = queries.chart_data(CPU, POINTS, answer)
    assert series["values"][0] == 12.35
    assert series["values"][-1] == 0
    assert set(series["values"][1:-1]) == {None}
    assert len(series["values"]) == POINTS.count


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
def test_what_is_no_number_is_no_data(value: str) -> None:
    answer = matrix(p99=[[POINTS.end, value]], p50=[[POINTS.end, "0.1"]])
    assert [s["key"] for s in queries.chart_data(LATENCY, POINTS, answer)] == ["p50"]
    assert queries.chart_data(LATENCY, POINTS, matrix()) == []


def test_series_have_their_order_and_unknown_ones_no_place() -> None:
    answer = matrix(p50=[[POINTS.end, "1"]], other=[[POINTS.end, "1"]], p99=[[POINTS.end, "2"]])
    assert [s["name"] for s in queries.chart_data(LATENCY, POINTS, answer)] == ["p99", "median"]


def test_points_beside_the_grid_are_left_out() -> None:
    late = POINTS.end + POINTS.step
    answer = matrix(used=[[late, "1"], [POINTS.start - POINTS.step, "1"]])
    assert queries.chart_data(CPU, POINTS, answer) == []


@given(st.recursive(st.none() | st.text() | st.integers(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["data", "result", "values", "metric", "alerts"]), x)))  # fmt: skip
def test_another_answer_is_told_from_no_data(answer: Any) -> None:
    from rave_dispatcher.adapters.console import parts  # noqa: PLC0415

    found = parts._chart(CPU, POINTS, answer)
    assert found["series"] == []
    empty = isinstance(answer, dict) and answer.get("data", 0) in (
        {"result": []}, {"result": {}}, {"result": ""},
    )  # fmt: skip
    assert empty or found["error"] is not None or answer["data"]["result"] in ([], {}, "")
    assert isinstance(parts._alerts(answer)["rows"], list)


@pytest.mark.parametrize(
    ("runs", "answers", "state"),
    [
        (1, 1, "active"),
        (1, None, "active"),
        (1, 0, "not answering"),
        (0, 0, "not running"),
        (0, 1, "not running"),  # asked before it stopped
        (0, None, "not running"),
        (None, 1, "active"),
        (None, 0, "not answering"),
        (None, None, "no data"),
    ],
)
def test_the_state_of_a_unit(runs: float | None, answers: float | None, state: str) -> None:
    running = {} if runs is None else {"a": runs}
    answering = {} if answers is None else {"a": answers}
    first, second = queries.unit_rows(UNITS, running, answering)
    assert first["state"] == state
    assert second["state"] == "no data"


def alert(name: str, state: str, severity: str | None, since: str) -> dict[str, Any]:
    labels = {"alertname": name, "unit": "x"} | ({"severity": severity} if severity else {})
    return {"labels": labels, "state": state, "activeAt": since, "annotations": {}, "value": "1"}


def test_the_worst_alert_comes_first() -> None:
    rows = [
        alert("e", "pending", "critical", "1"),
        alert("d", "firing", None, "1"),
        alert("c", "firing", "warning", "1"),
        alert("b", "firing", "critical", "2"),
        alert("a", "firing", "critical", "1"),
    ]
    found = queries.alert_rows({"data": {"alerts": rows}})
    assert [r["name"] for r in found] == ["a", "b", "c", "d", "e"]
    assert found[3]["severity"] == "none"
    assert found[0]["labels"] == {"unit": "x"}


# --- Prometheus that misbehaves -----------------------------------------------------------------


def serve_once(*answers: bytes) -> tuple[str, Any]:
    """A server on loopback that says these bytes to whoever connects, one after the other."""
    import threading  # noqa: PLC0415

    listener = socket.create_server(("127.0.0.1", 0))

    def work() -> None:
        connection, _ = listener.accept()
        with connection:
            for answer in answers:
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", listener


def http(body: bytes, status: str = "200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def test_one_query_that_is_refused_does_not_take_the_others_along() -> None:
    url, listener = serve_once(
        http(b'{"status":"success","data":1}'),
        http(b'{"status":"error","error":"too many samples"}', "422 Unprocessable Entity"),
        http(b"<html>", "502 Bad Gateway"),
        http(b'{"status":"success","data":2}'),
    )
    with listener:
        found = Prometheus(url).ask(["/1", "/2", "/3", "/4"])
    assert [f["data"] for f in (found[0], found[3])] == [1, 2]
    assert str(found[1]) == "Prometheus refused the query: too many samples"
    assert str(found[2]) == "Prometheus answered 502"


def test_what_cannot_be_reached_is_tried_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    found = Prometheus(f"http://127.0.0.1:{port}").ask(["/1", "/2"])
    assert [str(f) for f in found] == ["Prometheus cannot be reached"] * 2
    assert all(isinstance(f, PrometheusError) for f in found)


def test_an_endless_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rave_dispatcher.adapters.console.prometheus.ANSWER_BYTES", 1000)
    url, listener = serve_once(http(b"x" * 5000))
    with listener:
        (found,) = Prometheus(url).ask(["/1"])
    assert str(found) == "Prometheus says more than can be shown"


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rave_dispatcher.adapters.console.prometheus.SILENT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as s:
        found = Prometheus(f"http://127.0.0.1:{s.getsockname()[1]}").ask(["/1", "/2"])
    assert [str(f) for f in found] == ["Prometheus does not answer in time"] * 2


# --- shared values ------------------------------------------------------------------------------


class Maker:
    def __init__(self) -> None:
        self.now, self.made, self.gate = 0.0, 0, asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def make(self) -> int:
        await self.gate.wait()
        if self.error:
            raise self.error
        self.made += 1
        return self.made

    def cached(self) -> Cached[int]:
        return Cached(self.make, 4, 30, lambda: self.now)


def test_a_value_is_made_once_for_all_who_ask_at_once() -> None:
    async def work() -> None:
        maker = Maker()
        cached = maker.cached()
        assert await asyncio.gather(*(cached.get() for _ in range(9))) == [1] * 9
        maker.now = 3.9
        assert await cached.get() == 1

    asyncio.run(work())


def test_an_old_value_is_given_while_the_new_one_is_made_and_a_very_old_one_not() -> None:
    async def work() -> None:
        maker = Maker()
        cached = maker.cached()
        await cached.get()
        maker.now = 5
        maker.gate.clear()
        assert await asyncio.wait_for(cached.get(), 1) == 1
        maker.gate.set()
        await asyncio.sleep(0.01)
        assert await cached.get() == 2
        maker.now = 40
        assert await cached.get() == 3

    asyncio.run(work())


def test_who_hangs_up_takes_nothing_from_the_others_and_a_failure_is_not_kept() -> None:
    async def work() -> None:
        maker = Maker()
        cached = maker.cached()
        maker.gate.clear()
        gone, there = (asyncio.create_task(cached.get()) for _ in range(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        maker.gate.set()
        assert await there == 1
        maker.now, maker.error = 100, RuntimeError("x")
        with pytest.raises(RuntimeError):
            await cached.get()
        maker.error = None
        assert await cached.get() == 2

    asyncio.run(work())


# --- requests -----------------------------------------------------------------------------------


def test_a_page_names_a_period_and_never_a_query() -> None:
    assert app._period(b"") == "1h"
    assert app._period(b"period=24h") == "24h"
    for query in (b"period=2h", b"period=1h&period=6h", b"query=up", b"x", b"\xff=1", b"period="):
        with pytest.raises(MalformedError):
            app._period(query)


@pytest.mark.parametrize("href", ["javascript:alert(1)", "//evil", "/\\evil", "https://x/", "a b"])
def test_links_lead_to_this_origin(href: str) -> None:
    with pytest.raises(ValidationError):
        Link(title="x", href=href)
    assert Link(title="x", href="/ccr/ui/").href == "/ccr/ui/"
    assert Link(title="x", href="/").href == "/"


def test_prometheus_is_a_server_and_no_path() -> None:
    for url in ("http://h/x", "https://h", "file:///etc/passwd"):
        with pytest.raises(ValidationError):
            Console(prometheus=url)


def test_our_own_socket_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # also over what a killed process left
        with bind_private(path):
            assert path.stat().st_mode & 0o777 == 0o600


INHERIT = """
import os, socket
from rave_dispatcher.adapters.systemd import inherited_sockets
os.environ["LISTEN_PID"] = str(os.getpid())
found = inherited_sockets()
print([s.fileno() for s in found.api], [s.fileno() for s in found.console])
"""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("rave-dispatcher.socket:console", "[3] [4]"),
        ("console:rave-dispatcher.socket", "[3, 4] []"),  # the first is of TCP: never the console
        ("x:y", "[3, 4] []"),
        ("", "[3, 4] []"),
        (None, "[3, 4] []"),
    ],
)
def test_the_consoles_socket_is_told_by_its_name(
    names: str | None, expected: str, tmp_path: Path
) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = bind_private(tmp_path / "s")
    environment = {**os.environ, "LISTEN_FDS": "2"}
    environment |= {} if names is None else {"LISTEN_FDNAMES": names}
    # as systemd does: what is handed over begins at descriptor 3
    script = f"exec 3<&{tcp.fileno()} 4<&{unix.fileno()}; exec {sys.executable} -c '{INHERIT}'"
    with tcp, unix:
        done = subprocess.run(
            ["bash", "-c", script],
            env=environment, pass_fds=(tcp.fileno(), unix.fileno()), capture_output=True,
            text=True, check=True,
        )  # fmt: skip
    assert done.stdout.strip() == expected


# --- the files ----------------------------------------------------------------------------------

OURS = [p for p in sorted(app.STATIC.iterdir()) if not p.name.startswith("uPlot")]
BUDGET = 200_000  # bytes of all that a first visit loads


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.texts.append(data.strip())


def page() -> Page:
    made = Page()
    made.feed((app.STATIC / app.PAGE).read_text())
    return made


def test_the_page_has_no_inline_script_or_style() -> None:
    made = page()
    assert not any(made.texts)
    for tag, attributes in made.found:
        assert tag != "style"
        assert "style" not in attributes
        assert not [a for a in attributes if a.startswith("on")], tag


def test_everything_that_the_page_loads_is_served_here() -> None:
    loaded = [a.get("src") or a.get("href") for t, a in page().found if t in ("script", "link")]
    texts = [p.read_text() for p in OURS if p.suffix == ".js"]
    loaded += [m for text in texts for m in re.findall(r'from "([^"]+)"', text)]
    assert len(loaded) > 5
    for path in loaded:
        assert path in app.static_files(), path


def test_nothing_that_is_said_is_ever_read_as_html() -> None:
    bad = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|"
        r"\beval\b|new Function|DOMParser|setHTML|srcdoc|https?://"
    )
    for path in OURS:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(bad, text), path.name


def test_the_whole_page_is_small_and_its_library_is_what_npm_has() -> None:
    assert sum(len(c.body) for c in app.static_files().values()) < BUDGET
    library = app.static_files()["/console/uPlot.iife.min.js"].body
    assert library.startswith(b"/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
    licence = (app.STATIC / "uPlot.LICENSE.txt").read_text()
    assert "uPlot 1.6.32" in licence
    assert "MIT License" in licence
    assert "Leon Sorokin" in licence


def test_each_series_has_a_style_of_its_own_in_its_chart() -> None:
    text = (app.STATIC / "charts.js").read_text()
    block = re.search(r"STYLES = \{(.*?)\};", text, re.S)
    assert block is not None
    styles = dict(re.findall(r'"?(\w+)"?: (\["\w+", "\w+"\])', block[1]))
    for chart in queries.CHARTS:
        used = [json.loads(styles[key]) for key in chart.series]
        assert len({colour for colour, _ in used}) == len(used), chart.key
        # of 2xx and 5xx, whose lines are the same, one is nearly always at the bottom
        dashes = [dash for _, dash in used]
        assert len(set(dashes)) >= min(len(used), 3), chart.key


def test_a_start_does_not_wait_for_the_console() -> None:
    script = "import rave_dispatcher.service, sys; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )  # fmt: skip
    loaded = done.stdout.split()
    assert "rave_dispatcher.adapters.http.api" in loaded
    assert [m for m in loaded if m.startswith("rave_dispatcher.adapters.console")] == []
