"""Each panel's query, asked of the monitoring of a machine as it runs; and what Grafana is asked.

No Grafana can be had where this is developed. The panels are held to its published types
(grafana-foundation-sdk, made of its schemas) and to the stores that they ask; that it shows them is
proven where it is installed, by check O2.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from ravectl.engines import debian
from ravectl.model import AptSource, EngineName
from ravectl.plan import DASHBOARDS
from ravectl.verify.alerting import DASHBOARDS_SCRIPT
from tests import dashboards, monitored, nixos, rules_table

BOARDS = dashboards.load()
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and mounts need root")
# what a Prometheus query may say of an annotation beside the fields that all data sources have
OF_PROMETHEUS = {"tagKeys", "titleFormat"}
INVENTED = monitored.Query(9090, "rave_nobody_writes_this")
# parts that bring a metric of their own have no panel until they are here
NOT_HERE = {"BackupStale", "BackupBroken"}


# --- what they say ------------------------------------------------------------------------------


def test_the_plan_names_the_dashboards() -> None:
    assert set(BOARDS) == set(DASHBOARDS)
    assert all(b["uid"] == name for name, b in BOARDS.items())


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_of_grafanas_own_types(name: str) -> None:
    """Read into Grafana's typed classes and written again, nothing is lost or changed."""
    plugins.register_default_plugins()
    board = BOARDS[name]
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    lost = {re.sub(r".*\.", "", at) for at in differences(board, again)}
    assert lost == OF_PROMETHEUS


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where `other` lacks or changes what `one` says."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key, value in one.items():
            if key in other:
                yield from differences(value, other[key], f"{at}.{key}")
            else:
                yield f"{at}.{key}"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{at}[{i}]")
    elif one != other:
        yield at


def test_a_misspelled_field_would_be_seen() -> None:
    plugins.register_default_plugins()
    board = json.loads(json.dumps(BOARDS[DASHBOARDS[0]]))
    panel = next(p for p in board["panels"] if p["type"] == "timeseries")
    panel["options"]["legned"] = panel["options"].pop("legend")
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert any(at.endswith(".legned") for at in differences(board, again))


@pytest.mark.parametrize("name", BOARDS)
def test_a_dashboard_is_tidy(name: str) -> None:
    text = (dashboards.FOLDER / f"{name}.json").read_text()
    assert text == json.dumps(BOARDS[name], indent=2) + "\n"
    assert not BOARDS[name]["editable"]
    assert not BOARDS[name]["templating"]["list"]
    for key in ("id", "title"):
        values = [p[key] for p in dashboards.panels(BOARDS[name])]
        assert len(values) == len(set(values)), key


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows_in_which_unit(name: str) -> None:
    for panel in dashboards.panels(BOARDS[name]):
        where = panel["title"]
        defaults = panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 8, where
        assert panel["description"][0].isupper(), where
        assert defaults["unit"], where
        steps = defaults["thresholds"]["steps"]
        assert steps[0]["value"] is None, where
        assert [s["value"] for s in steps[1:]] == sorted(s["value"] for s in steps[1:]), where
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {panel["datasource"]["uid"]}
        refs = [t["refId"] for t in panel["targets"]]
        assert len(refs) == len(set(refs)), where
        if panel["type"] == "timeseries":
            assert all(t["legendFormat"] for t in panel["targets"]), where


@pytest.mark.parametrize("name", BOARDS)
def test_no_two_panels_lie_on_one_another(name: str) -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in BOARDS[name]["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert (x, y) not in taken, f"{panel['title']} on {taken.get((x, y))}"
                taken[x, y] = panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_dashboards_lead_to_one_another_and_to_the_console(name: str) -> None:
    urls = [link["url"] for link in BOARDS[name]["links"]]
    route = next(r for r in nixos.on_both().routes if r.name == "grafana")
    others = [f"{route.path}d/{uid}" for uid in DASHBOARDS if uid != name]
    assert urls == [*others, "/"]


def test_panels_name_the_runbooks_of_their_alerts() -> None:
    text = " ".join(p["description"] for b in BOARDS.values() for p in dashboards.panels(b))
    named = set(re.findall(r"docs/runbooks/(\w+)\.md", text))
    assert named == set(nixos.on_both().alerts) - NOT_HERE


def test_data_sources_are_those_that_are_provisioned() -> None:
    asked = {a.datasource for a in dashboards.asked()}
    sources = nixos.values(nixos.on_both().hostname)["services"]["grafana"]["provision"]
    given = {s["uid"]: s for s in sources["datasources"]["settings"]["datasources"]}
    assert asked == set(given) == set(dashboards.PORTS)
    for uid, port in dashboards.PORTS.items():
        assert given[uid]["url"] == f"http://127.0.0.1:{port}"
    assert [s["uid"] for s in given.values() if s["isDefault"]] == ["rave-prometheus"]


def test_what_is_kept_long_is_what_is_asked_of_victoriametrics() -> None:
    for asked in dashboards.asked():
        for metric in dashboards.metrics(asked.expression):
            long = asked.datasource == "rave-victoriametrics"
            assert metric.startswith("rave:") or not long, asked


def test_recorded_series_that_are_asked_for_are_recorded() -> None:
    recorded = {r["record"] for g in rules_table.groups("slo.yml") for r in g["rules"]}
    for asked in dashboards.asked():
        names = {m for m in dashboards.metrics(asked.expression) if ":" in m}
        assert names <= recorded, asked


# --- what is answered ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered() -> dict[monitored.Query, monitored.Answer]:
    queries = list(dict.fromkeys(a.query for a in dashboards.asked()))
    silent = [q for q in queries if q.expression in dashboards.SILENT]
    return monitored.answers([*queries, INVENTED], [*silent, INVENTED])


@needs_root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_shows_something(
    name: str, answered: dict[monitored.Query, monitored.Answer]
) -> None:
    nothing = []
    for asked in dashboards.asked():
        answer = answered[asked.query]
        assert not answer.error, f"{asked.panel}: {answer.error}"
        if asked.dashboard == name and asked.query.expression not in dashboards.SILENT:
            nothing += [f"{asked.panel}: {asked.expression}"] * (not answer.series)
    assert nothing == []


@needs_root
@pytest.mark.timeout(600)
def test_a_metric_that_nobody_writes_shows_nothing(
    answered: dict[monitored.Query, monitored.Answer],
) -> None:
    assert answered[INVENTED] == monitored.Answer(0)


def test_what_may_be_silent_is_asked() -> None:
    assert set(dashboards.SILENT) <= {a.expression for a in dashboards.asked()}


# --- what O2 asks Grafana -----------------------------------------------------------------------


class StandinGrafana(http.server.BaseHTTPRequestHandler):
    """Answers as Grafana's HTTP API is documented to; it is no Grafana."""

    known: ClassVar[dict[str, bool]] = {}
    login = "Basic " + base64.b64encode(b'rave:pass"word').decode()

    def do_GET(self) -> None:
        uid = self.path.removeprefix("/api/dashboards/uid/")
        status, body = 200, {"meta": {"provisioned": self.known.get(uid)}, "dashboard": {}}
        if self.headers.get("Authorization") != self.login:
            status, body = 401, {"message": "Invalid username or password"}  # type: ignore[dict-item]
        elif uid not in self.known:
            status, body = 404, {"message": "Dashboard not found"}  # type: ignore[dict-item]
        data = json.dumps(body, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("password", "expected"),
    [
        ('pass\\"word', ["one 200 yes", "two 200 no", "three 404 no"]),
        ("another", ["one 401 no", "two 401 no", "three 401 no"]),
    ],
)
def test_the_script_of_o2_reads_what_grafana_answers(
    password: str, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(password + "\n")
    StandinGrafana.known = {"one": True, "two": False}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandinGrafana)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    asked = {"uids": "one two three", "user": "rave", "port": server.server_port}
    script = (DASHBOARDS_SCRIPT % asked).replace(
        "/run/secrets/grafana/admin-password", str(tmp_path / "password")
    )
    try:
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=180, check=False
        )
    finally:
        server.shutdown()
        server.server_close()
    assert done.stdout.splitlines() == ["== dashboards ==", *expected], done.stderr


def test_only_a_machine_with_grafana_is_asked_for_dashboards() -> None:
    assert nixos.on_both().on(EngineName.DEBIAN).dashboards == DASHBOARDS
    assert [p.on(EngineName.DEBIAN).dashboards for p in nixos.shipped()] == [(), ()]


# --- where Debian's Grafana comes from ----------------------------------------------------------

SIGNED = (
    Path(__file__).parent / "payloads/apt"
)  # a source of one stand-in package, signed by key.asc


class _Source(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=str(SIGNED))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(("key", "accepted"), [("key", True), ("other", False)])
def test_apt_takes_what_that_key_signed_and_nothing_else(
    key: str, accepted: bool, tmp_path: Path
) -> None:
    """The real apt, with folders of its own, reads the source that mmdebstrap is given."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Source)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = AptSource(
        f"http://127.0.0.1:{server.server_port}/ stable main", (SIGNED / f"{key}.asc").read_text()
    )
    for name in ("parts", "state/lists/partial", "cache/archives/partial"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "parts/grafana.sources").write_text(debian.apt_source(source))
    (tmp_path / "status").touch()
    options = [
        "Dir::Etc::sourcelist=/dev/null", f"Dir::Etc::sourceparts={tmp_path}/parts",
        f"Dir::State={tmp_path}/state", f"Dir::State::status={tmp_path}/status",
        f"Dir::Cache={tmp_path}/cache", "APT::Sandbox::User=root",
        "Acquire::http::Proxy::127.0.0.1=DIRECT", "Acquire::GzipIndexes=false",
        "APT::Architecture=amd64",
    ]  # fmt: skip
    words = [w for o in options for w in ("-o", o)]
    try:
        done = subprocess.run(
            ["apt-get", "update", "--error-on=any", *words], capture_output=True, text=True,
            timeout=180, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert (done.returncode == 0) == accepted, done.stderr
    found = [p.read_text() for p in (tmp_path / "state/lists").glob("*_Packages")]
    assert any("Package: grafana\n" in text for text in found) == accepted
